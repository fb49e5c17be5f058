"""`make` sets up .venv around the PyTorch that was asked for: a stand-in for its Python writes down what it is told."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent.parent
PYTHON = """#!/bin/sh
echo "$*" >> log
case "$*" in *importlib.metadata*) echo torch==2.10.0;; *find_nvcc*) exit ${LACKS_NVCC:-0};; esac
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path


def make(tree: Path, *arguments: str) -> list[str]:
    """Runs make, whatever make runs us; the lines that its Python was called with, and that were not seen before."""
    (tree / "log").unlink(missing_ok=True)
    # A make that runs us hands its variables on, by their names and all of them again in MAKEFLAGS.
    handed_on = {"ARGS", "TORCH", "PY", "PYTHON", "MFLAGS"}
    environment = {
        name: value for name, value in os.environ.items() if name not in handed_on and not name.startswith("MAKE")
    }
    subprocess.run(["make", *arguments], cwd=tree, env=environment, check=True, capture_output=True, text=True)
    log = tree / "log"
    return log.read_text().splitlines() if log.exists() else []


def test_what_follows_torch_is_held_to_it(tree: Path) -> None:
    first, *later = [line for line in make(tree, ".venv/.dev", "TORCH=torch==2.10.0") if " install " in line]
    assert first.endswith("install torch==2.10.0")
    assert (tree / ".venv/.constraint").read_text() == "torch==2.10.0\n"
    assert len(later) >= 3
    assert [line for line in later if " -c .venv/.constraint " not in line] == []


def test_another_torch_sets_up_anew_and_the_same_does_not(tree: Path) -> None:
    make(tree, ".venv/.installed", "TORCH=torch==2.10.0")
    assert make(tree, ".venv/.installed", "TORCH=torch==2.10.0") == []
    again = make(tree, ".venv/.installed", "TORCH=torch==2.11.0 --index-url here")
    assert any(line.endswith("install torch==2.11.0 --index-url here") for line in again)
    assert any("-e .[test]" in line for line in again)


@pytest.mark.parametrize(("gpu", "lacks", "installed"), [("", 1, 0), ("/dev/nvidia0", 0, 0), ("/dev/nvidia0", 1, 1)])
def test_pips_nvcc_is_for_machines_with_a_gpu_that_lack_one(
    tree: Path, monkeypatch: pytest.MonkeyPatch, gpu: str, lacks: int, installed: int
) -> None:
    monkeypatch.setenv("LACKS_NVCC", str(lacks))
    told = make(tree, ".venv/.installed", f"GPU={gpu}")
    assert (
        sum("install -c .venv/.constraint cuda-toolkit[nvcc,cccl,cudart]==13.*" in line for line in told) == installed
    )


# What PyPI's PyTorch asks for on x86_64; one that no version of ours satisfies would be replaced by a newer PyTorch.
@pytest.mark.parametrize(("torch", "pinned"), [("2.10", "12.9.4"), ("2.11 to 2.15, at least", "13.0.3")])
def test_cuda_bindings_of_every_torch_are_accepted(torch: str, pinned: str) -> None:
    ours = re.search(r'"(cuda-bindings[^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert ours
    assert pinned in Requirement(ours[1]).specifier


def test_bench_report_installs_what_draws_and_keeps_torch(tree: Path) -> None:
    log = [*make(tree, "bench-report"), *make(tree, "bench-report")]  # the second time there is nothing left to install
    extra = [i for i, line in enumerate(log) if " install -c .venv/.constraint " in line and "bench]" in line]
    assert len(extra) == 1
    reports = [i for i, line in enumerate(log) if line == "bench/report.py"]
    assert len(reports) == 2
    assert extra[0] < reports[0]


def test_wheels_are_built_with_what_builds_them(tree: Path) -> None:
    log = make(tree, "wheel", "ARGS=x86_64")
    (extra,) = [i for i, line in enumerate(log) if " install -c .venv/.constraint " in line and "release]" in line]
    assert log.index("-m tools.wheels x86_64") > extra


def test_the_site_is_made_strictly_with_what_makes_it(tree: Path) -> None:
    log = make(tree, "site")
    (extra,) = [i for i, line in enumerate(log) if " install -c .venv/.constraint " in line and "docs]" in line]
    (made,) = [i for i, line in enumerate(log) if line.startswith("-m sphinx -W --keep-going -n ")]
    assert extra < made
