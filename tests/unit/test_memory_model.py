"""What the kernels promise of memory and clock, in what nvcc makes of them; tests/common/sass.py says what is meant.

Each promise has its controls: headers with one thing changed, as an edit might bring it back. What is built is looked
at by tests/unit/test_sass.py; here some kernels are compiled, without a norm and with one, for what only PTX says:
ptxas makes the same machine code of two words of 64 bits as of four of 32, and only the former are promised whole.
"""

import re
import shutil
from pathlib import Path

import pytest

from common import sass

CSRC = sass.ROOT / "csrc"
ARCH = "sm_90a"
SOURCE = """
#include "epilogues/plain.h"
#include "epilogues/rms_norm.h"
#include "kernels/one_shot.cuh"
#include "kernels/two_shot.cuh"
namespace mnnvl_ar::kernels {
#define KERNEL(strategy, Rows, E) \\
  template __global__ void strategy<protocol::Bfloat16, 2, Rows, E>(const __grid_constant__ epilogues::CallOf<E>);
using Row = Tile<1, 1, true>;
KERNEL(one_shot, Tile<1>, epilogues::Plain)
KERNEL(one_shot, Row, epilogues::RmsNorm)
KERNEL(two_shot, Tile<2>, epilogues::RmsNorm)
}
"""
KERNELS = 3
Change = tuple[str, str, str]  # header of csrc/kernels, old text, new text


def made(out: Path, change: Change | None = None) -> Path:
    """The kernels, as a cubin or as PTX, with the headers as they are or with one changed."""
    csrc = CSRC
    if change is not None:
        header, old, new = change
        csrc = out.parent / "csrc"
        shutil.copytree(CSRC, csrc)
        text = (csrc / "kernels" / header).read_text()
        assert text.count(old) == 1, old
        (csrc / "kernels" / header).write_text(text.replace(old, new))
    source = out.with_suffix(".cu")
    source.write_text(SOURCE)
    try:
        sass.compile_by_nvcc(source, out, ARCH, csrc=csrc)
    except sass.NoDisassembly as reason:
        pytest.skip(str(reason))
    return out


def machine_code(folder: Path, change: Change | None = None) -> list[sass.Kernel]:
    cubin = made(folder / "kernels.cubin", change)
    try:
        found = sass.disassemble(cubin)
    except sass.NoDisassembly as reason:
        pytest.skip(str(reason))
    assert len(found) == KERNELS
    return found


def boards_of(name: str) -> int:
    return 2 if "RmsNorm" in name else 1


def faults(kernel: sass.Kernel) -> list[str]:
    return [
        *sass.library_faults(kernel),
        *sass.timer_faults(kernel),
        *sass.board_faults(kernel, boards_of(kernel.name)),
    ]


def kinds(kernels: list[sass.Kernel]) -> set[str]:
    return {fault.split(":")[0] for kernel in kernels for fault in faults(kernel)}


# ---- PTX

STRONG = re.compile(r"\b(ld|st)\.relaxed\.sys\.global\.(\S+)\s+([^;]+);")
COMPARED = re.compile(r"setp\.(?:eq|ne)\.s32\s+%p\d+, (%r\d+), -2147483648;")


def entries(text: str) -> dict[str, str]:
    """The kernels of a file of PTX, by name."""
    parts = re.split(r"^(?:\.visible )?\.(?=entry |func )", text, flags=re.MULTILINE)[1:]
    return {part.split("(")[0].split()[1]: part for part in parts if part.startswith("entry")}


