"""`--gpu-record` tells whether all of tests/gpu ran: conftest.py in a tree of small tests and of stand-ins."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TREE = {
    "tests/hypothesis.py": "class HealthCheck:\n    too_slow = 0\n\n\nclass settings:\n"
    "    register_profile = load_profile = staticmethod(lambda *_, **__: None)\n",
    "tests/torch.py": "class cuda:\n    device_count = staticmethod(lambda: 2)\n",
    "tools/__init__.py": "",
    "tools/multicast.py": "def keep_multicast_off(): pass\n",
    "tools/gpu_record.py": "import json\n\n\n"
    "def write_run(file, outcomes, left_out):\n    file.write_text(json.dumps([outcomes, left_out]))\n",
    "tests/gpu/test_one.py": "import pytest\n\n\ndef test_a(): pass\n\n\n@pytest.mark.slow\ndef test_b(): pass\n",
    "tests/gpu/test_two.py": "import pytest\n\n\n@pytest.mark.gpu(2)\ndef test_c(): pass\n\n\n"
    "@pytest.mark.gpu(4)\ndef test_d(): pass\n",
    "tests/unit/test_other.py": "def test_e(): pass\n",
}
ONE, TWO, FOUR = (
    {"passed": 2, "failed": 0, "skipped": 0},
    {"passed": 1, "failed": 0, "skipped": 0},
    {"passed": 0, "failed": 0, "skipped": 1},
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, text in TREE.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    shutil.copy(ROOT / "tests/conftest.py", tmp_path / "tests")
    return tmp_path


ALL = {"tests/gpu/test_one.py::test_a": 1, "tests/gpu/test_one.py::test_b": 1}
ALL |= {"tests/gpu/test_two.py::test_c": 2, "tests/gpu/test_two.py::test_d": 4}


def recorded(tree: Path, *arguments: str) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """The counts, and what was left out."""
    command = [sys.executable, "-m", "pytest", "-q", "--gpu-record", "record.json", *arguments]
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    got = subprocess.run(command, cwd=tree, capture_output=True, text=True, env=env)
    outcomes, left_out = json.loads((tree / "record.json").read_text())
    counts: dict[str, dict[str, int]] = {}
    for gpus, outcome in outcomes.values():
        counts.setdefault(str(gpus), {"passed": 0, "failed": 0, "skipped": 0})[outcome] += 1
    assert ("as partial" in got.stdout) == bool(left_out), got.stdout
    return counts, left_out


@pytest.mark.parametrize("arguments", [("-m", "gpu", "tests/gpu"), ("tests",), ("-m", "gpu")])
def test_a_whole_run(tree: Path, arguments: tuple[str, ...]) -> None:
    """Also where there are fewer GPUs than a test needs, and where only other tests were left out."""
    assert recorded(tree, *arguments) == ({"1": ONE, "2": TWO, "4": FOUR}, {})


@pytest.mark.parametrize(
    ("arguments", "ran"),
    [
        (("-k", "test_a"), "a"),
        (("-m", "gpu and not slow"), "acd"),
        (("--gpus", "1"), "ab"),
        (("--deselect", "tests/gpu/test_one.py::test_b"), "acd"),
    ],
)
def test_tests_that_were_left_out(tree: Path, arguments: tuple[str, ...], ran: str) -> None:
    assert recorded(tree, *arguments)[1] == {test: gpus for test, gpus in ALL.items() if test[-1] not in ran}


@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        (("--ignore", "tests/gpu/test_two.py"), "two"),
        (("tests/gpu/test_one.py",), "two"),
        (("tests/gpu/test_two.py::test_c", "tests/unit"), "one"),
    ],
)
def test_files_that_were_left_out(tree: Path, arguments: tuple[str, ...], file: str) -> None:
    assert recorded(tree, *arguments)[1] == {f"tests/gpu/test_{file}.py": 0}


def test_a_run_that_ended_early(tree: Path) -> None:
    file = tree / "tests/gpu/test_one.py"
    file.write_text(file.read_text().replace("test_b(): pass", "test_b(): assert False"))
    assert recorded(tree, "tests/gpu")[1] == {}  # failures are no omission
    left = {test: gpus for test, gpus in ALL.items() if "test_two" in test}
    assert recorded(tree, "tests/gpu", "-x")[1] == left
