"""The tutorials: their code runs as it is written, and shows what the page shows; what they quote and name is there."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

import mnnvl_ar
from common.pages import ROOT, Code, Page, misquoted, settled
from mnnvl_ar.compat import flashinfer

FOLDER = ROOT / "docs/tutorials"
PAGES = {path.stem: Page(path.read_text()) for path in sorted(FOLDER.glob("*.md"))}
SERVERS = ("vllm", "sglang")
# Where what a page names of a server would have to be, if it exists: as the releases have it, and as we use it.
KNOWN = ("tools/contracts/*.json", "tests/servers/*_server.py", "mnnvl_ar/compat/servers.py")


def ran_by(name: str) -> object:
    marks = [pytest.mark.gpu(2)] if PAGES[name].needs_gpus else []
    if name in SERVERS:
        here = importlib.util.find_spec(name) is not None
        marks.append(pytest.mark.skipif(here, reason=f"shows a machine without {name}"))
    if name == "torch_compile":
        marks.append(pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"))
    return pytest.param(name, marks=marks)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [ran_by(name) for name, page in PAGES.items() if page.commands])
def test_it_runs_as_written(name: str, tmp_path: Path) -> None:
    assert PAGES[name].wrong(tmp_path) == []


@pytest.mark.parametrize("name", PAGES)
def test_all_code_is_run_or_quoted(name: str) -> None:
    page = PAGES[name]
    assert page.unnamed == []
    for program in page.programs:
        compile(program.text, program.file, "exec")
        assert any(program.file in command.split() for command, _ in page.commands), program.file
    assert [wrong for excerpt in page.excerpts for wrong in misquoted(excerpt)] == []
    assert page.programs or page.excerpts or page.commands


def test_the_epilogue_goes_through_the_files_of_contributing() -> None:
    listed = (ROOT / "CONTRIBUTING.md").read_text().split("### A new epilogue\n", 1)[1].split("\n## ", 1)[0]
    steps = re.findall(r"^\d\. (.*(?:\n   .*)*)", listed, re.MULTILINE)
    text = (FOLDER / "epilogue.md").read_text()
    parts = re.split(r"^## \d\. ", text, flags=re.MULTILINE)[1:]
    assert len(parts) == len(steps) == 8
    for step, part in zip(steps, parts, strict=True):
        files = [name.replace("NAME", "static_fp8") for name in re.findall(r"`([\w/]+(?:\.\w+|/))`", step)]
        assert files
        assert [name for name in files if name.rsplit("/", 1)[-1] not in part and name not in part] == []


@pytest.mark.parametrize("server", SERVERS)
def test_names_of_a_server_exist(server: str) -> None:
    assert unknown_names((FOLDER / f"{server}.md").read_text()) == []


def unknown_names(text: str) -> list[str]:
    """Variables and options in `text` that neither we nor the servers have."""
    known = (ROOT / "tests/unit/public.txt").read_text()
    known += "".join(path.read_text() for pattern in KNOWN for path in ROOT.glob(pattern))
    words = set(re.findall(r"\w+", known))
    of_servers = re.findall(r"^(?=.*(?:vllm serve|launch_server)).*(?:\n  .*)*", text, re.MULTILINE)
    options = re.findall(r"(?<!\S)--([a-z-]+)", " ".join([*of_servers, *re.findall(r"`(--[a-z-]+)`", text)]))
    names = [*re.findall(r"\b(?:MNNVL_AR|VLLM|SGLANG)(?:_[A-Z]+)*\b", text), *options]
    return sorted({name for name in names if name.replace("-", "_") not in words})


@pytest.mark.parametrize("server", SERVERS)
def test_the_line_of_the_log_is_ours(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer, "_their_version", lambda: "")
    shown = [text.strip() for language, text in PAGES[server].blocks if language == "text"]
    assert shown == [flashinfer.described().replace("+host", "").strip()]
    assert mnnvl_ar.__version__.removesuffix("+host") in shown[0]


# ---- controls

SUM = "```python\n# sum.py\nprint(1 + 1)\n```\n```console\n$ python sum.py\n2\n```\n"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("2\n```", "3\n```", "2\nexit status 0; shown:\n3\n"),  # the output
        ("1 + 1", "1 + 2", "3\nexit status 0; shown:\n2\n"),  # the code
        ("print(", "import sys; sys.exit(", "exit status 2; shown:\n2\n"),
        ("2\n```", "2\n$ echo a\nb\n```", "$ echo a\na\nexit status 0; shown:\nb\n"),
    ],
)
def test_what_does_not_run_so_is_found(tmp_path: Path, old: str, new: str, says: str) -> None:
    (tmp_path / "good").mkdir()
    assert Page(SUM).wrong(tmp_path / "good") == []
    (tmp_path / "bad").mkdir()
    (wrong,) = Page(SUM.replace(old, new)).wrong(tmp_path / "bad")
    assert wrong.endswith(says)


def test_a_tutorial_that_says_too_much_is_found(tmp_path: Path) -> None:
    """A real page, with a reference that has another eps."""
    text = (FOLDER / "first_call.md").read_text()
    broken = text.replace("residual, weight, EPS)", "residual, weight, 1.0)")
    assert broken != text
    (wrong,) = Page(broken).wrong(tmp_path)
    assert "rank 0 of 2: [4, 64], WRONG" in wrong


def test_only_what_may_differ_does() -> None:
    text = "a.cpp:30, waited 5.00 s, 2026-11-29 21:42:47 on rank 0 \n"
    assert settled(text) == settled("a.cpp:7, waited 12.25 s, 2027-01-02 03:04:05 on rank 0")
    assert settled(text) != settled(text.replace("rank 0", "rank 1"))
    assert settled(text) != settled(text.replace("a.cpp", "b.cpp"))


def test_code_without_a_file_is_found() -> None:
    assert Page("```python\nprint(1)\n```\n").unnamed == ["print(1)"]
    assert Page(SUM).unnamed == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("two\nthree\n", []),
        ("one\n...\nthree\n", []),
        ("  ...\nthree\n", []),
        ("three\n...\none\n", ["a.h: one\n"]),
        ("one\nthree\n", ["a.h: one\nthree\n"]),
        ("wo\n", ["a.h: wo\n"]),
    ],
)
def test_what_is_not_in_the_file_is_found(tmp_path: Path, text: str, wrong: list[str]) -> None:
    (tmp_path / "a.h").write_text("one\ntwo\nthree\n")
    assert misquoted(Code("a.h", text, False), tmp_path) == wrong
    assert misquoted(Code("b.h", text, False), tmp_path) == ["b.h: is not there"]


def test_a_name_that_is_not_there_is_found() -> None:
    text = "`MNNVL_AR_DEADLIN` `--watchdog-timeouts` VLLM_PLUGIN\n"
    text += "```sh\nvllm serve --tensor-parallel-sized 2 \\\n  --badly 1\n"
    assert unknown_names(text) == [
        "MNNVL_AR_DEADLIN", "VLLM_PLUGIN", "badly", "tensor-parallel-sized", "watchdog-timeouts"
    ]  # fmt: skip
