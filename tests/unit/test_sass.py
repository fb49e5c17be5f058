"""Rule R1 in the machine code of every kernel built, whatever the compiler's flags were: no floating point near a poll.
And how many loads are under way before one is waited for (tests/common/flight.py).

What is checked, and why, stands in tests/common/sass.py. The controls: the library's waiting compiled with the old
compare, the test build where it is there, and a poll loop written out below with one thing wrong at a time.
"""

import dataclasses
import itertools
import re
from pathlib import Path

import pytest

from common import flight, sass

ROOT = Path(__file__).parent.parent.parent
DTYPES = ("Bfloat16", "Float16", "Float32")
KIND = re.compile(r"kernel_of<(\w+)(?:, protocol::(\w+))?>")  # an epilogue, and its dtype unless it has all


def disassembled(file: Path) -> list[sass.Kernel]:
    try:
        return sass.disassemble(file)
    except sass.NoDisassembly as reason:
        pytest.skip(str(reason))


def compiled(source: str, cubin: Path, arch: str) -> None:
    """One of tests/native, as a test build compiles it."""
    try:
        sass.compile_by_nvcc(ROOT / "tests" / "native" / source, cubin, arch, "-DMNNVL_AR_TEST_BUILD")
    except sass.NoDisassembly as reason:
        pytest.skip(str(reason))


def kinds(kernel: sass.Kernel) -> set[str]:
    return {fault.split(":")[0] for fault in sass.library_faults(kernel)}


@pytest.fixture(scope="module")
def everything() -> list[sass.Kernel]:
    return disassembled(ROOT / "mnnvl_ar" / "_C.so")


@pytest.fixture(scope="module")
def built(everything: list[sass.Kernel]) -> list[sass.Kernel]:
    """But for the stubs of forms that an architecture does not have."""
    return [kernel for kernel in everything if not is_stub(kernel)]


def is_stub(kernel: sass.Kernel) -> bool:
    """It traps, and nothing else."""
    does = {kernel.code[i].opcode.split(".")[0] for i in sass.body(kernel)}
    return "BPT" in does and not does & {"LD", "LDG", "ST", "STG", "ATOMG", "RED", "BAR"}


def is_absent_form(kernel: sass.Kernel) -> bool:
    """Two-shot by four rows at a time, on Blackwell: csrc/launch/form.h, is_built."""
    return kernel.arch == "sm_100" and "two_shot" in kernel.name and "TileILi4E" in kernel.name


def twins(kernels: list[sass.Kernel]) -> list[tuple[str, str]]:
    """Kernels of one architecture with the same machine code: one of the two is built for nothing."""
    seen: dict[tuple[str, str], str] = {}
    found = []
    for kernel in kernels:
        code = "\n".join(map(str, kernel.code))
        first = seen.setdefault((kernel.arch, code), kernel.name)
        found += [(first, kernel.name)] if first != kernel.name else []
    return found


def test_each_kernel_is_built_once(built: list[sass.Kernel]) -> None:
    assert twins(built) == []


def test_a_kernel_that_is_built_twice_is_found(built: list[sass.Kernel]) -> None:
    one = built[0]
    assert twins([one, dataclasses.replace(one, name="other")]) == [(one.name, "other")]
    assert twins([one, dataclasses.replace(one, name="other", arch="sm_0")]) == []


def test_stubs_are_the_forms_that_are_not_planned(everything: list[sass.Kernel]) -> None:
    assert [k.name for k in everything if is_stub(k) != is_absent_form(k)] == []


def test_no_floating_point_near_a_poll(built: list[sass.Kernel]) -> None:
    wrong = {f"{kernel.arch} {kernel.name}": sass.library_faults(kernel) for kernel in built}
    assert {name: found for name, found in wrong.items() if found} == {}


def test_the_timer_is_compared_signed(built: list[sass.Kernel]) -> None:
    wrong = {f"{kernel.arch} {kernel.name}": sass.timer_faults(kernel) for kernel in built}
    assert {name: found for name, found in wrong.items() if found} == {}


