"""How the wheels that are given away are made: the same CUDA everywhere, and from nothing but the sdist."""

import re
import tarfile
from pathlib import Path

import pytest

import mnnvl_ar
from tools import ROOT, wheels


def test_the_container_builds_with_the_same_cuda() -> None:
    part = (ROOT / "pyproject.toml").read_text().split("[tool.cibuildwheel]", 1)[1].split("\n[", 1)[0]
    assert set(re.findall(r"nvidia-\S+==[\d.]+", part)) == {*wheels.COMPILER, *wheels.TARGET}


def test_whatever_packs_a_wheel_is_told_the_same_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    assert f'"SOURCE_DATE_EPOCH", "{wheels.EPOCH}"' in (ROOT / "setup.py").read_text()
    assert wheels.run("env").splitlines().count(f"SOURCE_DATE_EPOCH={wheels.EPOCH}") == 1
    assert "SOURCE_DATE_EPOCH=1" in wheels.run("env", SOURCE_DATE_EPOCH="1").splitlines()


def test_the_version_has_its_heading() -> None:
    version = mnnvl_ar.__version__.removesuffix("+host")
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_of_the_last_build_the_objects_stay_and_nothing_else(tmp_path: Path) -> None:
    new = tmp_path / "new/x-1"
    new.mkdir(parents=True)
    (new / "setup.py").write_text("new")
    with tarfile.open(tmp_path / "x-1.tar.gz", "w:gz") as archive:
        archive.add(new, "x-1")
    folder = tmp_path / "work"
    for name in (
        "setup.py",
        "gone.py",
        "dist/old.whl",
        "build/release/a.o",
        "build/lib.linux/gone.py",
        "build/bdist/b",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("old")
    wheels.unpack(tmp_path / "x-1.tar.gz", folder)
    left = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert left == {"setup.py": "new", "build/release/a.o": "old"}
