"""docs/decisions: one file a decision, and an index that holds them all. (test_documents.py has the links.)"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
HEADINGS = ["Context", "Decision", "Consequence", "Status"]
NUMBERS = r"((?:\[\d+\]\([^)]+\)(?:, )?)+)"
STATUS = re.compile(
    rf"(Accepted(?:; amended by {NUMBERS})?|Superseded by {NUMBERS})\.(?: (Amends|Supersedes) {NUMBERS}\.)?\Z"
)
ROW = re.compile(r"^\| \[(\d+)\]\(([^)]+)\) \| (.+) \| (.+) \|$", re.MULTILINE)
REFERENCE = re.compile(r"\bdecisions? (\d+)\b")  # in code and documents
LONGEST_LINE = 120


class Decision:
    def __init__(self, path: Path) -> None:
        self.path, self.text = path, path.read_text()
        heading = re.match(r"# (\d+)\. (.+)\n", self.text)
        self.number, self.title = (int(heading[1]), heading[2]) if heading else (0, "")
        self.status = " ".join(self.text.partition("\n## Status\n")[2].split())
        found = STATUS.match(self.status)
        self.outcome, self.amended_by, self.superseded_by, self.verb, others = found.groups() if found else ("",) * 5
        self.others = numbers(others)

    def as_in_index(self) -> tuple[str, str, str, str]:
        plain = re.sub(r"\[(\d+)\]\([^)]+\)", r"\1", self.outcome)
        return str(self.number), self.path.name, self.title, plain[:1].lower() + plain[1:]


def numbers(links: str | None) -> set[int]:
    return {int(number) for number in re.findall(r"\[(\d+)\]", links or "")}


def problems(folder: Path) -> Iterator[str]:
    """What is wrong with a folder of decisions and its README.md, as "file: what"."""
    index = folder / "README.md"
    decisions = [Decision(path) for path in sorted(folder.glob("*.md")) if path != index]
    by_number = {decision.number: decision for decision in decisions}
    if [decision.number for decision in decisions] != list(range(1, len(decisions) + 1)):
        yield "numbers are not 1, 2, 3, ..."
    for one in decisions:
        name = one.path.name
        if not re.fullmatch(rf"{one.number:04}-[a-z0-9-]+\.md", name):
            yield f"{name}: has number {one.number}"
        if re.findall(r"^#{2,} (.+)$", one.text, re.MULTILINE) != HEADINGS:
            yield f"{name}: headings are not {', '.join(HEADINGS)}"
        if any(not part.strip() for part in re.split(r"^## .+$", one.text, flags=re.MULTILINE)):
            yield f"{name}: a part is empty"
        if not one.outcome:
            yield f"{name}: status is {one.status!r}"
        pairs = {("Amends", number) for number in numbers(one.amended_by)}
        pairs |= {("Supersedes", number) for number in numbers(one.superseded_by)}
        for verb, number in pairs:
            other = by_number.get(number)
            if other is None or other.verb != verb or one.number not in other.others:
                yield f"{name}: {number} does not say that it {verb.lower()} it"
        for number in one.others:
            other = by_number.get(number)
            said = "" if other is None else other.amended_by if one.verb == "Amends" else other.superseded_by
            if one.number not in numbers(said):
                yield f"{name}: {number} does not say so"
        for number, target in re.findall(r"\[(\d+)\]\(([^)]+)\)", one.text):
            if not target.startswith(f"{int(number):04}-"):
                yield f"{name}: [{number}] leads to {target}"
        for number in re.findall(r"(?<!\])\((\d+)\)", one.text):
            yield f"{name}: ({number}) is no link"
    for path in (*(decision.path for decision in decisions), index):
        long = [line for line in path.read_text().splitlines() if len(line) > LONGEST_LINE]
        yield from (f"{path.name}: long line {line!r}" for line in long)
    rows = sorted(ROW.findall(index.read_text()))
    if rows != sorted(decision.as_in_index() for decision in decisions):
        yield "README.md: is not what the files say"


def unknown_references(root: Path, files: list[Path], last: int) -> list[str]:
    """Mentions of decisions that do not exist, as "file: number"."""
    return [
        f"{file.relative_to(root)}: {number}"
        for file in files
        for number in REFERENCE.findall(file.read_text())
        if not 1 <= int(number) <= last
    ]


def test_decisions_and_their_index_agree() -> None:
    assert list(problems(ROOT / "docs/decisions")) == []


def test_every_mention_of_a_decision_is_of_one_there_is() -> None:
    folders = [ROOT / name for name in ("csrc", "mnnvl_ar", "tests", "tools", "bench", "model", "docs")]
    suffixes = {".h", ".cuh", ".cpp", ".cu", ".py", ".md", ".pml"}
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in suffixes]
    files += [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    last = len(list((ROOT / "docs/decisions").glob("[0-9]*.md")))
    assert unknown_references(ROOT, files, last) == []
    assert not [path for path in files if "decisions" + ".md" in path.read_text()]  # where they were


# ---- controls

FIRST, SECOND = "0001-first.md", "0002-second.md"
GOOD = {
    FIRST: "# 1. One\n\n## Context\na\n\n## Decision\nb\n\n## Consequence\nc\n\n## Status\n"
    "Superseded by [2](0002-second.md).\n",
    SECOND: "# 2. Two\n\n## Context\na ([1](0001-first.md))\n\n## Decision\nb\n\n## Consequence\nc\n\n## Status\n"
    "Accepted. Supersedes [1](0001-first.md).\n",
    "README.md": "| [1](0001-first.md) | One | superseded by 2 |\n| [2](0002-second.md) | Two | accepted |\n",
}


def found_in(folder: Path, **changes: tuple[str, str]) -> list[str]:
    for name, text in GOOD.items():
        old, new = changes.get(name.split("-")[-1].removesuffix(".md"), ("", ""))
        assert old in text
        (folder / name).write_text(text.replace(old, new) if old else text)
    return list(problems(folder))


def test_good_ones_are_good(tmp_path: Path) -> None:
    assert found_in(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        ("README", "| [1](0001-first.md) | One | superseded by 2 |\n", "", "README.md: is not what the files say"),
        ("README", "| accepted", "| rejected", "README.md: is not what the files say"),
        ("README", "| Two", "| Too", "README.md: is not what the files say"),
        ("second", "# 2.", "# 3.", "numbers are not 1, 2, 3, ..."),
        ("second", "# 2.", "# 1.", f"{SECOND}: has number 1"),
        ("first", "## Context\na\n\n", "", f"{FIRST}: headings are not Context, Decision, Consequence, Status"),
        ("first", "\nc\n", "\n", f"{FIRST}: a part is empty"),
        ("second", "Accepted.", "Perhaps.", f"{SECOND}: status is 'Perhaps. Supersedes [1](0001-first.md).'"),
        ("first", "Superseded by [2](0002-second.md)", "Accepted", f"{SECOND}: 1 does not say so"),
        ("second", " Supersedes [1](0001-first.md).", "", f"{FIRST}: 2 does not say that it supersedes it"),
        ("second", "Supersedes", "Amends", f"{FIRST}: 2 does not say that it supersedes it"),
        ("second", "a ([1]", "a ([2]", f"{SECOND}: [2] leads to 0001-first.md"),
        ("second", "a ([1](0001-first.md))", "a (1)", f"{SECOND}: (1) is no link"),
        ("second", "\nb\n", f"\n{'b' * 121}\n", f"{SECOND}: long line '{'b' * 121}'"),
    ],
)
def test_what_is_wrong_is_found(tmp_path: Path, file: str, old: str, new: str, problem: str) -> None:
    assert problem in found_in(tmp_path, **{file: (old, new)})


def test_a_mention_of_one_that_is_not_there_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("as decision 2 says (decisions 3)")
    assert unknown_references(tmp_path, [tmp_path / "a.md"], last=2) == ["a.md: 3"]