def test_signatures_are_looked_at_whole(built: list[sass.Kernel]) -> None:
    """One of each call, and of a call with a norm two (csrc/protocol/signature.h)."""
    wrong = {
        f"{kernel.arch} {kernel.name}": sass.board_faults(kernel, 2 if sass.NORMED.search(kernel.name) else 1)
        for kernel in built
    }
    assert {name: found for name, found in wrong.items() if found} == {}


def test_every_kind_of_kernel_was_looked_at(built: list[sass.Kernel]) -> None:
    names = [kernel.name for kernel in built]
    texts = [file.read_text() for file in (ROOT / "csrc" / "epilogues").glob("*.cu")]
    kinds = [kind for text in texts if "MNNVL_AR_TEST_BUILD" not in text for kind in KIND.findall(text)]
    assert {("Plain", ""), ("StaticFp8", "Bfloat16")} <= set(kinds)
    for epilogue, only in kinds:
        for strategy, dtype in itertools.product(("one_shot", "two_shot"), [only] if only else DTYPES):
            parts = strategy, epilogue, dtype
            assert any(all(part in name for part in parts) for name in names), parts


def test_two_shot_waits_once_more_than_one_shot(built: list[sass.Kernel]) -> None:
    """That all of the poll loops were found: data and signatures, and two-shot's second stage."""
    for kernel in built:
        waits = 3 if "two_shot" in kernel.name else 2
        assert len(sass.poll_loops(kernel)) >= waits, kernel.name


# By ptxas of CUDA 13.0, which runs out of predicates. Nobody knows before what a change will make of this one.
IN_FOUR_WAVES = ("two_shot", "Float32ELi8E", "TileILi1E", "RmsNorm")


def is_in_one_wave(kernel: sass.Kernel) -> bool:
    return all(waves == 1 for _, waves in flight.first_looks(kernel))


def test_first_looks_are_under_way_together(built: list[sass.Kernel]) -> None:
    apart = [k.name for k in built if k.arch == "sm_90a" and not is_in_one_wave(k)]
    assert [name for name in apart if not all(part in name for part in IN_FOUR_WAVES)] == []
    of_eight = [k for k in built if k.arch == "sm_90a" and "two_shot" in k.name and "ELi8E" in k.name]
    assert of_eight
    assert all(flight.first_looks(k) for k in of_eight)


def test_the_state_is_awaited_behind_the_mbarrier(built: list[sass.Kernel]) -> None:
    assert [k.name for k in built if not flight.state_is_awaited_late(k)] == []


def test_a_look_in_two_waves_is_found(built: list[sass.Kernel]) -> None:
    kernel = next(k for k in built if flight.first_looks(k) == [(8, 1)])
    polls = [i for i, one in enumerate(kernel.code) if one.is_poll]
    look = next(i for i in polls if {*range(i, i + 90)} >= {*polls[polls.index(i) : polls.index(i) + 8]})
    scoreboard = flight.sets_scoreboard(kernel.code[look])
    assert scoreboard is not None
    one, code = kernel.code[look + 1], list(kernel.code)
    assert one.control is not None
    code[look + 1] = dataclasses.replace(one, control=one.control | 1 << scoreboard + 11 + flight.SHIFT)
    assert not is_in_one_wave(dataclasses.replace(kernel, code=code))


def test_a_state_that_is_awaited_at_once_is_found(built: list[sass.Kernel]) -> None:
    kernel = next(k for k in built if "one_shot" in k.name)
    first = next(i for i, one in enumerate(kernel.code) if one.opcode.startswith("LDG.E.128.STRONG.GPU"))
    scoreboard = flight.sets_scoreboard(kernel.code[first])
    assert scoreboard is not None
    one, code = kernel.code[first + 2], list(kernel.code)
    assert one.control is not None
    code[first + 2] = dataclasses.replace(one, control=one.control | 1 << scoreboard + 11 + flight.SHIFT)
    assert not flight.state_is_awaited_late(dataclasses.replace(kernel, code=code))


