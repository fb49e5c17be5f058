"""The documents: what they link to is there, the log's index names every file of the log, README is short, and so are
lines of prose."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
LINK = re.compile(r"\]\(([^)]+)\)")
LONGEST_LINE, MOST_WORDS = 120, 600


def documents(root: Path) -> list[Path]:
    return [*root.glob("*.md"), *(path for name in ("docs", "model", "bench") for path in (root / name).rglob("*.md"))]


def anchors(text: str) -> set[str]:
    """Of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document: Path) -> list[str]:
    """Links to files or headings that are not there. Links to the web are not followed."""
    broken = []
    for link in LINK.findall(
        re.sub(r"^```.*?^```|`[^`\n]+`", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    ):
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        if "://" not in link and not (target.exists() and (not anchor or anchor in anchors(target.read_text()))):
            broken.append(f"{document.name}: {link}")
    return broken


def unlisted(index: Path) -> set[str]:
    """Files beside an index that it has no link to."""
    return {path.name for path in index.parent.glob("*.md")} - {index.name, *LINK.findall(index.read_text())}


def long_lines(document: Path) -> list[str]:
    """The beginnings of lines of prose that are too long."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    prose = [line for line in text.split("\n") if not re.match(r" *\||    \S|!\[", line)]
    return [f"{document.name}: {line[:60]}" for line in prose if len(line) > LONGEST_LINE]


def words(text: str) -> int:
    """As `wc -w` counts them, tables and code included."""
    return len(text.split())


def test_links_lead_somewhere() -> None:
    assert [broken for path in documents(ROOT) for broken in broken_links(path)] == []


def test_the_index_of_the_log_is_complete() -> None:
    assert unlisted(ROOT / "docs/log/README.md") == set()


def test_lines_of_prose_are_not_long() -> None:
    assert [line for document in documents(ROOT) for line in long_lines(document)] == []


def test_readme_is_short() -> None:
    assert words((ROOT / "README.md").read_text()) < MOST_WORDS


# ---- controls


def test_what_is_not_there_is_found(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# B, and `c`\n")
    page = tmp_path / "a.md"
    page.write_text("[b](b.md) [b](b.md#b-and-c) [d](d.md) [b](b.md#d) [web](https://a/b)\n```\nx[0](e.md)\n```\n")
    assert broken_links(page) == ["a.md: d.md", "a.md: b.md#d"]
    assert unlisted(page) == set()
    page.write_text("")
    assert unlisted(page) == {"b.md"}


def test_what_is_long_is_found(tmp_path: Path) -> None:
    page, long = tmp_path / "a.md", "b" * (LONGEST_LINE + 1)
    page.write_text(f"{long}\n\n| {long} |\n\n```\n{long}\n```\n\n    {long}\n\n* {long}\n{long[1:]}\n")
    assert long_lines(page) == [f"a.md: {long[:60]}", f"a.md: * {long[:58]}"]
    assert words("| a | b |\n`c d`") == 7
