"""A picture that is drawn of figures shows those that were written down, where they belong."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
LOG = ROOT / "docs/log/2026-11-22-where-a-calls-time-goes.md"
PICTURE = ROOT / "docs/images/call_time.svg"
ZERO, SCALE = 293, 0.12  # of the picture: x of the stamp 0, and a clock's width
CLOCKS = 1980  # a microsecond's
NAMES = {  # in the picture, each with the words of the log's row that has its stamp
    "CTA launched": "CTA launched",
    "ready for the wait": "ready for the wait",
    "state handed on": "state handed on",
    "x there": "x there",
    "sent": "sent",
    "peer's row there": "peer's row there",
    "the same, latest warp": "latest warp",
    "squares summed": "squares summed",
    "over the warp": "over the warp",
    "sums of all groups there": "sums of all the row's groups there",
    "added up": "added up",
    "root": "root",
    "norm stored": "norm stored",
}


def stamps(log: str) -> dict[str, int]:
    """The column T=1 of the log's table: clocks by what was stamped."""
    found = {}
    for name, column in re.findall(r"^\| ([^|]+) \| ([^|]+) \|", log.split("## By leaving", 1)[0], re.MULTILINE):
        numbers = [int(number) for number in re.findall(r"-?\d+", column)]
        names = re.split("; |: mean; ", name) if len(numbers) > 1 else [name]
        found |= dict(zip(names, numbers, strict=False))
    return found


def wrong(picture: str, log: str) -> list[str]:
    """Stamps of the picture that are not the log's, or not where they belong; times that are not the stamps'."""
    known = stamps(log)
    shown = re.findall(r'<text class="stamp" x="([\d.]+)"[^>]*>(-?\d+): ([^<]+)<', picture)
    lines = {float(x) for x in re.findall(r'<line x1="([\d.]+)"', picture)}
    ends = {
        round(float(x) + float(width), 1)
        for x, width in re.findall(r'<rect x="([\d.]+)" y="\d+" width="([\d.]+)"', picture)
    }
    found = [f"{name}: is missing" for name in NAMES if name not in {name for _, _, name in shown}]
    for _, clocks, name in shown:
        place = round(ZERO + SCALE * int(clocks), 1)
        rows = [value for row, value in known.items() if name in NAMES and row.startswith(NAMES[name])]
        if rows != [int(clocks)] and name != "wait over":
            found.append(f"{name}: {clocks}, in the log {rows}")
        if place not in lines | ends:
            found.append(f"{name}: nothing at {place}")
    for x, width, text in re.findall(r'<rect x="([\d.]+)" [^>]*? width="([\d.]+)"[^>]*/>\n.*>([\d.]+) us<', picture):
        if abs(float(width) / SCALE / CLOCKS - float(text)) > 0.011:
            found.append(f"{text} us: at {x} it is {float(width) / SCALE / CLOCKS:.3f}")
    return found


def test_the_time_line_shows_the_stamps_of_the_log() -> None:
    picture = PICTURE.read_text()
    assert len(re.findall(r"> ?[\d.]+ us<", picture)) >= 4
    assert wrong(picture, LOG.read_text()) == []


def test_another_figure_is_found() -> None:
    picture, log = PICTURE.read_text(), LOG.read_text()
    assert wrong(picture.replace(">760: sent", ">770: sent"), log) == [
        "sent: 770, in the log [760]",
        "sent: nothing at 385.4",
    ]
    assert wrong(picture, log.replace("3560; 3740", "3560; 3840")) == ["norm stored: 3740, in the log [3840]"]
    assert wrong(picture.replace(">0.57 us", ">0.75 us"), log)[0].startswith("0.75 us: at ")
    assert wrong(picture.replace(": root<", ": rest<"), log)[0] == "root: is missing"
