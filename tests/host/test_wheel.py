"""A wheel of what was built here, far from the sources: in an environment of its own, the sdist beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
BUILT = ROOT / "build" / "release"
INSIDE = "mnnvl_ar/_C.so"
FOUND = """
from importlib import metadata
for group in ("vllm.general_plugins", "sglang.srt.plugins"):
    (entry,) = (each for each in metadata.entry_points(group=group) if each.name == "mnnvl_ar")
    entry.load()()
    print(entry.dist.version, entry.dist.locate_file(""))
"""


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    ours = {name for name in os.environ if name.startswith("MNNVL_AR")} | {"PYTHONPATH"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env={**kept, **variables}, text=True, capture_output=True, timeout=240
    )


def output(*command: str | Path, cwd: Path, **variables: str) -> str:
    got = run(*command, cwd=cwd, **variables)
    assert got.returncode == 0, got.stdout + got.stderr
    return got.stdout


@pytest.fixture(scope="module")
def config() -> dict[str, str]:
    """What the library here was built with, so that the objects that it was made of are good once more."""
    if not (BUILT / "config.json").exists():
        pytest.skip("not built in this tree: no build/release/config.json")
    made = json.loads((BUILT / "config.json").read_text())
    archs = {"MNNVL_AR_ARCHS": made["wanted"]} if made["wanted"] else {}
    return {"MNNVL_AR_CUDA": "1" if made["cuda"] else "0", **archs}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wheel")


@pytest.fixture(scope="module")
def sdist(place: Path) -> Path:
    """Unpacked."""
    (place / "egg").mkdir()
    output(sys.executable, "setup.py", "-q", "egg_info", "-e", place / "egg", "sdist", "-d", place, cwd=ROOT)
    (archive,) = place.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(place)
    return place / archive.name.removesuffix(".tar.gz")


def wheel_of(source: Path, out: Path, config: dict[str, str], base: Path) -> Path:
    options = ("egg_info", "-e", base, "build", "-b", base, "bdist_wheel", "-b", base / "wheel", "-d", out)
    base.mkdir()
    output(sys.executable, "setup.py", "-q", *options, cwd=source, **config)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(sdist: Path, config: dict[str, str], place: Path) -> Path:
    """Of the sdist, with the objects of this tree, which ninja finds to be those of these sources."""
    shutil.copytree(BUILT, sdist / "build" / "release")
    return wheel_of(sdist, place / "from sdist", config, place / "base")


@pytest.fixture(scope="module")
def python(wheel: Path, place: Path) -> Path:
    """Of an environment that has the wheel, and the PyTorch of this one."""
    # Not find_spec(): a look for the module is enough for setuptools to give up its distutils (compat/wheels.py).
    if not any(metadata.distributions(name="pip")):
        pytest.skip("no pip here")
    environment = place / "venv"
    output(sys.executable, "-m", "venv", "--without-pip", environment, cwd=place)
    python = environment / "bin" / "python"
    packages = Path(output(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place).strip())
    torch = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    (packages / "torch.pth").write_text("\n".join(torch) + "\n")  # .pth files that lie there are not followed
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index")
    output(*pip, "--ignore-installed", wheel, cwd=place)
    return python


def test_the_sdist_holds_what_the_tree_does(sdist: Path) -> None:
    git = run("git", "ls-files", "-z", cwd=ROOT)
    if git.returncode:
        pytest.skip("not a clone of the repository")
    held = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    assert [name for name in git.stdout.split("\0") if name and name not in held and (ROOT / name).exists()] == []


def test_the_sdist_builds_the_same_wheel(wheel: Path, config: dict[str, str], place: Path) -> None:
    again = wheel_of(ROOT, place / "from tree", config, place / "base of tree")
    assert again.name == wheel.name
    assert again.read_bytes() == wheel.read_bytes()
    assert zipfile.ZipFile(wheel).read(INSIDE) == (ROOT / INSIDE).read_bytes()


def test_control_an_sdist_that_lacks_a_header(wheel: Path, sdist: Path, config: dict[str, str], place: Path) -> None:
    (sdist / "csrc/protocol/ring.h").rename(place / "ring.h")
    try:
        command = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
        assert "ring.h" in run(*command, cwd=sdist, **config).stdout
    finally:
        (place / "ring.h").rename(sdist / "csrc/protocol/ring.h")


def test_what_the_wheel_holds(wheel: Path, config: dict[str, str]) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"mnnvl_ar", "mnnvl_ar_plugins"}
    assert {"mnnvl_ar/py.typed", "mnnvl_ar/tuning/machines.json", INSIDE} <= set(names)
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in names}
    assert ("+host" in wheel.name) == (config["MNNVL_AR_CUDA"] == "0")


def test_the_demo_and_the_doctor(python: Path, place: Path) -> None:
    said = output(python, "-m", "mnnvl_ar", "demo", "--device", "cpu", "--ranks", "2", "--calls", "20", cwd=place)
    assert "every bit" in said
    said = output(python, "-m", "mnnvl_ar", "doctor", cwd=place)
    assert f"{python.parent.parent}/lib" in said


def test_the_entry_points(python: Path, place: Path) -> None:
    for line in output(python, "-c", FOUND, cwd=place).splitlines():
        assert str(place) in line


def test_control_entry_points_that_lead_nowhere(python: Path, place: Path) -> None:
    (plugins,) = (place / "venv").glob("lib/*/site-packages/mnnvl_ar_plugins")
    plugins.rename(place / "plugins")
    try:
        assert "ModuleNotFoundError" in run(python, "-c", FOUND, cwd=place).stderr
    finally:
        (place / "plugins").rename(plugins)
