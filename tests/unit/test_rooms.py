"""The rooms of the code: what each may include or import, and which files a new epilogue touches, as CONTRIBUTING.md
says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
INCLUDE = re.compile(r'^\s*#include [<"]([^>"]+)[>"]', re.MULTILINE)
MOST_FILES = 8  # that a new epilogue touches, beside those that say so in words


def rooms_of(text: str) -> dict[str, str]:
    """By room of csrc, the last column of CONTRIBUTING's table: what it may include."""
    return dict(re.findall(r"^\| `csrc/([\w/]+)` \|[^|]+\| ([^|]+) \|$", text, re.MULTILINE))


def wrong_includes(csrc: Path, rooms: dict[str, str]) -> list[str]:
    """Includes that the table does not allow, as "file: what"."""
    wrong = []
    for file in sorted(path for path in csrc.rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")):
        room = str(file.parent.relative_to(csrc))
        may = rooms[room]
        for name in INCLUDE.findall(file.read_text()):
            other = str(Path(name).parent)
            if other in rooms:
                ok = other == room or may.startswith("all of these") or f"`{other}`" in may
            elif name.startswith(("torch/csrc/", "torch/headeronly/")):
                ok = "LibTorch" in may
            elif name in ("cuda_bf16.h", "cuda_fp16.h"):
                ok = room == "protocol"  # for the device's conversions
            elif name.startswith("cuda"):
                ok = "CUDA" in may or may.startswith("all of these")
            else:
                ok = "/" not in name or name.startswith("sys/")
            wrong += [] if ok else [f"{room}/{file.name}: {name}"]
    return wrong


def rows_of(text: str) -> list[list[str]]:
    """The package's modules by row of CONTRIBUTING's list, from the top."""
    listed = re.search(r"each row may import the rows below it.*?```\n(.*?)```", text, re.DOTALL)
    assert listed is not None
    return [row.split() for row in listed[1].splitlines()]


def imports_of(file: Path, package: Path) -> set[str]:
    """The modules of the package, and their rooms, that a file imports; "workspace" for the package itself."""
    here = file.relative_to(package.parent).parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) - node.level]] if node.level else []
            base += (node.module or "").split(".") if node.module else []
            names = [[*base, alias.name] for alias in node.names]
        for name in names:
            if name[0] == package.name:
                inside = len(name) > 1 and ((package / name[1]).is_dir() or (package / f"{name[1]}.py").exists())
                found.add(name[1] if inside else "workspace")
    return found


def wrong_imports(package: Path, rows: list[list[str]]) -> list[str]:
    """Imports that CONTRIBUTING's rows do not allow, and modules that are in none, as "module: what"."""
    row_of = {module: row for row, modules in enumerate(rows) for module in modules}
    wrong = []
    for file in sorted([*package.rglob("*.py"), *(package.parent / f"{package.name}_plugins").rglob("*.py")]):
        first, *rest = file.relative_to(package.parent).with_suffix("").parts
        room = rest[0] if first == package.name else first
        if file == package / "__init__.py":
            continue
        if room not in row_of:
            wrong.append(f"{room}: in no row")
            continue
        others = imports_of(file, package) - {room}
        wrong += [f"{room}: {other}" for other in sorted(others) if row_of.get(other, -1) <= row_of[room]]
    return wrong


