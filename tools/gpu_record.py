"""What the GPU tests did, on which hardware, and a digest of the sources they ran on: tests/gpu/record.json.

    python tests/gpu/record.py --check             fresh or stale, and what changed since; exits 1 when stale
    python tests/gpu/record.py --join A.json ...   takes over what other records hold; runs of the same hardware and the
                                                   same sources are added up

The file: `runs` by hardware ("8 x NVIDIA H200"), `figures` by key, and `sources`: for each digest named by those, the
digest of every file, so that a check can say what changed. A run replaces the one of the same hardware and leaves the
others alone. `make gpu-test` (tests/gpu/campaign.py) joins the records of all its processes.
"""

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
FILE = Path(__file__).with_name("record.json")
# What the tests run, how it is compiled, and what they import.
COVERED = (
    "csrc/**/*",
    "setup.py",
    "mnnvl_ar/**/*.py",
    "mnnvl_ar/**/*.json",
    "tests/conftest.py",
    "tests/common/**/*.py",
    "tests/gpu/**/*.py",
    "tests/native/exhaustive.cu",
    "tests/replay/**/*.py",
)


def source_files(root: Path = ROOT) -> dict[str, str]:
    """Digest of each covered file, by path, sorted."""
    paths = sorted({path for pattern in COVERED for path in root.glob(pattern) if path.is_file()})
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in paths}


def digest(files: dict[str, str]) -> str:
    return hashlib.sha256("".join(f"{path} {value}\n" for path, value in files.items()).encode()).hexdigest()[:16]


def load(file: Path) -> dict[str, Any]:
    empty: dict[str, Any] = {"runs": {}, "figures": {}, "sources": {}}
    return {**empty, **json.loads(file.read_text())} if file.exists() else empty


def _put(file: Path, part: str, key: str, entry: dict[str, Any]) -> None:
    record, files = load(file), source_files()
    record["sources"][digest(files)] = files
    record[part][key] = {"digest": digest(files), "date": time.strftime("%Y-%m-%d", time.gmtime()), **entry}
    _write(file, record)


def _write(file: Path, record: dict[str, Any]) -> None:
    """Sources that no entry names any more are dropped."""
    named = {entry["digest"] for part in ("runs", "figures") for entry in record[part].values()}
    record["sources"] = {name: files for name, files in record["sources"].items() if name in named}
    file.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def join(others: Iterable[Path], file: Path = FILE, hardware: str | None = None, gpus: int | None = None) -> None:
    """Takes over all entries of `others`. Runs of one hardware and one digest are parts of one run: their tests add up.

    hardware: counts every run of `others` as one on this, such as "4 x NVIDIA H200" for tests that saw two of the four.
    gpus: so many there are in all; tests that need more were not left out, but could not be run.
    """
    record, taken = load(file), set()
    for other in map(load, others):
        record["sources"].update(other["sources"])
        record["figures"].update(other["figures"])
        for name, run in other["runs"].items():
            key = hardware or name
            if gpus is not None:
                run["left_out"] = {test: need for test, need in run.get("left_out", {}).items() if need <= gpus}
            if key in taken and record["runs"][key]["digest"] == run["digest"]:
                run = _sum(record["runs"][key], run)
            record["runs"][key] = run
            taken.add(key)
    _write(file, record)


def _sum(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """Two parts of one run."""
    nothing = {"passed": 0, "failed": 0, "skipped": 0}
    tests = {
        gpus: {key: one["tests"].get(gpus, nothing)[key] + two["tests"].get(gpus, nothing)[key] for key in nothing}
        for gpus in sorted({*one["tests"], *two["tests"]}, key=int)
    }
    return {
        **two,
        "tests": tests,
        "world_sizes": sorted({*one["world_sizes"], *two["world_sizes"]}),
        "left_out": {test: need for test, need in two.get("left_out", {}).items() if test in one.get("left_out", {})},
    }


def hardware() -> str:
    """What this process sees, such as "8 x NVIDIA H200"."""
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return " + ".join(f"{names.count(name)} x {name}" for name in sorted(set(names))) or "no GPU"


def merge(key: str, figures: dict[str, Any], file: Path = FILE) -> None:
    """Adds figures from elsewhere (soak, replays, faults), replacing those of the same key."""
    _put(file, "figures", key, figures)


def write_run(file: Path, tests: dict[str, dict[str, int]], left_out: dict[str, int]) -> None:
    """Records a test run on the GPUs at hand. `tests`: passed, failed, skipped by number of GPUs needed ("1", "2").
    `left_out`: tests that neither ran nor were skipped for want of GPUs, and the GPUs that they need."""
    import torch

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    entry = {
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "world_sizes": sorted(int(gpus) for gpus, count in tests.items() if count["passed"]),
        "tests": tests,
        "left_out": left_out,
    }
    _put(file, "runs", hardware(), entry)


def changes(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """One line a file that was changed, added or removed."""
    paths = [path for path in sorted({*then, *now}) if then.get(path) != now.get(path)]
    return [f"{'removed' if path not in now else 'added' if path not in then else 'changed'} {path}" for path in paths]


def check(file: Path = FILE, root: Path = ROOT) -> tuple[bool, list[str]]:
    """(fresh?, what to say). Fresh: there is a run, every entry is of the sources as they are, no test failed or was
    left out. World sizes that nobody ran are told, and are no reason: not everybody has eight GPUs."""
    record, now = load(file), source_files(root)
    if not record["runs"]:
        return False, [f"GPU record: none in {file.name}; make it by `make gpu-test` where there are GPUs"]
    good, lines = True, []
    for name, entry in (*record["runs"].items(), *record["figures"].items()):
        stale = entry["digest"] != digest(now)
        failed = sum(count["failed"] for count in entry.get("tests", {}).values())
        passed = sum(count["passed"] for count in entry.get("tests", {}).values())
        counts = f", {passed} passed, {failed} failed, world sizes {entry['world_sizes']}" if "tests" in entry else ""
        lines.append(f"GPU record: {'STALE' if stale else 'fresh'}: {name} ({entry['date']}{counts})")
        if stale:
            lines += [f"  {line}" for line in changes(record["sources"].get(entry["digest"], {}), now)]
        left_out = entry.get("left_out", {})
        lines += [f"  left out: {len(left_out)} tests, such as {min(left_out)}"] if left_out else []
        good = good and not stale and not failed and not left_out
    sizes = {size for entry in record["runs"].values() for size in entry["world_sizes"]}
    lines += [f"GPU record: no run of {size} GPUs" for size in (2, 4, 8) if size not in sizes]
    return good, lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true")
    action.add_argument("--join", nargs="+", type=Path, metavar="RECORD")
    parser.add_argument("--file", type=Path, default=FILE)
    args = parser.parse_args()
    if args.join:
        join(args.join, args.file)
        return
    good, lines = check(args.file)
    print("\n".join(lines))
    sys.exit(not good)


if __name__ == "__main__":
    main()
