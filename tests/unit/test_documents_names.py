"""What documents name is there: tests, the texts of messages that operations.md has people grep for, and the guards of
the protocol."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
CODE = re.compile(r"`([^`\n]+)`")
TEST = re.compile(r"(?:tests/)?((?:\w+/)*test_\w+\.py)(?:::(\w+))?")
# What differs from message to message, in the texts that operations.md has: ranks, numbers, names, what is left out.
VARIES = re.compile(r"(?:\bthe process of |, and )?\brank (?:\d+|r\b)|\d[\d.]*|\b[nrsXY]\b|'\w*'|\.\.\.|[()]|^weight\b")


def missing_tests(text: str, files: dict[str, str]) -> list[str]:
    """files: content of each by its path below tests/."""
    missing = []
    for code in CODE.findall(text):
        for name, function in TEST.findall(code):
            found = [content for path, content in files.items() if f"/{path}".endswith(f"/{name}")]
            if not any(not function or re.search(rf"^ *(?:async )?def {function}\b", each, re.M) for each in found):
                missing.append(code)
    return missing


def never_said(page: str, sources: str) -> list[str]:
    """Of the table of messages: texts of which a part that does not vary stands nowhere in the sources."""
    table = re.search(r"^\| grep for \|.*?(?=\n\n)", page, re.M | re.S)
    assert table is not None
    texts = [text for row in table[0].splitlines()[2:] for text in CODE.findall(row.split(" | ")[0])]
    literals = re.sub(r'"\s*f?"', "", sources)  # some go on in the next line
    return [text for text in texts if any(part not in literals for part in fixed_parts(text))]


def fixed_parts(text: str) -> list[str]:
    return [part for each in VARIES.split(text) if len(part := each.strip()) > 3]


def sources() -> str:
    kinds = (".py", ".h", ".cpp", ".cuh", ".cu")
    files = [path for name in ("csrc", "mnnvl_ar") for path in (ROOT / name).rglob("*") if path.suffix in kinds]
    return "\n".join(path.read_text() for path in sorted(files))


def guards(page: str) -> list[str]:
    """Of the table of rules, the third column."""
    table = re.search(r"^\| rule \| guard.*?(?=\n\n)", page, re.M | re.S)
    assert table is not None
    return CODE.findall(" ".join(row.split("|")[2] for row in table[0].splitlines()))


def test_tests_are_there() -> None:
    files = {str(path.relative_to(ROOT / "tests")): path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    pages = [*ROOT.glob("*.md"), *(ROOT / "bench").rglob("*.md"), *(ROOT / "model").glob("*.md")]
    pages += [page for page in (ROOT / "docs").rglob("*.md") if page.parent.name not in ("log", "decisions")]
    assert {page.name: found for page in pages if (found := missing_tests(page.read_text(), files))} == {}


def test_messages_are_said() -> None:
    assert never_said((ROOT / "docs" / "operations.md").read_text(), sources()) == []


def test_every_guard_is_in_the_protocols_table() -> None:
    header = (ROOT / "csrc" / "protocol" / "sabotage.h").read_text()
    body = re.search(r"enum class Rule[^{]*{(.*?)}", header, re.S)
    assert body is not None
    rules = re.findall(r"^ *(\w+) = \d+,", body[1], re.M)
    named = guards((ROOT / "docs" / "protocol.md").read_text())
    assert len(rules) > 15
    assert sorted(rules) == sorted(name for name in named if name != "Rule")


# ---- controls


def test_what_is_not_there_is_found() -> None:
    files = {"host/test_a.py": "def test_b() -> None: ...", "gpu/test_c.py": ""}
    text = "`host/test_a.py::test_b`, `test_a.py` and `tests/gpu/test_c.py::test_b` or `ranks/test_a.py::test_b[x]`"
    assert missing_tests(text, files) == ["tests/gpu/test_c.py::test_b", "ranks/test_a.py::test_b[x]"]


def test_a_message_that_nobody_says_is_found() -> None:
    page = "| grep for | means |\n|---|---|\n| `waited 2.00 s for rank 3 in`; `need a slot of` | `not this` |\n\n"
    assert never_said(page, 'f"waited {s} s "\n    f"for {name} in"\n"needs a slot of"') == ["need a slot of"]
