"""The table of fault codes in docs/operations.md says what the source does: numbers, names, classes, places."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mnnvl_ar import diagnosis

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/operations.md").read_text()
ROW = re.compile(r"^\| (\d+) \| `(\w+)` \| (.+?) \| (.+?) \|$", re.MULTILINE)
CODE = re.compile(r"^  (\w+) = (\d+),", re.MULTILINE)


def wrong(page: str) -> list[str]:
    enum = (ROOT / "csrc/protocol/fault.h").read_text().split("enum class FaultCode", 1)[1].split("};")[0]
    codes = {int(number): name for name, number in CODE.findall(enum) if name != "none"}
    rows = {int(number): (name, raised, places) for number, name, raised, places in ROW.findall(page)}
    found = [f"{n} {name} is not in the table" for n, name in codes.items() if rows.get(n, ("",))[0] != name]
    found += [f"{n} is no code" for n in rows if n not in codes]
    for number, (name, raised, places) in rows.items():
        kind = diagnosis.Fault(number, False, 0, 1, 0, "", "", 0.0, 0.0, 0, "").error()
        if number != diagnosis.PEER_FAULT and raised != f"`{type(kind).__name__}`":
            found.append(f"{number} is raised as {type(kind).__name__}, not as {raised}")
        for place in re.findall(r"`(csrc/[^`]+)`", places):
            if f"FaultCode::{name}" not in (ROOT / place).read_text():
                found.append(f"{number} is not reported in {place}")
    return found


def test_the_table() -> None:
    assert wrong(PAGE) == []
    assert len(ROW.findall(PAGE)) == diagnosis.ASLEEP


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("| 4 | `overlap`", "| 4 | `overlaps`", ["4 overlap is not in the table"]),
        ("| `PeerTimeout` | `csrc", "| `PeerGone` | `csrc", ["1 is raised as PeerTimeout, not as `PeerGone`"]),
        ("`csrc/kernels/refuse.cuh`", "`csrc/kernels/root.cuh`", ["6 is not reported in csrc/kernels/root.cuh"]),
        ("| 11 | `asleep`", "| 12 | `asleep`", ["11 asleep is not in the table", "12 is no code"]),
    ],
)
def test_a_row_that_is_wrong_is_found(old: str, new: str, says: list[str]) -> None:
    broken = PAGE.replace(old, new)
    assert broken != PAGE
    found = wrong(broken)
    assert [line for line in says if line not in found] == []
