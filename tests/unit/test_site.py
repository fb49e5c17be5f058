"""The site, without its generator: every document is in a table of contents, every public name is on an API page, docs
that are text become what Sphinx reads. (`make site` builds it, and takes warnings for errors.)"""

from __future__ import annotations

import fnmatch
import importlib.util
import os
import re
from pathlib import Path
from types import ModuleType

import pytest

import mnnvl_ar

ROOT = Path(__file__).parent.parent.parent
TOCTREE = re.compile(r"^```\{toctree\}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ENTRY = re.compile(r"^\.\. (auto\w+|py:\w+):: (\S+)\n((?:   .*\n)*)", re.MULTILINE)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def conf(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr("sys.path", [])  # conf.py adds to it
    return load("conf")


docstrings = load("docstrings")


# ---- the table of contents


def pages_of(root: Path, patterns: list[str]) -> set[str]:
    """The documents that the site is made of, without their suffix."""
    files = []
    for place, folders, names in os.walk(root):  # which minds no folder that another test has just removed
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [(Path(place) / name).relative_to(root).as_posix() for name in names if name.endswith(".md")]
    flat = [pattern for pattern in patterns if "/" not in pattern]
    deep = [pattern for pattern in patterns if "/" in pattern]
    chosen = [
        file
        for file in files
        if any(fnmatch.fnmatch(file, pattern) for pattern in (deep if "/" in file else flat))
        and not any(part.startswith(".") for part in file.split("/"))
    ]
    return {file.removesuffix(".md") for file in chosen}


def listed(root: Path, indexed: tuple[str, ...]) -> list[str]:
    """What tables of contents name: in docs/index.md, and what is beside the indexes."""
    text = "".join(TOCTREE.findall((root / "docs/index.md").read_text()))
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(":")]
    names = [re.sub(r".*<(.*)>", r"\1", line) for line in lines]
    direct = [(root / "docs" / name).resolve().relative_to(root.resolve()).as_posix() for name in names]
    beside = [f"{folder}/{path.stem}" for folder in indexed for path in (root / folder).glob("[0-9]*.md")]
    return direct + beside


def out_of_place(root: Path, patterns: list[str], indexed: tuple[str, ...]) -> list[str]:
    """Documents that no table of contents has, that two have, or that are not there."""
    names, pages = listed(root, indexed), pages_of(root, patterns) - {"docs/index"}
    return sorted((pages ^ set(names)) | {name for name in names if names.count(name) > 1})


def test_every_document_is_in_a_table_of_contents(conf: ModuleType) -> None:
    assert out_of_place(ROOT, conf.include_patterns, conf.INDEXED) == []


def test_the_index_of_a_folder_is_its_readme(conf: ModuleType) -> None:
    for folder in conf.INDEXED:
        assert f"{folder}/README" in listed(ROOT, conf.INDEXED)
        source = ["text\n"]
        conf._add_subpages(None, f"{folder}/README", source)
        assert TOCTREE.search(source[0])
    untouched = ["text\n"]
    conf._add_subpages(None, "docs/protocol", untouched)
    assert untouched == ["text\n"]


# ---- the API pages


def entries(text: str) -> dict[str, str]:
    """What an API page describes: options by full name."""
    found = {}
    for kind, name, options in ENTRY.findall(text):
        module = re.search(r":module: (\S+)", options)
        if kind != "py:module":
            found[f"{module[1]}.{name}" if module else name] = options
    return found


def undescribed(names: set[str], described: dict[str, str]) -> list[str]:
    """Names that no entry describes, by itself or as a member that it shows: one with a docstring, unless all are."""
    missing = []
    for name in sorted(names - set(described)):
        owner, _, member = name.rpartition(".")
        options = described.get(owner, "")
        shown = ":members:" in options and (":undoc-members:" in options or documented(owner, member))
        missing += [] if shown else [name]
    return missing


def documented(owner: str, member: str) -> bool:
    thing: object = mnnvl_ar
    for part in owner.split(".")[1:]:
        thing = getattr(thing, part)
    return bool(getattr(thing, member).__doc__)


def api() -> str:
    return "".join(path.read_text() for path in sorted((ROOT / "docs/api").glob("*.md")))


def public() -> set[str]:
    return docstrings.public_names(ROOT / "tests/unit/public.txt")  # type: ignore[no-any-return]