def rooms_of_setup() -> dict[str, str | None]:
    """ROOMS, as setup.py has it. It is not run: in a process that has loaded pip, setuptools cannot be."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    (value,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ROOMS"
    )
    return dict(ast.literal_eval(value))


def files_of_an_epilogue(text: str) -> list[str]:
    """The numbered ones, each of which is one file."""
    return re.findall(r"^\d+\. `([^`]+)`", part_of_an_epilogue(text), re.MULTILINE)


def words_of_an_epilogue(text: str) -> list[str]:
    lines = re.findall(r"^\* (`.*)$", part_of_an_epilogue(text), re.MULTILINE)
    return [path for line in lines for path in re.findall(r"`([^`]+)`", line)]


def part_of_an_epilogue(text: str) -> str:
    return text.split("### A new epilogue", 1)[1].split("\n#", 1)[0]


def files_that_name(root: Path, words: tuple[str, ...]) -> set[str]:
    """Sources of the library, and of the cases that all transports run, that mention an epilogue."""
    folders = ("csrc", "mnnvl_ar", "tests/common")
    files = [path for folder in folders for path in (root / folder).rglob("*") if path.suffix in SOURCES]
    return {str(f.relative_to(root)) for f in files if any(word in f.read_text() for word in words)}


SOURCES = (".h", ".cuh", ".cpp", ".cu", ".py")


@pytest.fixture(scope="module")
def text() -> str:
    return CONTRIBUTING.read_text()


def test_the_table_names_every_room(text: str) -> None:
    assert set(rooms_of(text)) == set(rooms_of_setup())
    assert all((ROOT / "csrc" / room).is_dir() for room in rooms_of(text))


def test_rooms_include_what_they_may(text: str) -> None:
    assert wrong_includes(ROOT / "csrc", rooms_of(text)) == []


def test_modules_import_what_lies_below_them(text: str) -> None:
    assert wrong_imports(ROOT / "mnnvl_ar", rows_of(text)) == []


def test_the_picture_shows_every_room(text: str) -> None:
    shown = (ROOT / "docs/images/rooms.svg").read_text()
    names = [*rooms_of(text), *(module for row in rows_of(text) for module in row)]
    assert [name for name in names if not re.search(rf">(?:[^<]*[ ,])?{re.escape(name)}[,:<]", shown)] == []


def test_a_new_epilogue_touches_few_files(text: str) -> None:
    listed = files_of_an_epilogue(text)
    assert 0 < len(listed) <= MOST_FILES
    for name in ("rms_norm", "plain"):
        missing = [path.replace("NAME", name) for path in listed]
        missing = [path for path in missing if name != "plain" or "torch/ops" not in path]  # that op is all_reduce.cpp
        assert [path for path in missing if not (ROOT / path).exists()] == []


def test_the_words_of_a_new_epilogue_are_listed(text: str) -> None:
    """Of a public one: every page and list that has its name is there, but for those about what uses it."""
    listed = words_of_an_epilogue(text)
    assert len(listed) == 5
    assert [path for path in listed if "FP8" not in (ROOT / path).read_text().upper()] == []
    pages = [*(ROOT / "docs/api").glob("*.md"), *(ROOT / "tests/unit").glob("*.txt")]
    named = {str(path.relative_to(ROOT)) for path in pages if "static_fp8" in path.read_text()}
    assert named == {*listed} - {"docs/numerics.md", "CHANGELOG.md"}


def test_an_epilogue_is_named_in_the_listed_files_alone(text: str) -> None:
    """The one that only test builds have: nothing else in the library knows of it."""
    named = files_that_name(ROOT, ("row_peak", "RowPeak"))
    assert named == {
        path for path in (p.replace("NAME", "row_peak") for p in files_of_an_epilogue(text)) if path in named
    }
    assert {"csrc/epilogues/row_peak.h", "csrc/epilogues/list.h", "csrc/torch/ops/row_peak.cpp"} <= named


# ---- controls


def test_a_forbidden_include_is_found(text: str, tmp_path: Path) -> None:
    for room in rooms_of(text):
        (tmp_path / room).mkdir(parents=True, exist_ok=True)
    (tmp_path / "diagnosis" / "a.h").write_text('#include <torch/csrc/stable/tensor.h>\n#include "torch/checks.h"\n')
    (tmp_path / "protocol" / "b.h").write_text('#include "kernels/ptx.cuh"\n#include <cuda_runtime_api.h>\n')
    (tmp_path / "torch" / "c.h").write_text('#include <torch/csrc/stable/tensor.h>\n#include "launch/plan.h"\n')
    assert wrong_includes(tmp_path, rooms_of(text)) == [
        "diagnosis/a.h: torch/csrc/stable/tensor.h",
        "diagnosis/a.h: torch/checks.h",
        "protocol/b.h: kernels/ptx.cuh",
        "protocol/b.h: cuda_runtime_api.h",
    ]


def test_a_file_that_knows_an_epilogue_and_is_not_listed_is_found(tmp_path: Path) -> None:
    (tmp_path / "csrc" / "host").mkdir(parents=True)
    (tmp_path / "csrc" / "host" / "one_rank.h").write_text("if (op == Op::row_peak) ...")
    assert files_that_name(tmp_path, ("row_peak",)) == {"csrc/host/one_rank.h"}


def test_an_import_from_above_is_found(tmp_path: Path) -> None:
    for name, source in {
        "memory/a.py": "from ..tuning import b\nfrom .c import d\nfrom mnnvl_ar.errors import E",
        "errors.py": "def f():\n    import mnnvl_ar.memory",
        "tuning.py": "from mnnvl_ar import memory, Workspace",
        "new.py": "",
    }.items():
        (tmp_path / "mnnvl_ar" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mnnvl_ar" / name).write_text(source)
    rows = [["workspace"], ["tuning"], ["memory"], ["errors"]]
    assert wrong_imports(tmp_path / "mnnvl_ar", rows) == [
        "errors: memory",
        "memory: tuning",
        "new: in no row",
        "tuning: workspace",
    ]
