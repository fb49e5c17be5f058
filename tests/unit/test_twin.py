"""The twin without a GPU: its constants are the headers', its arithmetic is rounded as theirs, its machine code waits
as theirs does, and what it does not have is refused by name."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from common import dsl, sass
from common.pages import Page
from common.virtual import VirtualGroup
from mnnvl_ar import ops
from mnnvl_ar._library import named
from mnnvl_ar.dsl import all_reduce_rms_norm, build, constants, cubins, launch
from mnnvl_ar.dsl.lint import lint

pytestmark = pytest.mark.timeout(900)  # the DSL may have to be installed first, or waited for: tests/common/dsl.py
ROOT = Path(__file__).parent.parent.parent
DSL = ROOT / "mnnvl_ar" / "dsl"
EPILOGUE = "common.relu_squared:relu_squared"

# ---- constants

# What the headers have, by the names of constants.py.
HEADERS = """
#include <cstddef>
#include <cstdio>
#include "protocol/fault.h"
#include "protocol/layout.h"
#include "protocol/numerics.h"
#include "protocol/ring.h"
#include "protocol/signature.h"
using namespace mnnvl_ar::protocol;
template <class Value> void say(const char* name, Value value) {
  std::printf("%s %llu\\n", name, static_cast<unsigned long long>(value));
}
#define AT(name, type, field) say(name "." #field, offsetof(type, field))
int main() {
  say("VECTOR_BYTES", kVectorBytes);
  say("STATE_OFFSET", kStateOffset);
  say("PROGRESS_OFFSET", kProgressOffset);
  say("ARRIVED_AT", offsetof(State, arrived));
  say("FINISHED_AT", offsetof(Progress, finished));
  say("BROKEN_AT", offsetof(Progress, broken));
  say("CLAIMED_AT", offsetof(Progress, claimed));
  say("LATER_AT", offsetof(Progress, later));
  say("BOARD_OFFSET", kBoardOffset);
  say("MAX_RANKS", kMaxRanks);
  say("ONE_BOARD_BYTES", kOneBoardBytes);
  say("CONTROL_BYTES", kControlBytes);
  say("SLOTS", kSlots);
  say("EPOCHS", kEpochs);
  say("NO_EPOCH", kNoEpoch);
  say("ARRIVAL_BITS", kArrivalBits);
  say("MAX_GRID", kMaxGrid);
  say("ARRIVAL_FACTOR_SHIFTED", arrival(0, 1) - 1);
  say("SENTINEL", kSentinel);
  say("GROUP", kGroup);
  say("SUMS", kSums);
  say("POISON", kPoison);
  say("POISON_PAIR", Bfloat16::round(as_float(kPoison)) | Bfloat16::round(as_float(kPoison)) << 16);
  say("PEER_TIMEOUT", FaultCode::peer_timeout);
  say("CALL_MISMATCH", FaultCode::call_mismatch);
  say("PEER_FAULT", FaultCode::peer_fault);
  say("OVERLAP", FaultCode::overlap);
  say("TWO_AT_ONCE", FaultCode::two_at_once);
  say("MARK", peer_mark(5, FaultCode::two_at_once));
  say("STRATEGY_AT", kStrategyAt);
  AT("RECORD", FaultRecord, code);
  AT("RECORD", FaultRecord, rank);
  AT("RECORD", FaultRecord, epoch);
  AT("RECORD", FaultRecord, tokens);
  AT("RECORD", FaultRecord, description);
  AT("RECORD", FaultRecord, numbers.eps);
  AT("RECORD", FaultRecord, numbers.weight_bias);
  AT("RECORD", FaultRecord, peer);
  AT("RECORD", FaultRecord, peer_tokens);
  AT("RECORD", FaultRecord, peer_description);
  AT("RECORD", FaultRecord, peer_numbers.eps);
  AT("RECORD", FaultRecord, peer_numbers.weight_bias);
  AT("RECORD", FaultRecord, began_ns);
  AT("RECORD", FaultRecord, ended_ns);
  AT("RECORD", FaultRecord, last_epoch);
  AT("ORDERS", Orders, deadline_ns);
  AT("ORDERS", Orders, hold_ns);
  AT("ORDERS", Orders, answered);
}
"""


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    folder = tmp_path_factory.mktemp("headers")
    (folder / "say.cpp").write_text(HEADERS)
    command = ["g++", "-std=c++20", "-Wno-invalid-offsetof", f"-I{ROOT / 'csrc'}", "say.cpp", "-o", "say"]
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")
    subprocess.run(command, cwd=folder, check=True, timeout=120)
    said = subprocess.run([folder / "say"], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in map(str.split, said.splitlines())}


def ours() -> dict[str, int]:
    """The first part of constants.py, which is the headers', as HEADERS says it."""
    tree = ast.parse((DSL / "constants.py").read_text().split("# Of this kernel alone")[0])
    names = [name.id for node in ast.walk(tree) if isinstance(node, ast.Name) for name in [node]]
    found: dict[str, int] = {}
    for name in dict.fromkeys(names):
        value = getattr(constants, name)
        found |= {f"{name}.{key}": at for key, at in value.items()} if isinstance(value, dict) else {name: value}
    # What the headers have as functions, or in a kernel.
    factor, polls = found.pop("ARRIVAL_FACTOR"), found.pop("FAST_POLLS")
    found["ARRIVAL_FACTOR_SHIFTED"] = (factor << constants.ARRIVAL_BITS) % 2**32
    code_at, rank_at = found.pop("MARK_CODE_AT"), found.pop("MARK_RANK_AT")
    found["MARK"] = constants.PEER_FAULT | constants.TWO_AT_ONCE << code_at | 5 << rank_at
    assert f"kFastPolls = {polls};" in (ROOT / "csrc/kernels/fault.cuh").read_text()
    return found


