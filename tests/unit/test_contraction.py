"""No multiply-add of the host's arithmetic is fused: what setup.py compiles is disassembled, for x86-64 and aarch64.

aarch64 always has fused multiply-adds; for x86-64 the compiler is given them here (-march=haswell), so that it could.
The sources ask for one by name in csrc/protocol/numerics_root.h alone, which host code does not include: none at all
is right.

    python tests/unit/test_contraction.py LIBRARY      of a built one, for either machine; status 1 if any is fused

CUDA's static runtime, which is linked into the library, has some of its own.
"""

import platform
import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import Template

import pytest
from setuptools import Distribution, Extension

ROOT = Path(__file__).parent.parent.parent
LIBRARY = ROOT / "mnnvl_ar" / "_C.so"
FLAG = "-ffp-contract=off"
# fmadd, fmsub, fnmadd, fmla, ..., SVE's fmad, fmsb, ..., and x86's vfmadd132ss, vfmaddsub..., ...
FUSED = re.compile(r"v?fn?m(add?|sub|sb|la|ls)\w*")
FAST = re.compile(r"-Ofast|-f(fast|unsafe|associative)-math.*|--?use_fast_math")
PRODUCT = re.compile(r"v?mul[sp]s|fmul")
MACHINES = {"x86_64": ["-march=haswell"], "aarch64": []}
# Sums, norms and root, in all three dtypes. Quantised ops have the same norm, and no sum of products behind it.
SOURCE = "torch/ops/rms_norm"
NORMS = {f"RmsNorm, mnnvl_ar::protocol::{dtype}>::norm" for dtype in ("Bfloat16", "Float16", "Float32")}


# ---- what is wrong, given a tool's output


def wrong_flags(command: str) -> list[str]:
    """What in a compiler's command, nvcc's too, lets it fuse or reorder."""
    words = re.split(r"[\s,]+", command)
    wrong = [word for word in words if FAST.fullmatch(word)]
    said = [word for word in words if word.startswith("-ffp-contract")]
    return wrong if said[-1:] == [FLAG] else [*wrong, f"{said}, not {FLAG}"]


def functions_with(instruction: re.Pattern[str], listing: str) -> Counter[str]:
    """How many such instructions each function has, in what `objdump -d` says."""
    found: Counter[str] = Counter()
    name = ""
    for line in listing.splitlines():
        if head := re.fullmatch(r"[0-9a-f]+ <(.+)>:", line):
            name = head[1]
        elif (code := re.match(r"\s+[0-9a-f]+:\t(\S+)", line)) and instruction.fullmatch(code[1]):
            found[name] += 1
    return found


def norms_in(functions: Counter[str]) -> set[str]:
    return {norm for norm in NORMS if any(norm in name for name in functions)}


def fused_of_ours(listing: str) -> list[str]:
    return [name for name in functions_with(FUSED, listing) if not name.startswith("libcudart_static_")]


# ---- the tools


def triple(machine: str) -> str:
    return f"{machine.replace('_', '-')}-linux-gnu"


