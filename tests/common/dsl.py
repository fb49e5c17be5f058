"""A Python that has the DSL: this one, or that of build/dsl-venv, which `make dsl` makes, and CI here.

The DSL is 260 MB and no part of the test environment: it wants versions of its own of CUDA's packages.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mnnvl_ar.dsl import constants

ROOT = Path(__file__).parent.parent.parent
VENV = ROOT / "build" / "dsl-venv"
VERSION = "import importlib.metadata as m; print(m.version('nvidia-cutlass-dsl'))"
ENOUGH = 240  # seconds, to install it


class NoDsl(Exception):
    """It cannot be had; the message says why."""


def version_of(python: str | Path) -> str:
    if not Path(python).exists():
        return ""
    got = subprocess.run([python, "-c", VERSION], capture_output=True, text=True)
    return got.stdout.strip() if got.returncode == 0 else ""


@functools.cache
def python() -> str:
    """Its path. Raises NoDsl."""
    if version_of(sys.executable) == constants.DSL:
        return sys.executable
    with one_at_a_time():
        made = VENV / "bin" / "python"
        if is_installed() and version_of(made) == constants.DSL:
            return str(made)
        if not os.environ.get("CI"):
            raise NoDsl(f"nvidia-cutlass-dsl=={constants.DSL} is not here: make dsl")
        return install()


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Test files run beside each other, and the next must not use, or make again, what the first has half installed."""
    VENV.parent.mkdir(exist_ok=True)
    with VENV.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_installed() -> bool:
    """Wholly: a package has its version before it has all of its libraries, and who maps one that still grows dies of
    SIGBUS."""
    return (VENV / ".installed").exists()


def install() -> str:
    wanted, made = f"nvidia-cutlass-dsl=={constants.DSL}", VENV / "bin" / "python"
    make = [sys.executable, "-m", "venv", "--clear", VENV]
    try:
        subprocess.run(make, check=True, capture_output=True, text=True, timeout=60)
        command = [made, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", wanted]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=ENOUGH)
    except (OSError, subprocess.SubprocessError) as why:
        said = (getattr(why, "stderr", "") or str(why)).strip().splitlines()
        raise NoDsl(f"{wanted} cannot be installed: {said[-1] if said else why}") from None
    (VENV / ".installed").touch()
    return str(made)


def build(out: Path, *options: str, root: Path = ROOT) -> list[Path]:
    """Runs mnnvl_ar/dsl/build.py of `root`; the cubins in `out`. Raises NoDsl, or AssertionError with what it said."""
    command = [python(), str(root / "mnnvl_ar" / "dsl" / "build.py"), "--out", str(out), *options]
    path = os.pathsep.join([str(root), str(ROOT / "tests"), str(out)])
    got = subprocess.run(command, capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": path})
    assert got.returncode == 0, f"exit status {got.returncode}: {got.stdout}{got.stderr}"
    return sorted(out.glob("*.cubin"))