def generic(kernels: list[sass.Kernel]) -> list[sass.Kernel]:
    """Of any world size: those that take the number of ranks at run time."""
    return [kernel for kernel in kernels if re.search(r"(one|two)_shot.*?ELi0ENS0_4Tile", kernel.name)]


def not_in_one_wave(kernel: sass.Kernel, sources: int) -> list[str]:
    """What is wrong with the loops of a kernel that awaits so many sources at once: exactly one of them does."""
    of_data = sorted(flight.waves(kernel))
    is_right = of_data.count(sources) == 1 and of_data[-1] == sources
    return [] if is_right else [f"{kernel.arch} {kernel.name}: {of_data}"]


def test_sixteen_sources_are_under_way_before_one_is_awaited(built: list[sass.Kernel]) -> None:
    """So a world of up to 16 ranks, of a size without kernels of its own, waits for one latency, one of 72 for five."""
    kernels = generic(built)
    assert len({kernel.name for kernel in kernels}) >= 60, "5 epilogues, their dtypes, 5 forms"
    assert [line for kernel in kernels for line in not_in_one_wave(kernel, 16)] == []


def test_each_root_is_that_of_numerics_root(built: list[sass.Kernel]) -> None:
    """Of a kernel with a norm: the quick one, and behind it CUDA's own for what is not moderate."""
    for kernel in built:
        roots = sass.roots(kernel)
        assert bool(roots) == (sass.NORMED.search(kernel.name) is not None), (kernel.arch, kernel.name)
        assert all("root" in made for made in roots), (kernel.arch, kernel.name, roots)
        assert not roots or {"root", "rstd"} in roots, (kernel.arch, kernel.name, roots)


def test_aliases_are_fenced_once_behind_a_branch(built: list[sass.Kernel]) -> None:
    wrong = {f"{kernel.arch} {kernel.name}": sass.alias_faults(kernel) for kernel in built}
    assert {name: found for name, found in wrong.items() if found} == {}


@pytest.fixture(scope="module", params=["sm_90a", "sm_100f"])
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, sass.Kernel]:
    """Both roots by themselves, for one target."""
    cubin = tmp_path_factory.mktemp("root") / "root.cubin"
    compiled("root.cu", cubin, request.param)
    return {kernel.name: kernel for kernel in disassembled(cubin)}


def test_the_root_is_the_one_that_nvcc_puts_in_place_of_its_own(alone: dict[str, sass.Kernel]) -> None:
    """On both targets: so if IEEE roots are right there, ours is (tests/unit/test_root.py says what that leaves)."""
    assert sass.roots(alone["nvcc_root"]) == [{"root"}]
    assert sass.roots(alone["quick_root"]) == [{"root", "rstd"}]


# ---- controls


def test_a_fence_of_aliases_that_all_run_is_found(built: list[sass.Kernel]) -> None:
    """The branch around it is taken away; and then the fence."""
    kernel = built[0]
    (fence,) = (i for i in sorted(sass.body(kernel)) if kernel.code[i].opcode == "MEMBAR.SC.SYS")
    code = list(kernel.code)
    past = [
        i
        for i in range(fence)
        if code[i].opcode == "BRA" and code[i].guard and (code[i].target or 0) > code[fence].address
    ]
    code[past[-1]] = dataclasses.replace(code[past[-1]], opcode="NOP", operands="", guard=None)
    assert sass.alias_faults(dataclasses.replace(kernel, code=code)) == ["alias: cannot be passed by"]
    code[fence] = dataclasses.replace(code[fence], opcode="NOP", operands="")
    assert sass.alias_faults(dataclasses.replace(kernel, code=code))[0] == "alias: 0 fences"


@pytest.mark.parametrize(
    ("old", "new", "left"),
    [
        ("0.5", "0.25", set()),
        ("MUFU.RSQ", "MUFU.RCP", None),
        ("FMUL", "FADD", set()),
        (", 1", ", 2", {"root"}),
    ],
)
def test_another_sequence_is_found(alone: dict[str, sass.Kernel], old: str, new: str, left: set[str] | None) -> None:
    kernel = alone["quick_root"]
    code = [
        dataclasses.replace(one, opcode=one.opcode.replace(old, new), operands=one.operands.replace(old, new))
        for one in kernel.code
    ]
    assert sass.roots(dataclasses.replace(kernel, code=code)) == ([] if left is None else [left])