def test_constants_are_the_headers(headers: dict[str, int]) -> None:
    assert ours() == headers


def test_another_constant_is_seen(headers: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "CLAIMED_AT", 12)
    assert {name for name, value in ours().items() if headers[name] != value} == {"CLAIMED_AT"}


def test_a_row_lies_on_its_threads_once() -> None:
    """Every vector of a row of any length has one thread, and one column of it."""
    for vectors in range(1, constants.MOST_HIDDEN // 8 + 1):
        threads = constants.threads_for(vectors)
        assert threads % 32 == 0
        assert threads <= constants.MOST_THREADS
        places = [
            ((thread // 32) * constants.COLUMNS + column) * constants.GROUP + thread % 32
            for thread in range(threads)
            for column in range(constants.COLUMNS)
        ]
        assert sorted(places)[:vectors] == list(range(vectors))
        assert max(places) < constants.MOST_GROUPS * constants.GROUP


# ---- numerics


@pytest.mark.parametrize("file", [DSL / "numerics.py", ROOT / "tests/common/relu_squared.py"], ids=lambda f: f.name)
def test_nothing_in_the_numerics_could_be_contracted(file: Path) -> None:
    assert lint(file.read_text()) == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("y = a * b", "a * b: an operator computes"),
        ("y = [add(mul(a, b), c) for a in x] + [a - b]", "an operator computes"),
        ("y += a", "y += a: an operator computes"),
        ("y = f(-a)", "-a: an operator computes"),
        ("y = ieee.add(a, b)", "wanted rounding=NEAREST"),
        ("y = cute.math.mul(a, b, rounding=UP)", "wanted rounding=NEAREST"),
        ("y = ieee.rsqrt(a)", "not an operation of IEEE 754 with one rounding"),
        ("y = ieee.fma(a, b, c, rounding=NEAREST)", "not an operation of IEEE 754 with one rounding"),
        ("y = word << 16 & mask", ""),
        ("y = ieee.add(a, b, rounding=NEAREST)", ""),
    ],
)
def test_what_could_be_is_caught(line: str, said: str) -> None:
    found = lint(line)
    assert bool(found) == bool(said), found
    assert all(text.startswith("1: ") for text in found)
    assert any(said in text for text in found) == bool(said)


def test_the_kernel_computes_by_the_numerics_alone() -> None:
    """No arithmetic of the DSL's in the kernel itself: operators there are of integers."""
    for name in ("one_shot.py", "fault.py", "ring.py"):
        text = (DSL / name).read_text()
        assert not re.search(r"\b(ieee|math)\.", text), name
        floats = [line for line in text.splitlines() if "Float32" in line]
        allowed = ("import", "Epilogue =", "def rms_norm(", "hidden = Float32(vectors * Uint32(8))", "q = Float32(0.0)")
        assert [line for line in floats if not any(word in line for word in allowed)] == [], name


# ---- machine code


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, sass.Kernel]:
    """Every kernel, by its file's name."""
    folder = tmp_path_factory.mktemp("cubins")
    return kernels_in(folder)


