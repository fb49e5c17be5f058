"""What the GPU tests did, on which hardware, and a digest of the sources they ran on: tests/gpu/record.json.

    python tests/gpu/record.py --check                      fresh or stale, and what changed since; exits 1 when stale
    python tests/gpu/record.py --merge soak '{"calls": 9}'  adds figures under a key, with today's digest

The file: `runs` by hardware ("8 x NVIDIA H200"), `figures` by key, and `sources`: for each digest named by those, the
digest of every file, so that a check can say what changed. A run replaces the one of the same hardware and leaves the
others alone.
"""

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
FILE = Path(__file__).with_name("record.json")
COVERED = ("csrc/**/*", "mnnvl_ar/**/*.py", "mnnvl_ar/**/*.json", "tests/gpu/**/*.py", "tests/replay/**/*.py")


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
    """Replaces one entry and drops sources that no entry names any more."""
    record, files = load(file), source_files()
    record["sources"][digest(files)] = files
    record[part][key] = {"digest": digest(files), "date": time.strftime("%Y-%m-%d", time.gmtime()), **entry}
    named = {entry["digest"] for part in ("runs", "figures") for entry in record[part].values()}
    record["sources"] = {name: files for name, files in record["sources"].items() if name in named}
    file.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def merge(key: str, figures: dict[str, Any], file: Path = FILE) -> None:
    """Adds figures from elsewhere (soak, replays, faults), replacing those of the same key."""
    _put(file, "figures", key, figures)


def write_run(file: Path, tests: dict[str, dict[str, int]]) -> None:
    """Records a test run on the GPUs at hand. `tests`: passed, failed, skipped by number of GPUs needed ("1", "2")."""
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
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
    }
    _put(file, "runs", " + ".join(f"{names.count(name)} x {name}" for name in sorted(set(names))) or "no GPU", entry)


def changes(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """One line a file that was changed, added or removed."""
    paths = [path for path in sorted({*then, *now}) if then.get(path) != now.get(path)]
    return [f"{'removed' if path not in now else 'added' if path not in then else 'changed'} {path}" for path in paths]


def check(file: Path = FILE, root: Path = ROOT) -> tuple[bool, list[str]]:
    """(fresh?, what to say). Fresh: there is a run, every entry is of the sources as they are, no test failed."""
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
        good = good and not stale and not failed
    return good, lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true")
    action.add_argument("--merge", nargs=2, metavar=("KEY", "JSON"))
    parser.add_argument("--file", type=Path, default=FILE)
    args = parser.parse_args()
    if args.merge:
        merge(args.merge[0], json.loads(args.merge[1]), args.file)
        return
    good, lines = check(args.file)
    print("\n".join(lines))
    sys.exit(not good)


if __name__ == "__main__":
    main()