def word_faults(name: str, text: str) -> list[str]:
    """Four words of 32 bits at once are data: each that is loaded is compared with the sentinel. Two of 64 bits are
    signatures: looked at once for each board at least, and stored for a lane's first peer and for its others. (What is
    stored cannot be told from data, so those are counted. Single words, of 32 bits, are marks.)"""
    compared = set(COMPARED.findall(text))
    wrong, halves = [], {"ld": 0, "st": 0}
    for way, size, operands in STRONG.findall(text):
        if size in ("v4.u32", "v4.f32"):  # of f32 where it goes to all at once
            words = re.findall(r"%r\d+", re.sub(r"\[.*?\]", "", operands))
            if way == "ld" and (len(words) != 4 or not {*words} <= compared):
                wrong.append(f"{way}.{size} {operands}")
        elif size == "v2.b64":
            halves[way] += 1
        elif size != "u32":
            wrong.append(f"{way}.{size} {operands}")
    boards = boards_of(name)
    if halves["ld"] < boards or halves["st"] != 2 * boards:
        wrong.append(f"{halves} of {boards} boards")
    return wrong


def of_ptx(folder: Path, change: Change | None = None) -> list[str]:
    found = entries(made(folder / "kernels.ptx", change).read_text())
    assert len(found) == KERNELS
    return [fault for name, text in found.items() for fault in word_faults(name, text)]


def test_signatures_are_two_words_of_64_bits(tmp_path: Path) -> None:
    assert of_ptx(tmp_path) == []


def test_what_is_compiled_here_is_as_what_is_built(tmp_path: Path) -> None:
    """Without this the controls would show nothing."""
    assert [fault for kernel in machine_code(tmp_path) for fault in faults(kernel)] == []


# ---- controls

LATE = "patience_ns >= static_cast<int64_t>(deadline_ns)"
HELD = "static_cast<int64_t>(ptx::global_timer_ns() - began_ns) < hold_ns"
WAITED = "static_cast<int64_t>(now_ns - began_ns)"


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (("ptx.cuh", '("ld.global.L1::no', '("ld.global.nc.L1::no'), "readonly"),
        (("ptx.cuh", "@wanted ld.global.L1::no", "@wanted ld.global.nc.L1::no"), "readonly"),
        (("fault.cuh", LATE, "static_cast<uint64_t>(patience_ns) >= deadline_ns"), "timer"),
        (("fault.cuh", LATE, "now_ns >= began_ns + deadline_ns"), "timer"),
        (("fault.cuh", WAITED, "static_cast<uint32_t>(now_ns - began_ns)"), "timer"),
        (("fault.cuh", HELD, "ptx::global_timer_ns() - began_ns < static_cast<uint64_t>(hold_ns)"), "timer"),
    ],
)
def test_a_change_is_found_in_the_machine_code(tmp_path: Path, change: Change, kind: str) -> None:
    assert kinds(machine_code(tmp_path, change)) == {kind}


FOUR = "ptx::{}_relaxed_sys(place"
TWO = "ptx::{}_halves_relaxed_sys(place"


@pytest.mark.parametrize("end", [")", " + protocol"])
def test_a_load_by_four_words_is_found(tmp_path: Path, end: str) -> None:
    assert of_ptx(tmp_path, ("entry_warp.cuh", TWO.format("load") + end, FOUR.format("load") + end)) != []


@pytest.mark.parametrize("end", [", ", " + protocol"])
def test_a_store_by_four_words_is_found(tmp_path: Path, end: str) -> None:
    assert of_ptx(tmp_path, ("exit_warp.cuh", TWO.format("store") + end, FOUR.format("store") + end)) != []


@pytest.mark.parametrize("way", ["ld", "st"])
def test_halves_that_are_not_strong_are_found(tmp_path: Path, way: str) -> None:
    assert of_ptx(tmp_path, ("ptx.cuh", f"{way}.relaxed.sys.global.v2.b64", f"{way}.global.v2.b64")) != []


@pytest.mark.parametrize("board", ["place", "place + protocol::kOneBoardBytes"])
def test_a_look_by_narrower_words_is_found(tmp_path: Path, board: str) -> None:
    words = ", ".join(f"ptx::load_relaxed_sys_u32({board} + {4 * i})" for i in range(4))
    change = ("entry_warp.cuh", f"ptx::load_halves_relaxed_sys({board})", f"protocol::Vector{{{{{words}}}}}")
    assert "board" in kinds(machine_code(tmp_path, change))