def kernels_in(folder: Path, *options: str, root: Path = ROOT) -> dict[str, sass.Kernel]:
    try:
        files = dsl.build(folder, *options, root=root)
        found = {file.name: sass.disassemble(file) for file in files}
    except (dsl.NoDsl, sass.NoDisassembly) as why:
        pytest.skip(str(why))
    assert all(len(kernels) == 1 for kernels in found.values())
    return {name: kernels[0] for name, kernels in found.items()}


def twin_faults(kernel: sass.Kernel, ranks: int) -> list[str]:
    """As of the library's kernels, but that the report of a fault is a part of the body: its words, and no others, are
    stored one or two at a time. The record's sixteen, each rank's newest epoch, a mark in each peer's block."""
    wrong, words = [], 0
    for fault in sass.faults(kernel):
        stored = re.match(r"narrow: [0-9a-f]+ STG\.E(\.64)?\.STRONG\.SYS ", fault)
        if stored:
            words += 2 if stored[1] else 1
        else:
            wrong.append(fault)
    expected = 16 + ranks + ranks - 1
    return wrong + [f"report: {words} words, wanted {expected}"] * (words != expected)


def ranks_of(name: str) -> int:
    found = re.match(r"one_shot-r(\d)-", name)
    assert found
    return int(found[1])


def test_every_kernel_compiles(built: dict[str, sass.Kernel]) -> None:
    wanted = {
        cubins.file_name(ranks, architecture, "")
        for ranks in constants.WORLD_SIZES
        for architecture in constants.ARCHITECTURES.values()
    }
    assert {*built} == wanted


def test_machine_code(built: dict[str, sass.Kernel]) -> None:
    """Integer compares in the poll, no contraction, no flushing, no spills."""
    assert {name: found for name, kernel in built.items() if (found := twin_faults(kernel, ranks_of(name)))} == {}
    for name, kernel in built.items():
        assert len(sass.poll_loops(kernel)) == 1 + constants.COLUMNS, name  # for signatures, for each column's data
        assert sass.board_faults(kernel, 2) == [], name
        assert all(sass.timer_compares(kernel).values()), name