def test_every_public_name_has_an_entry() -> None:
    assert len(public()) > 60
    assert undescribed(public(), entries(api())) == []


def test_every_op_and_variable_has_its_place() -> None:
    lines = (ROOT / "tests/unit/public.txt").read_text().splitlines()
    ops = {re.sub(r"\(.*", "", line.partition("::")[2]) for line in lines if line.startswith("torch.ops.")}
    assert {f"mnnvl_ar.ops.{op}" for op in ops} <= set(entries(api()))
    table = re.findall(r"^\| `(MNNVL_AR\w*)` \|", (ROOT / "docs/api/environment.md").read_text(), re.MULTILINE)
    assert sorted(table) == [line[1:] for line in lines if line.startswith("$")]


# ---- docstrings

PLAIN = """What it is: `x`, or `Known`.

x, y: of 2 ** 3 bytes
      and more
last: `Known`s
Errors: `ValueError`, wrapped
as here.
Then a sentence.

    example(x)
"""
RST = """What it is: ``x``, or :py:obj:`Known <a.Known>`.

``x``, ``y``
    of 2 \\*\\* 3 bytes and more

``last``
    :py:obj:`Known <a.Known>`\\ s

**Errors.** ``ValueError``, wrapped as here.

Then a sentence.

::

    example(x)
"""


def test_plain_text_as_restructuredtext() -> None:
    lines = docstrings.to_rst(PLAIN.splitlines(), {"Known": "a.Known"}.get)
    assert re.sub(r"\n\n+", "\n\n", "\n".join(lines)).rstrip() == RST.rstrip()


def test_names_link_to_what_is_nearest() -> None:
    convert = docstrings.converter({"mnnvl_ar.ops.f", "mnnvl_ar.f", "mnnvl_ar.C.f"})
    for where, wanted in (("mnnvl_ar.ops.g", "mnnvl_ar.ops.f"), ("mnnvl_ar.C.g", "mnnvl_ar.C.f")):
        lines = ["`f`, not `h`"]
        convert(None, "function", where, None, None, lines)
        assert lines[0] == f":py:obj:`f <{wanted}>`, not ``h``"


def test_members_have_the_comment_behind_them() -> None:
    lines = ["Kinds."]
    docstrings.converter(set())(None, "class", "a.GroupLayout", mnnvl_ar.scales.GroupLayout, None, lines)
    text = re.sub(r"\n\n+", "\n\n", "\n".join(lines))
    assert text.startswith("Kinds.\n\n``COLUMN_MAJOR``\n    strides (1, M)\n\n``TMA_ALIGNED``\n")
    assert "DEFAULT" not in text


# ---- controls


def tree(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / f"{name.replace('__', '/')}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("contents", "wrong"),
    [
        ("a\nB <b>\nlog/README", []),
        ("a\nlog/README", ["docs/b"]),
        ("a\nb\nc\nlog/README", ["docs/c"]),
        ("a\nb\nb\nlog/README", ["docs/b"]),
    ],
)
def test_a_document_out_of_place_is_found(tmp_path: Path, contents: str, wrong: list[str]) -> None:
    index = f"```{{toctree}}\n:hidden:\n\n{contents}\n```\n"
    root = tree(tmp_path, docs__index=index, docs__a="", docs__b="", docs__log__README="", docs__log__1="", other__c="")
    assert out_of_place(root, ["*.md", "docs/**.md"], ("docs/log",)) == wrong


def test_a_name_without_an_entry_is_found() -> None:
    text = api()
    for entry, missing in (
        (".. autofunction:: mnnvl_ar.scales.mxfp8\n", ["mnnvl_ar.scales.mxfp8"]),
        (
            ".. autoclass:: mnnvl_ar.Group\n   :members:\n   :undoc-members:\n",
            ["mnnvl_ar.Group", "mnnvl_ar.Group.all_gather", "mnnvl_ar.Group.rank", "mnnvl_ar.Group.size"],
        ),
    ):
        assert entry in text
        assert undescribed(public(), entries(text.replace(entry, ""))) == missing
    without = text.replace(":members:\n   :undoc-members:", ":members:")
    assert "mnnvl_ar.Group.rank" in undescribed(public(), entries(without))