def test_each_operation_of_the_sequence_is_needed(alone: dict[str, sass.Kernel]) -> None:
    """Without any one of them the result is no longer found."""
    kernel = alone["quick_root"]
    (start,) = (i for i, one in enumerate(kernel.code) if one.opcode == "MUFU.RSQ")
    steps = [i for i in range(start, len(kernel.code)) if kernel.code[i].opcode in ("FMUL", "FFMA")]
    assert len(steps) == 8
    for i in steps:
        code = list(kernel.code)
        code[i] = dataclasses.replace(code[i], opcode="NOP", operands="")
        assert sass.roots(dataclasses.replace(kernel, code=code)) != [{"root", "rstd"}], str(kernel.code[i])


@pytest.mark.parametrize("line", ["FFMA R9, R4, R5, R6", "FADD.FTZ R9, -R4, -RZ"])
def test_the_quick_root_explains_nothing_else(built: list[sass.Kernel], line: str) -> None:
    """One more of what it is let pass, in the first place of a kernel that can be replaced."""
    kernel = next(kernel for kernel in built if "RmsNorm" in kernel.name)
    opcode, operands = line.split(" ", 1)
    i = next(i for i in sorted(sass.body(kernel)) if kernel.code[i].opcode == "NOP")
    code = list(kernel.code)
    code[i] = dataclasses.replace(code[i], opcode=opcode, operands=operands)
    assert kinds(kernel) == set()
    assert kinds(dataclasses.replace(kernel, code=code)) == {"fma" if opcode == "FFMA" else "ftz"}


def test_a_load_that_waits_for_another_one_is_found(built: list[sass.Kernel]) -> None:
    """In the machine code of a kernel as it is built: another wait, or a use of what is loaded, in the middle."""
    kernel = next(kernel for kernel in generic(built) if "one_shot" in kernel.name)
    (loop,) = (loop for loop in sass.poll_loops(kernel) if len([i for i in loop if kernel.code[i].is_poll]) == 16)
    polls = [i for i in sorted(loop) if kernel.code[i].is_poll]
    scoreboard, middle = flight.sets_scoreboard(kernel.code[polls[0]]), polls[8] - 1
    assert scoreboard is not None
    one = kernel.code[middle]
    assert one.control is not None
    waits = dataclasses.replace(one, control=one.control | 1 << scoreboard + 11 + flight.SHIFT)
    loaded = kernel.code[polls[3]].operands.split(",")[0]
    uses = dataclasses.replace(one, opcode="ISETP.NE.AND", operands=f"P0, PT, {loaded}, -0x80000000, PT")
    for changed in (waits, uses):
        code = [*kernel.code[:middle], changed, *kernel.code[middle + 1 :]]
        assert sorted(flight.waves(dataclasses.replace(kernel, code=code)))[-1] == 8
        assert not_in_one_wave(dataclasses.replace(kernel, code=code), 16) != []
    assert not_in_one_wave(kernel, 4) != [], "as it was by fours"


def test_rows_that_are_awaited_together_are_counted_too(built: list[sass.Kernel]) -> None:
    """Of two-shot's second stage: so the count is of loads, and not of what is hoped for."""
    for kernel in generic(built):
        if rows := re.search(r"two_shot.*TileILi(\d)E", kernel.name):
            assert int(rows[1]) in flight.waves(kernel), kernel.name


def test_code_without_its_encoding_is_refused() -> None:
    with pytest.raises(ValueError, match="its encoding was not read"):
        flight.waves(sass.kernels(LOOP)[0])


@pytest.fixture(scope="module")
def old_compare(tmp_path_factory: pytest.TempPathFactory) -> list[sass.Kernel]:
    """The library's own receive_sum(), as the test build compiles it: with FlashInfer's compare in it."""
    cubin = tmp_path_factory.mktemp("sass") / "old_compare.cubin"
    compiled("old_compare.cu", cubin, "sm_90a")
    return disassembled(cubin)


