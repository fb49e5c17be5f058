"""The host transport under ThreadSanitizer and AddressSanitizer: tests/native/host_ring.cpp, with threads as ranks.

Ranks share memory without locks, so every word that one writes and another reads has to be atomic. That the sanitizers
see what they are for is shown by a build in which data is stored plainly, and by blocks that are too short.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FLAGS = "-std=c++20 -O1 -g -fno-omit-frame-pointer -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas"
SANITIZERS = {"thread": "thread", "address": "address,undefined"}
NO_SANITIZER = re.compile(r"cannot find .*(tsan|asan|ubsan)|unsupported option|not supported")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the host transport is for Linux")


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return found or pytest.skip("no C++ compiler on this machine")


def build(folder: Path, sanitizer: str, *includes: Path) -> Path:
    """The driver with one sanitizer in it; `includes` come before csrc."""
    program = folder / f"host_ring_{sanitizer}"
    paths = [f"-I{path}" for path in (*includes, ROOT / "csrc")]
    sources = [str(ROOT / "tests/native/host_ring.cpp")]
    sanitize = f"-fsanitize={SANITIZERS[sanitizer]}"
    command = [*compiler().split(), *FLAGS.split(), sanitize, *paths, *sources, "-pthread", "-o", str(program)]
    got = subprocess.run(command, capture_output=True, text=True)
    if got.returncode and NO_SANITIZER.search(got.stderr):
        pytest.skip(f"this compiler has no {sanitizer} sanitizer")
    assert got.returncode == 0, got.stderr
    assert got.stderr == "", "no warnings"
    return program


def run(program: Path, ranks: int, calls: int, seed: int, *more: str) -> subprocess.CompletedProcess[str]:
    options = {"TSAN_OPTIONS": "exitcode=66 halt_on_error=0 report_signal_unsafe=0", "ASAN_OPTIONS": "exitcode=66"}
    options["UBSAN_OPTIONS"] = "halt_on_error=1 exitcode=66 print_stacktrace=1"
    command = [str(program), str(ranks), str(calls), str(seed), *more]
    got = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **options})
    if "unexpected memory mapping" in got.stderr:  # a kernel that randomises more of the address than this TSan knows
        if shutil.which("setarch") is None:
            pytest.skip("ThreadSanitizer does not know this kernel's address space, and there is no setarch")
        got = subprocess.run(["setarch", "-R", *command], capture_output=True, text=True, env={**os.environ, **options})
        if "unexpected memory mapping" in got.stderr or "setarch" in got.stderr:
            pytest.skip("ThreadSanitizer does not know this kernel's address space")
    return got


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sanitizers")
    return {sanitizer: build(folder, sanitizer) for sanitizer in SANITIZERS}


def assert_clean(got: subprocess.CompletedProcess[str]) -> None:
    assert got.stderr == ""
    assert got.returncode == 0
    assert "every sum right, outputs the same on all ranks" in got.stdout


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_clean(programs: dict[str, Path], sanitizer: str, ranks: int) -> None:
    assert_clean(run(programs[sanitizer], ranks, 150, seed=ranks))


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize(("ranks", "calls"), [(2, 5000), (4, 2000), (16, 100)])
def test_clean_for_long(programs: dict[str, Path], sanitizer: str, ranks: int, calls: int) -> None:
    assert_clean(run(programs[sanitizer], ranks, calls, seed=calls))


# ---- controls


def test_a_plain_store_is_found(tmp_path: Path) -> None:
    """shared_word.h with the first half of the data stored as plain memory: the same bytes on x86, and a data race."""
    text = (ROOT / "csrc/host/shared_word.h").read_text()
    store = re.compile(r"std::atomic_ref<uint64_t>\(half\[0\]\)\.store\((.+?), std::memory_order_release\);")
    plain, count = store.subn(r"half[0] = \1;", text)
    assert count == 1, "shared_word.h has changed: change this control with it"
    (tmp_path / "host").mkdir()
    (tmp_path / "host/shared_word.h").write_text(plain)
    got = run(build(tmp_path, "thread", tmp_path), 2, 50, 1)
    assert got.returncode == 66, got.stdout + got.stderr
    assert "WARNING: ThreadSanitizer: data race" in got.stderr
    assert "store_vector" in got.stderr


def test_a_block_too_short_is_found(programs: dict[str, Path]) -> None:
    got = run(programs["address"], 2, 3, 1, "small")
    assert got.returncode == 66, got.stdout + got.stderr
    assert "AddressSanitizer: heap-buffer-overflow" in got.stderr
    assert "0 bytes after" in got.stderr or "0 bytes to the right of" in got.stderr