def disassembled(path: Path, machine: str) -> str:
    tool = "objdump" if machine == platform.machine() else f"{triple(machine)}-objdump"
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool} on this machine")
    command = [tool, "-d", "-C", "--no-show-raw-insn", str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Caught(Exception):
    pass


def commands(machine: str) -> dict[str, str]:
    """How setup.py would compile each source of the host; `{out}` is the object's place. "nvcc": what it tells that."""
    caught: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MNNVL_AR_SANITIZE", "MNNVL_AR_TEST_BUILD", "MNNVL_AR_BARE"):
            patch.delenv(name, raising=False)
        patch.setenv("SOURCE_DATE_EPOCH", "315532800")
        patch.setenv("MNNVL_AR_CUDA", "0")
        if machine != platform.machine():
            patch.setenv("CXX", f"{triple(machine)}-g++")
        patch.setattr(sys, "argv", ["setup.py", "--version"])
        patch.chdir(ROOT)
        setup = runpy.run_path("setup.py")
        caught["nvcc"] = setup["NVCC_FLAGS"]
        rule = re.search(r"rule cxx\n  command = (.*)\n", setup["RULES"])
        assert rule

        def run_ninja(variant: str, variables: dict[str, str], edges: list[str], target: Path) -> None:
            for edge in edges:
                if found := re.fullmatch(r"build \S+: cxx csrc/(\S+)\.cpp\n  flags = (.*)", edge):
                    values = {"cxx": variables["cxx"], "in": f"csrc/{found[1]}.cpp", "flags": found[2], "out": "{out}"}
                    caught[found[1]] = Template(rule[1]).substitute(values)
            raise Caught

        patch.setitem(setup["find_nvcc"].__globals__, "run_ninja", run_ninja)
        build = setup["BuildLibrary"](Distribution({"name": "x", "ext_modules": [Extension("mnnvl_ar._C", [])]}))
        with pytest.raises(Caught):
            build.run()
    return caught


def compiled(command: str, out: Path, machine: str) -> str:
    """The object's disassembly."""
    words = [*command.format(out=out).split(), *MACHINES[machine]]
    subprocess.run(words, cwd=ROOT, check=True)
    return disassembled(out, machine)


# ---- what is compiled


@pytest.fixture(scope="module", params=MACHINES)
def listings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Of SOURCE as it is compiled, and without the flag."""
    machine, folder = request.param, tmp_path_factory.mktemp(request.param)
    if machine != platform.machine() and shutil.which(f"{triple(machine)}-g++") is None:
        pytest.skip(f"no {triple(machine)}-g++: apt-get install g++-{triple(machine)}")
    command = commands(machine)[SOURCE]
    # Without a word GCC contracts all it can; clang only what is one expression.
    without = command.replace(FLAG, "-ffp-contract=fast" if "clang" in command else "")
    with ThreadPoolExecutor(2) as pool:
        ours, fusing = pool.map(compiled, (command, without), (folder / "a.o", folder / "b.o"), (machine, machine))
    return ours, fusing


def test_nothing_is_fused(listings: tuple[str, str]) -> None:
    assert functions_with(FUSED, listings[0]) == {}
    assert norms_in(functions_with(PRODUCT, listings[0])) == NORMS, "no arithmetic was looked at"


def test_without_the_flag_every_norm_is_fused(listings: tuple[str, str]) -> None:
    """The control: the code has what could be fused, and FUSED knows it."""
    assert norms_in(functions_with(FUSED, listings[1])) == NORMS


def test_every_source_is_compiled_so() -> None:
    how = commands(platform.machine())
    assert {SOURCE, "torch/ops/nvfp4", "launch/strategy", "diagnosis/text", "nvcc"} <= set(how)
    assert {source: wrong for source, command in how.items() if (wrong := wrong_flags(command))} == {}


@pytest.mark.parametrize("instead", ["", "-ffp-contract=fast", f"{FLAG} -ffp-contract=on", f"{FLAG} -ffast-math"])
def test_a_flag_that_fuses_is_found(instead: str) -> None:
    for command in (f"g++ -O3 {FLAG} -c a.cpp", f"nvcc -Xcompiler -fPIC,{FLAG},-Wall a.cu"):
        assert wrong_flags(command) == []
        assert len(wrong_flags(command.replace(FLAG, instead.replace(" ", ",")))) == 1


# ---- what was built


def test_the_library_as_built() -> None:
    """For plain x86-64 it could not be otherwise; for aarch64 it could (tests/qemu.sh), or by a CXX with -march."""
    assert LIBRARY.exists(), "not built; run `make build`"
    assert fused_of_ours(disassembled(LIBRARY, platform.machine())) == []


@pytest.mark.parametrize(
    "code", ["fmadd\ts0, s1, s2, s3", "fmls\tv0.4s, v1.4s, v2.4s", "vfnmadd231ss %xmm0,%xmm1,%xmm2"]
)
def test_a_library_that_fuses_is_found(code: str) -> None:
    theirs = f"0000 <libcudart_static_2b62e2>:\n    62498:\t{code}\n"
    good = f"{theirs}\n0010 <ours(int)>:\n    10:\tfmul\ts0, s1, s2\n    14:\tfmax\ts0, s1, s2\n    18:\tvmulss %xmm0\n"
    assert fused_of_ours(good) == []
    assert fused_of_ours(f"{good}    1c:\t{code}\n") == ["ours(int)"]


def main() -> None:
    (path,) = sys.argv[1:]
    machine = {62: "x86_64", 183: "aarch64"}[int.from_bytes(Path(path).read_bytes()[18:20], "little")]  # of ELF
    try:
        listing = disassembled(Path(path), machine)
    except pytest.skip.Exception as skipped:
        print(f"contraction: skipped: {skipped}")
        return
    fused, products = fused_of_ours(listing), functions_with(PRODUCT, listing)
    print(f"contraction: {machine}: {len(products)} functions with products, {len(fused)} with fused ones", *fused)
    sys.exit(bool(fused or not products))


if __name__ == "__main__":
    main()