def test_the_old_compare_is_found(old_compare: list[sass.Kernel]) -> None:
    (kernel,) = old_compare
    assert len(sass.poll_loops(kernel)) == 1
    assert kinds(kernel) == {"compare", "ftz", "float", "loops"}
    compares = [fault for fault in sass.faults(kernel) if fault.startswith("compare")]
    assert len(compares) >= 8, "four words of each of two vectors"


def test_the_test_build_is_found() -> None:
    for kernel in disassembled(ROOT / "tests" / "_C_test.so"):
        if is_stub(kernel):
            continue
        assert kinds(kernel) >= {"compare", "ftz", "float"}, kernel.name


# A row loop, two poll loops in it, the first look at the first one peeled off; then a subroutine.
LOOP = """
	code for sm_90a
		Function : _Z6kernelv
        /*0000*/                   S2R R29, SR_TID.X ;
        /*0010*/                   LDG.E.128.STRONG.SYS R12, desc[UR8][R24.64] ;
        /*0020*/                   ISETP.NE.AND P0, PT, R12, -0x80000000, PT ;
        /*0030*/               @P0 BRA 0x80 ;
        /*0040*/                   LDG.E.STRONG.SYS R22, desc[UR8][R22.64+0x14] ;
        /*0050*/                   LDG.E.128.STRONG.SYS R12, desc[UR8][R24.64] ;
        /*0060*/                   ISETP.NE.AND P0, PT, R12, -0x80000000, PT ;
        /*0070*/              @!P0 BRA 0x40 ;
        /*0080*/                   FADD R3, RZ, R12 ;
        /*0090*/                   MUFU.RSQ R19, R3 ;
        /*00a0*/                   FMUL.FTZ R17, R3, R19 ;
        /*00b0*/                   FFMA R3, -R17, R17, R3 ;
        /*00c0*/                   FFMA R3, R3, R17, R17 ;
        /*00d0*/                   CALL.REL.NOINC 0x170 ;
        /*00e0*/                   LDG.E.128.STRONG.SYS R4, desc[UR8][R24.64] ;
        /*00f0*/                   NOP ;
        /*0100*/                   ISETP.NE.AND P0, PT, R4, R5, PT ;
        /*0110*/                   ISETP.NE.AND P1, PT, R4, R6, PT ;
        /*0120*/              @!P0 BRA P1, 0xe0 ;
        /*0130*/                   STG.E.128 desc[UR8][R2.64], R8 ;
        /*0140*/               @P2 BRA 0x10 ;
        /*0150*/                   EXIT ;
        /*0160*/                   BRA 0x160;
        /*0170*/                   FSETP.GTU.FTZ.AND P0, PT, |R3|, +INF , PT ;
        /*0180*/                   STL [R1], R3 ;
        /*0190*/                   RET.REL.NODEC R18 0x0 ;
"""


