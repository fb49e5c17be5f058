"""What a recorded result rests on: the rooms of the repository, and for each kind of result the rooms it rests on.

    files = snapshot()             digest of every file that some result rests on, by path
    rests_on("bits", files)        those of them that a result of this kind rests on
    digest(...)                    one word for all of these

A result is fresh as long as the files that it rests on are as they were when it was made. Only the standard library is
imported, so that any Python can say what is stale.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTHING = "nothing"
OF_BENCH = ("bench/quantised.py", "bench/variant.py", "bench/peers/vllm_quantised.py")  # what tests of bits import

# Room -> the patterns of its files. A file is in the first room with a pattern that matches. A pattern that ends in "/"
# takes all that lies beneath; in the others * stands for any characters, "/" too.
ROOMS = {
    # No result on GPUs rests on these.
    NOTHING: (
        "csrc/host/",
        "mnnvl_ar/__*__.py",
        "mnnvl_ar/binary.py",
        "mnnvl_ar/py.typed",
        "mnnvl_ar/compat/",
        "mnnvl_ar/demo/",
        "mnnvl_ar/doctor/",
        "tests/common/cases/demo.py",
        "tests/common/machines.py",
        "tests/common/simulated_nvml.py",
        "tests/common/pages.py",
        "tests/common/dsl.py",
        "tests/common/flight.py",
        "tests/common/sass.py",
        "tools/*.md",
        "tools/Containerfile",
        "tools/__init__.py",
        "tools/compare_builds.py",
        "tools/contracts/",
        "tools/fetch.cu",
        "tools/gpu_*",
        "tools/link.cu",
        "tools/piece_cost.py",
        "tools/sources.py",
        "tools/wheels.py",
    ),
    # The quantising epilogues, which have kernels of their own.
    "quantised": (
        "csrc/epilogues/block_scale*",
        "csrc/epilogues/per_token_fp8*",
        "csrc/epilogues/quantised.h",
        "csrc/epilogues/row_peak*",
        "csrc/epilogues/static_fp8*",
        "csrc/protocol/numerics_fp*",
        "csrc/protocol/scale_layout.h",
        "csrc/torch/block_scaled.h",
        "csrc/torch/quantised.h",
        "csrc/torch/ops/*fp4.cpp",
        "csrc/torch/ops/*fp8.cpp",
        "csrc/torch/ops/row_peak.cpp",
        "mnnvl_ar/reference/fp*.py",
        "mnnvl_ar/scales.py",
    ),
    # Words: converted, added, sent and seen to have arrived.
    "arithmetic": (
        "csrc/protocol/numerics*",
        "csrc/protocol/portable.h",
        "csrc/protocol/sabotage.h",
        "csrc/protocol/sentinel.h",
        "csrc/*/ptx.cuh",
        "csrc/*/receive.cuh",
        "csrc/*/root.cuh",
    ),
    "diagnosis": (
        "csrc/diagnosis/",
        "mnnvl_ar/crosscheck.py",
        "mnnvl_ar/diagnosis.py",
        "mnnvl_ar/errors.py",
        "mnnvl_ar/monitor.py",
    ),
    "cases of bits": (
        *OF_BENCH,
        "tests/common/cases/many.py",
        "tests/common/cases/outputs.py",
        "tests/common/cases/quantised.py",
    ),
    "cases of diagnosis": ("tests/common/cases/diagnosis.py",),
    "cases of life cycle": ("tests/common/cases/lifecycle.py",),
    "memory": ("mnnvl_ar/arguments.py", "mnnvl_ar/memory/", "mnnvl_ar/turn.py", "mnnvl_ar/workspace.py"),
    # From an op's arguments to its outputs, how that is compiled, and what its bits are compared with.
    "kernels": (
        "csrc/epilogues/",
        "csrc/kernels/",
        "csrc/launch/",
        "csrc/protocol/",
        "csrc/torch/",
        "mnnvl_ar/_inductor.py",
        "mnnvl_ar/_library.py",
        "mnnvl_ar/bound.py",
        "mnnvl_ar/handle.py",
        "mnnvl_ar/ops.py",
        "mnnvl_ar/ranks.py",
        "mnnvl_ar/reference/",
        "mnnvl_ar/tuning/",
        "setup.py",
    ),
    # Each kind of result has a room of its own: the programs and the tests that make it.
    "twin": (
        "mnnvl_ar/dsl/",
        "tests/common/cases/twin.py",
        "tests/common/relu_squared.py",
        "tests/common/twin.py",
        "tests/common/wrong_twins.py",
        "tests/gpu/test_gpu_twin.py",
        "tools/twin_*.py",
    ),
    "numerics": ("tests/gpu/test_exhaustive.py", "tests/native/exhaustive.cu"),
    "replays": (
        "tests/gpu/test_hostile.py",
        "tests/gpu/test_replay.py",
        "tests/gpu/test_updates.py",
        "tools/replay/",
    ),
    "sanitizers": ("tools/sanitize.py",),
    "cost of safety": ("tools/safety_cost.py",),
    "workspaces": (
        "tests/common/cases/asleep.py",
        "tests/common/cases/crosscheck.py",
        "tests/common/cases/processors.py",
        "tests/gpu/test_gpu_asleep.py",
        "tests/gpu/test_gpu_input.py",
        "tests/gpu/test_gpu_lifecycle.py",
        "tests/gpu/test_gpu_processors.py",
        "tests/ranks/test_crosscheck.py",
        "tests/ranks/test_diagnosis.py",
        "tests/ranks/test_input.py",
        "tests/ranks/test_lifecycle.py",
        "tests/ranks/test_no_gradient.py",
    ),
    "faults": ("tools/faults/",),
    # What calls of tests need to be seen by their kernels.
    "cases of kernels": ("tests/common/cases/forms.py", "tests/common/cases/graph_nodes.py"),
    "cases of software multicast": (
        "tests/common/cases/aliased.py",
        "tests/common/cases/hostile.py",
        "tests/common/cases/lost_rows.py",
        "tests/common/cases/own_*.py",
        "tests/common/cases/software.py",
    ),
    "software multicast": (
        "tests/gpu/test_software_multicast.py",
        "tests/gpu/test_software_multicast_aliases.py",
        "tests/gpu/test_software_multicast_faults.py",
        "tests/gpu/test_software_multicast_kernels.py",
    ),
    "software multicast on GPUs": ("tests/gpu/test_software_multicast_ranks.py",),
    "quantised outputs": (
        "tests/common/cases/quantised_launches.py",
        "tests/gpu/test_quantised_peers.py",
        "tests/ranks/test_quantised_launches.py",
    ),
    "bits": (
        "tests/gpu/test_gpu_bits.py",
        "tests/gpu/test_gpu_controls.py",
        "tests/gpu/test_gpu_graphs.py",
        "tests/gpu/test_many_ranks.py",
        "tests/ranks/test_bound.py",
        "tests/ranks/test_outputs.py",
        "tests/ranks/test_pieces.py",
        "tests/ranks/test_quantised_ops.py",
        "tests/ranks/test_ring_ends.py",
    ),
    # What the tests share: rows, calls, which ranks there are, which tests are skipped.
    "cases": (
        "tests/common/",
        "tests/conftest.py",
        "tests/gpu/conftest.py",
        "tests/ranks/conftest.py",
        "tools/driver.py",
        "tools/multicast.py",
    ),
}
# Patterns of rooms that are still to be made. Once there is such a file, a test wants its pattern deleted from here.
COMING: tuple[str, ...] = ()

# What bits and times of a call rest on.
LIBRARY = ("arithmetic", "kernels")
OF_SOFTWARE_MULTICAST = (
    *("quantised", "diagnosis", "cases", "cases of bits", "cases of diagnosis", "cases of life cycle"),
    "cases of software multicast",
)
# Kind of result -> the rooms that it rests on, beside the one of its own name.
PARTS = {
    "numerics": (*LIBRARY, "quantised", "cases"),
    "bits": (*LIBRARY, "quantised", "cases", "cases of bits", "cases of kernels", "cases of life cycle"),
    "software multicast": (*LIBRARY, *OF_SOFTWARE_MULTICAST, "cases of kernels"),
    "software multicast on GPUs": (*LIBRARY, *OF_SOFTWARE_MULTICAST, "replays", "memory"),
    "quantised outputs": (*LIBRARY, "quantised", "cases", "cases of bits", "cases of kernels"),
    "replays": (*LIBRARY, "cases"),
    "sanitizers": (*LIBRARY, "cases"),
    "cost of safety": (*LIBRARY, "cases"),
    "workspaces": (*LIBRARY, "quantised", "cases", "memory", "diagnosis", "cases of diagnosis", "cases of life cycle"),
    "faults": (*LIBRARY, "cases", "memory", "diagnosis"),
    "twin": (*LIBRARY, "cases", "memory", "diagnosis", "cases of diagnosis", "cases of life cycle", "faults"),
}


def matches(path: str, pattern: str) -> bool:
    return path.startswith(pattern) if pattern.endswith("/") else fnmatch.fnmatchcase(path, pattern)


def room_of(path: str) -> str | None:
    """The room of a file, by its path from the root; None for one that has none."""
    return next((room for room, patterns in ROOMS.items() if any(matches(path, each) for each in patterns)), None)


def snapshot(root: Path = ROOT) -> dict[str, str]:
    """Digest of each file in a room that something rests on, by path, sorted."""
    paths = [path for path in _paths(root) if room_of(path) not in (None, NOTHING)]
    return {path: hashlib.sha256((root / path).read_bytes()).hexdigest()[:16] for path in paths}


def in_rooms(rooms: tuple[str, ...], files: dict[str, str]) -> dict[str, str]:
    return {path: value for path, value in files.items() if room_of(path) in rooms}


def rests_on(part: str, files: dict[str, str]) -> dict[str, str]:
    """What a result of this kind rests on. Of a kind that is not known, or no longer, all that any result rests on."""
    if part in PARTS:
        return in_rooms((part, *PARTS[part]), files)
    return {path: value for path, value in files.items() if room_of(path) != NOTHING}


def digest(files: dict[str, str]) -> str:
    return hashlib.sha256("".join(f"{path} {value}\n" for path, value in files.items()).encode()).hexdigest()[:16]


def without_room(root: Path = ROOT) -> list[str]:
    """Files of the library, the tools and the GPU tests that are in no room: nobody has said what rests on them."""
    folders = ("csrc/", "mnnvl_ar/", "tools/", "tests/common/", "tests/gpu/", "tests/ranks/")
    return [path for path in _paths(root) if path.startswith(folders) and room_of(path) is None]


def without_files(root: Path = ROOT) -> list[str]:
    """Patterns that no file matches."""
    paths = _paths(root)
    patterns = sorted(pattern for patterns in ROOMS.values() for pattern in patterns)
    return [pattern for pattern in patterns if not any(matches(path, pattern) for path in paths)]


def _paths(root: Path) -> list[str]:
    """Of all sources, sorted; not what is built from them."""
    return sorted(str(path.relative_to(root)) for path in _sources(root))


def _sources(root: Path) -> Iterator[Path]:
    for name in ("csrc", "mnnvl_ar", "setup.py", "tests", "tools", *OF_BENCH):
        for path in (root / name, *(root / name).rglob("*")):
            if path.is_file() and path.suffix not in (".new", ".so") and "__pycache__" not in path.parts:
                yield path