def test_the_same_bytes_again(built: dict[str, sass.Kernel], tmp_path: Path) -> None:
    """From another folder, too."""
    shutil.copytree(DSL, tmp_path / "mnnvl_ar" / "dsl")
    for out, root in ((tmp_path / "a", ROOT), (tmp_path / "b", tmp_path)):
        dsl.build(out, "--ranks", "4", root=root)
    names = sorted(path.name for path in (tmp_path / "a").glob("*.cubin"))
    assert len(names) == len(constants.ARCHITECTURES)
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# What is put into a copy of the sources, for how many ranks, and what of the machine code then says so.
WRONG = {
    "an operator in the numerics": (
        "numerics.py",
        "q = add(q, mul(value, value))",
        "q = q + value * value",
        2,
        {"fma"},
    ),
    "a compare of floats": (
        "one_shot.py",
        "there = v[0] != sentinel",
        "there = numerics.as_float(v[0]) > Float32(1.5)",
        2,
        {"compare", "float"},
    ),
    "half the registers, so that it spills": (
        "one_shot.py",
        "max_number_threads=(MOST_THREADS, 1, 1)",
        "max_number_threads=(2 * MOST_THREADS, 1, 1)",
        8,
        {"local"},
    ),
    "another word of the record": (
        "fault.py",
        "        ptx.fence_acq_rel_sys()\n        ptx.store_relaxed_sys_u32(record",
        "        ptx.store_relaxed_sys_u32(record + 200, code)\n        ptx.store_relaxed_sys_u32(record",
        2,
        {"report"},
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_fault_in_the_machine_code_is_found(what: str, tmp_path: Path) -> None:
    shutil.copytree(DSL, tmp_path / "mnnvl_ar" / "dsl")
    file, old, new, ranks, kinds = WRONG[what]
    text = (DSL / file).read_text()
    assert text.count(old) == 1
    (tmp_path / "mnnvl_ar" / "dsl" / file).write_text(text.replace(old, new))
    kernels = kernels_in(tmp_path / "out", "--ranks", str(ranks), root=tmp_path)
    found = {kernel.arch: {fault.split(":")[0] for fault in twin_faults(kernel, ranks)} for kernel in kernels.values()}
    assert found == {"sm_90a": kinds, "sm_100a": kinds}


def test_the_tutorials_epilogue(tmp_path: Path) -> None:
    """All of it is on the page (test_tutorials.py finds what is misquoted), and its machine code is sound."""
    page = Page((ROOT / "docs/tutorials/epilogue_in_python.md").read_text())
    file = "tests/common/relu_squared.py"
    code = (ROOT / file).read_text().split('"""\n', 1)[1].strip()
    assert code in [excerpt.text.strip() for excerpt in page.excerpts if excerpt.file == file]
    kernels = kernels_in(tmp_path, "--ranks", "2", "--archs", "sm_90a", "--epilogue", EPILOGUE)
    assert [fault for kernel in kernels.values() for fault in twin_faults(kernel, 2)] == []


# ---- what is public, what is refused


def test_the_library_never_imports_it() -> None:
    code = "import sys, mnnvl_ar; print([m for m in sys.modules if m.startswith(('cutlass', 'mnnvl_ar.dsl'))])"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert got.stdout.strip() == "[]"
    code = "import sys, mnnvl_ar.dsl.launch; print([m for m in sys.modules if m.startswith('cutlass')])"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert got.stdout.strip() == "[]"


def test_the_extra_pins_the_version() -> None:
    assert f'dsl = ["nvidia-cutlass-dsl=={constants.DSL}"]' in (ROOT / "pyproject.toml").read_text()


def test_the_launcher_gives_what_the_kernel_takes() -> None:
    tree = ast.parse((DSL / "one_shot.py").read_text())
    (kernel,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "one_shot")
    takes = {each.arg: ast.unparse(each.annotation) for each in kernel.args.args if each.annotation is not None}
    constant = {name for name, kind in takes.items() if kind == "Constexpr"}
    given = {**dict.fromkeys(launch.ADDRESSES, "Uint64"), **dict.fromkeys(launch.NUMBERS, "Uint32")}
    assert list(given.items()) == [(name, kind) for name, kind in takes.items() if name not in constant]
    assert [kind.__name__ for kind in launch.TYPES] == [
        {"Uint64": "c_ulong", "Uint32": "c_uint"}[kind] for kind in given.values()
    ]


@pytest.fixture
def group() -> Any:
    group = VirtualGroup(2, 64, 8192, torch.bfloat16, "cpu")
    yield group
    group.close()


def rows(tokens: int, hidden: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.ones(tokens, hidden, dtype=dtype)


def test_a_call_is_signed_as_the_library_signs_it(group: VirtualGroup) -> None:
    x, weight = rows(3, 64), torch.ones(64)
    told = named(ops_norm_call(), x, x, weight, 1e-5, None, None, group.handles[1], weight_bias=1.0, strategy=0, tag=2)
    assert (told["rank"], len(told["blocks"]), told["multicast"], told["weight_is_fp32"]) == (1, 2, 0, 1)
    assert told["blocks"] == [group.blocks[0].data_ptr(), group.blocks[1].data_ptr()]
    piece = dict(zip(launch.PIECE, told["pieces"], strict=True))

    def call(rank: int) -> None:
        ops.all_reduce_rms_norm(x, x, weight, 1e-5, group.handles[rank], weight_bias=1.0, strategy=0, tag=2)

    group.each(call)
    board = group.blocks[0].numpy().view("uint32")[constants.BOARD_OFFSET // 4 :]
    second = board[constants.ONE_BOARD_BYTES // 4 :]
    assert board[4:8].tolist() == [0, piece["call_tokens"], 0, piece["description"]]
    assert second[4:8].tolist() == [0, told["eps"], 0, told["weight_bias"]]


def ops_norm_call() -> Any:
    return torch.ops.mnnvl_ar._norm_call


def test_pieces_are_the_librarys() -> None:
    group = VirtualGroup(2, 64, 264, torch.bfloat16, "cpu", max_bytes=16384 + 3 * 8 * 528)
    x = rows(20, 264)
    told = named(ops_norm_call(), x, x, x[0].clone(), 1e-5, None, None, group.handles[0], strategy=0)["pieces"]
    pieces = [dict(zip(launch.PIECE, told[i : i + 7], strict=True)) for i in range(0, len(told), 7)]
    assert [(piece["first_token"], piece["tokens"]) for piece in pieces] == [(0, 7), (7, 7), (14, 6)]
    assert {piece["call_tokens"] for piece in pieces} == {20}
    assert len({piece["number"] for piece in pieces}) == 3
    assert named(ops_norm_call(), x[:0], x[:0], x[0].clone(), 1e-5, None, None, group.handles[0])["pieces"] == []
    group.close()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"x": rows(2, 64, torch.float16)}, "x: is torch.float16, the twin has torch.bfloat16 alone"),
        ({"x": rows(2, 8200)}, "x: rows of 8200 elements, the twin has rows of up to 8192"),
        ({"strategy": 1}, "strategy: this call goes by two-shot, the twin has one-shot alone"),
        ({}, "x: is on cpu, the twin runs on GPUs alone: sm_90a for compute capability 9.0, sm_100a for "),
    ],
)
def test_what_it_does_not_have_is_refused(group: VirtualGroup, given: dict[str, Any], said: str) -> None:
    given = {"strategy": 0, **given}
    x = given.pop("x", rows(2, 64))
    with pytest.raises(launch.TwinUnavailable, match=re.escape(said)):
        all_reduce_rms_norm(x, x, x[0].clone(), 1e-6, group.handles[0], **given)


def test_what_the_library_refuses_is_refused_in_its_words(group: VirtualGroup) -> None:
    x = rows(2, 64)
    with pytest.raises(RuntimeError, match=r"residual: has shape \[3, 64\], wanted \[2, 64\] like x"):
        all_reduce_rms_norm(x, rows(3, 64), x[0].clone(), 1e-6, group.handles[0])
    with pytest.raises(RuntimeError, match="norm_out: overlaps residual_out, wanted memory of its own"):
        all_reduce_rms_norm(x, x, x[0].clone(), 1e-6, group.handles[0], out=(rows(2, 64),) * 2)
    with pytest.raises(RuntimeError, match="workspace: handle 9999 is unknown"):
        all_reduce_rms_norm(x, x, x[0].clone(), 1e-6, 9999)


def test_another_number_of_ranks_is_refused() -> None:
    group, x = VirtualGroup(3, 4, 64, torch.bfloat16, "cpu"), rows(2, 64)
    with pytest.raises(launch.TwinUnavailable, match="workspace: has 3 ranks, the twin has kernels for 2, 4, 8"):
        all_reduce_rms_norm(x, x, x[0].clone(), 1e-6, group.handles[0], strategy=0)
    group.close()


def test_multicast_is_refused() -> None:
    """On the host a workspace says that it has multicast, and has not: enough for who only looks."""
    group, x = VirtualGroup(2, 4, 64, torch.bfloat16, "cpu", multicast="software"), rows(2, 64)
    said = "workspace: uses multicast, the twin has unicast alone; make it with transport='unicast'"
    with pytest.raises(launch.TwinUnavailable, match=said):
        all_reduce_rms_norm(x, x, x[0].clone(), 1e-6, group.handles[0], strategy=0)
    group.close()


@pytest.mark.parametrize("version", [None, "4.7.1"])
def test_no_dsl_or_another_version(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def metadata(_: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(importlib.metadata, "version", metadata)
    has = "is not installed" if version is None else "is 4.7.1"
    with pytest.raises(build.DslMissing, match=rf"nvidia-cutlass-dsl: {has}, wanted nvidia-cutlass-dsl==4.8.1"):
        build.compile_kernel(2, "sm_90a")


def test_kernels_that_there_are_not() -> None:
    with pytest.raises(ValueError, match="ranks: is 3, wanted one of 2, 4, 8"):
        build.compile_kernel(3, "sm_90a")
    with pytest.raises(ValueError, match="architecture: is 'sm_80', wanted one of sm_90a, sm_100a"):
        build.compile_kernel(2, "sm_80")


def test_neither_a_kernel_nor_the_dsl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What there is, and where, and how to get what there is not."""

    def missing(_: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(launch, "_architecture", lambda device: "sm_90a")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cubins, "FOLDER", tmp_path)
    monkeypatch.setattr(importlib.metadata, "version", missing)
    cubins.keep(cubins.Built(b"", "kernel"), 8, "sm_90a", "", tmp_path)
    said = (
        rf"no one_shot-r2-sm_90a.cubin of these sources in {re.escape(str(tmp_path))} "
        r"\(there: one_shot-r8-sm_90a.cubin\), and none can be compiled here: nvidia-cutlass-dsl: is not installed, "
        r"wanted nvidia-cutlass-dsl==4.8.1 .*python -m mnnvl_ar.dsl.build"
    )
    with pytest.raises(launch.TwinUnavailable, match=said):
        launch.load(0, 2)


@pytest.mark.parametrize(("capability", "fits"), [((9, 0), True), ((10, 0), True), ((8, 0), False), ((10, 3), False)])
def test_another_architecture(capability: tuple[int, int], fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    launch._architecture.cache_clear()
    try:
        if fits:
            assert launch._architecture(0) == constants.ARCHITECTURES[capability]
            return
        version = ".".join(map(str, capability))
        with pytest.raises(launch.TwinUnavailable, match=f"GPU of compute capability {version}, the twin has sm_90a"):
            launch._architecture(0)
    finally:
        launch._architecture.cache_clear()


def test_a_cubin_of_other_sources_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = cubins.Built(b"cubin", "name")
    cubins.keep(kept, 2, "sm_90a", "", tmp_path)
    assert cubins.find(2, "sm_90a", "", tmp_path) == kept
    assert cubins.find(4, "sm_90a", "", tmp_path) is None
    monkeypatch.setattr(constants, "DSL", "4.8.2")
    assert cubins.find(2, "sm_90a", "", tmp_path) is None


def test_an_epilogue_that_is_not_there() -> None:
    for name in ("no.such:thing", "nothing", "json"):
        with pytest.raises(ValueError, match=f"epilogue: is '{name}', wanted 'module:function'"):
            cubins.digest(name)