def test_a_good_loop_is_let_pass() -> None:
    (kernel,) = sass.kernels(LOOP)
    assert kernel.name == "_Z6kernelv"
    assert kernel.arch == "sm_90a"
    assert sass.faults(kernel) == []
    addresses = [{kernel.code[i].address for i in loop} for loop in sass.poll_loops(kernel)]
    assert sorted(map(min, addresses)) == [0x40, 0xE0], "the innermost ones, and not the row loop around them"
    assert sorted(map(max, addresses)) == [0x70, 0x120]


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ("ISETP.NE.AND P0, PT, R4, R5, PT", "FSETP.NEU.AND P0, PT, R4, RZ, PT", {"compare", "float"}),
        ("ISETP.NE.AND P0, PT, R4, R5, PT", "FSETP.NEU.FTZ.AND P0, PT, R4, RZ, PT", {"compare", "float", "ftz"}),
        ("NOP", "FSET.BF.EQ.AND R9, R4, RZ, PT", {"compare", "float"}),
        ("NOP", "FMNMX R9, R4, RZ, PT", {"compare", "float"}),
        ("NOP", "DSETP.NEU.AND P0, PT, R4, RZ, PT", {"compare", "float"}),
        ("NOP", "HSETP2.NEU.AND P0, PT, R4, RZ, PT", {"compare", "float"}),
        ("NOP", "FADD R9, R4, RZ", {"float"}),
        ("NOP", "FADD.FTZ R9, R4, -RZ", {"float", "ftz"}),
        ("NOP", "F2FP.BF16.F32.PACK_AB R4, R4, R5", {"float"}),
        ("NOP", "HFMA2.MMA R9, R4, R5, R6", {"float"}),
        ("NOP", "FFMA R9, R4, R5, R6", {"float", "fma"}),
        ("NOP", "CALL.REL.NOINC 0x170", {"call"}),
        ("NOP", "LDL R9, [R1]", {"local"}),
        (
            "S2R R29, SR_TID.X",
            "FSETP.GTU.AND P0, PT, R29, RZ, PT",
            {"compare"},
        ),  # outside the loops: a look that was peeled off
        ("S2R R29, SR_TID.X", "FMUL.FTZ R29, R29, R29", {"ftz"}),
        ("FADD R3, RZ, R12", "FFMA R3, R3, R4, R12", {"fma"}),
        ("FMUL.FTZ R17, R3, R19", "FMUL.FTZ R17, R3, R3", {"ftz"}),
        ("STG.E.128 desc[UR8][R2.64], R8", "STG.E desc[UR8][R2.64], R8", {"narrow"}),
        ("STG.E.128 desc[UR8][R2.64], R8", "STG.E.64.STRONG.SYS desc[UR8][R2.64], R8", {"narrow"}),
        ("STG.E.128 desc[UR8][R2.64], R8", "LDG.E.64 R8, desc[UR8][R2.64]", {"narrow"}),
        ("LDG.E.128.STRONG.SYS R4", "LDG.E.128 R4", {"loops"}),
        ("NOP", "LDG.E.NA.128.CONSTANT R8, desc[UR8][R2.64]", {"readonly"}),
        ("NOP", "LDG.E.CONSTANT R8, desc[UR8][R2.64]", {"readonly", "narrow"}),
        ("STL [R1], R3", "LDG.E.128.CONSTANT R8, desc[UR8][R2.64]", {"readonly"}),  # in what is called, too
    ],
)
def test_a_fault_is_found(old: str, new: str, kind: set[str]) -> None:
    assert old in LOOP
    (kernel,) = sass.kernels(LOOP.replace(old, new))
    assert kinds(kernel) == kind


@pytest.mark.parametrize(
    "line", ["HFMA2.MMA R9, -RZ, RZ, 0, 0", "FENCE.VIEW.ASYNC.S", "FLO.U32 R9, R4", "DEPBAR.LE SB0, 0x0"]
)
def test_what_only_looks_like_floating_point_is_let_pass(line: str) -> None:
    (kernel,) = sass.kernels(LOOP.replace("NOP", line))
    assert sass.faults(kernel) == []


@pytest.mark.parametrize(
    ("epilogue", "line", "is_fault"),
    [
        ("7RmsNormE", "STG.E.64 desc[UR8][R2.64], R8", True),
        ("5PlainE", "LDG.E R8, desc[UR8][R2.64]", True),
        ("10RmsNormFp8E", "STG.E.64 desc[UR8][R2.64], R8", False),
        ("10RmsNormFp8E", "LDG.E R8, desc[UR8][R2.64]", False),
        ("10RmsNormFp8E", "STG.E.64.STRONG.SYS desc[UR8][R2.64], R8", True),
    ],
)
def test_narrow_outputs_are_for_epilogues_that_have_them(epilogue: str, line: str, is_fault: bool) -> None:
    (kernel,) = sass.kernels(LOOP.replace("STG.E.128 desc[UR8][R2.64], R8", line))
    named = dataclasses.replace(kernel, name=f"_ZN8mnnvl_ar7kernels8one_shotINS_9epilogues{epilogue}EEvT_")
    assert kinds(named) == ({"narrow"} if is_fault else set())
