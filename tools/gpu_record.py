"""What was run on GPUs, on which hardware and from which sources: tools/gpu_record.json.

    python -m tools.gpu_record --check             fresh, stale or not run, by kind of result, and what changed since;
                                                   exits 1 when something is stale, failed or was left out
    python -m tools.gpu_record --join A.json ...   takes over what other records hold; runs of the same hardware and the
                                                   same sources are added up

The file: `runs` of tests, an entry for each hardware ("8 x NVIDIA H200") and part; `figures` of other programs by key;
and `sources`. A part is a kind of result (`sources.PARTS`): it says which files an entry rests on. `digest` of an entry
names the snapshot in `sources` of the files it was run from, with a digest of each, so that a check can say what
changed. A run replaces the one of the same hardware and part and leaves the others alone. `make gpu-test`
(tools/gpu_campaign.py) joins the records of all its processes.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tools.sources import PARTS, ROOT, digest, rests_on, room_of, snapshot

FILE = Path(__file__).with_name("gpu_record.json")
# Part of runs that were recorded before there were parts: all tests of a hardware in one entry.
ALL_TESTS = "all tests"
NO_TESTS = {"passed": 0, "failed": 0, "skipped": 0}
Entry = dict[str, Any]


def load(file: Path) -> dict[str, Any]:
    empty: dict[str, Any] = {"runs": {}, "figures": {}, "sources": {}}
    return {**empty, **json.loads(file.read_text())} if file.exists() else empty


def merge(part: str, key: str, figures: dict[str, Any], file: Path = FILE, *, good: bool = True) -> None:
    """Adds the figures of another program (soak, replays, faults), replacing those of the same key. good: whether it
    found all as it should be."""
    record = load(file)
    record["figures"][key] = {**figures, **_made(record, part), **({} if good else {"failed": True})}
    _write(file, record)


def write_run(file: Path, outcomes: Mapping[str, tuple[int, str]], left_out: Mapping[str, int]) -> None:
    """Records a run of tests on the GPUs at hand.

    outcomes: by test ("tests/gpu/test_x.py::test_y"), the number of GPUs that it needs and "passed", "failed" or
    "skipped". left_out: tests that neither ran nor were skipped for want of GPUs, and the GPUs that they need.
    """
    record, about = load(file), _about()
    for part in sorted({part_of(test) for test in (*outcomes, *left_out)}):
        tests: dict[str, dict[str, int]] = {}
        for gpus, outcome in (what for test, what in outcomes.items() if part_of(test) == part):
            tests.setdefault(str(gpus), dict(NO_TESTS))[outcome] += 1
        run = {**about, "tests": tests, "left_out": {test: n for test, n in left_out.items() if part_of(test) == part}}
        run["world_sizes"] = sorted(int(gpus) for gpus, count in tests.items() if count["passed"])
        _put_run(record, {**run, **_made(record, part)})
    _write(file, record)


def part_of(test: str) -> str:
    """The part whose room the file of a test is in. Tests that are in none rest on everything."""
    room = room_of(test.split("::")[0])
    return room if room in PARTS else "other tests"


def join(others: Iterable[Path], file: Path = FILE, hardware: str | None = None, gpus: int | None = None) -> None:
    """Takes over all entries of `others`. Their runs of one hardware, part and digest add up to one run.

    hardware: counts every run of `others` as one on this, such as "4 x NVIDIA H200" for tests that saw two of the four.
    gpus: so many there are in all; tests that need more were not left out, but could not be run.
    """
    record, runs = load(file), dict[tuple[str, str], Entry]()
    for other in map(load, others):
        record["sources"].update(other["sources"])
        record["figures"].update(other["figures"])
        for run in other["runs"].values():
            if hardware is not None:
                run["hardware"] = hardware
            if gpus is not None:
                run["left_out"] = {test: need for test, need in run.get("left_out", {}).items() if need <= gpus}
            key = run["hardware"], run["part"]
            runs[key] = _sum(runs[key], run) if key in runs and runs[key]["digest"] == run["digest"] else run
    for run in runs.values():
        _put_run(record, run)
    _write(file, record)


def _sum(one: Entry, two: Entry) -> Entry:
    """One run, of which two processes made some of the tests each."""
    tests = {
        gpus: {key: one["tests"].get(gpus, NO_TESTS)[key] + two["tests"].get(gpus, NO_TESTS)[key] for key in NO_TESTS}
        for gpus in sorted({*one["tests"], *two["tests"]}, key=int)
    }
    return {
        **two,
        "tests": tests,
        "world_sizes": sorted({*one["world_sizes"], *two["world_sizes"]}),
        "left_out": left_out_of_both(one.get("left_out", {}), two.get("left_out", {})),
    }


def left_out_of_both(one: dict[str, int], two: dict[str, int]) -> dict[str, int]:
    """The tests, and the files of which nothing was collected, that neither of two runs has run, with the GPUs they
    need. A run that left a file out left out whatever the other one left out of it."""

    def lacks(run: dict[str, int], test: str) -> bool:
        return test in run or test.split("::")[0] in run

    return {test: need for test, need in {**one, **two}.items() if lacks(one, test) and lacks(two, test)}


def _put_run(record: dict[str, Any], run: Entry) -> None:
    """A run in which no test of the part was run does not replace one in which some were."""
    key = f"{run['hardware']}: {run['part']}"
    if _has_run(run):
        record["runs"].pop(f"{run['hardware']}: {ALL_TESTS}", None)
    elif key in record["runs"] and _has_run(record["runs"][key]):
        return
    record["runs"][key] = run


def _has_run(entry: Entry) -> bool:
    """Always true of figures."""
    return "tests" not in entry or any(count["passed"] or count["failed"] for count in entry["tests"].values())


def _made(record: dict[str, Any], part: str) -> Entry:
    """What every entry says: its part, the sources it was run from, and the date."""
    files = snapshot()
    record["sources"][digest(files)] = files
    return {"part": part, "digest": digest(files), "date": time.strftime("%Y-%m-%d", time.gmtime())}


def _write(file: Path, record: dict[str, Any]) -> None:
    """Sources that no entry names any more are dropped."""
    named = {entry["digest"] for _, entry in _entries(record)}
    record["sources"] = {name: files for name, files in record["sources"].items() if name in named}
    file.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def _entries(record: dict[str, Any]) -> Iterator[tuple[str, Entry]]:
    """(name, entry) of all runs and figures."""
    yield from ((run["hardware"], run) for run in record["runs"].values())
    yield from record["figures"].items()


def hardware() -> str:
    """What this process sees, such as "8 x NVIDIA H200"."""
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return " + ".join(f"{names.count(name)} x {name}" for name in sorted(set(names))) or "no GPU"


def _about() -> Entry:
    """Hardware and software of this process."""
    import torch

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return {
        "hardware": hardware(),
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def changes(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """One line a file that was changed, added or removed."""
    paths = [path for path in sorted({*then, *now}) if then.get(path) != now.get(path)]
    return [f"{'removed' if path not in now else 'added' if path not in then else 'changed'} {path}" for path in paths]


def check(file: Path = FILE, root: Path = ROOT) -> tuple[bool, list[str]]:
    """(fresh?, what to say, part by part). Fresh: there is a run, the files that each entry rests on are as they were,
    and no test failed or was left out. Parts and world sizes that nobody ran are listed as not run; they do not count
    against it, since not everybody has eight GPUs."""
    record, now = load(file), snapshot(root)
    if not record["runs"]:
        return False, [f"GPU record: none in {file.name}; make it by `make gpu-test` where there are GPUs"]
    good, lines = True, list[str]()
    for part in dict.fromkeys([*PARTS, *sorted(entry["part"] for _, entry in _entries(record))]):
        entries = [(name, entry) for name, entry in _entries(record) if entry["part"] == part]
        listed: set[str] = set()  # sources whose changes are in `lines` already
        lines += [] if entries else [f"GPU record: {part}: not run"]
        for name, entry in entries:
            changed, left_out = _changed(record, entry, now), entry.get("left_out", {})
            state = "not run" if not _has_run(entry) else "STALE" if changed else "fresh"
            lines.append(f"GPU record: {part}: {state}: {name} ({entry['date']}{_counts(entry)})")
            lines += [f"  {line}" for line in changed if entry["digest"] not in listed]
            lines += [f"  left out: {len(left_out)} tests, such as {min(left_out)}"] if left_out else []
            listed.add(entry["digest"])
            good = good and not changed and not _failed(entry) and not left_out
    sizes = {size for entry in record["runs"].values() for size in entry["world_sizes"]}
    return good, lines + [f"GPU record: not run: {size} GPUs" for size in (2, 4, 8) if size not in sizes]


def fresh(file: Path = FILE, root: Path = ROOT) -> set[str]:
    """Keys of the runs and figures that need not be made again: whole, without a failure, and of today's sources."""
    record, now = load(file), snapshot(root)
    return {
        key
        for key, entry in (*record["runs"].items(), *record["figures"].items())
        if _has_run(entry) and not (_changed(record, entry, now) or _failed(entry) or entry.get("left_out"))
    }


def _changed(record: dict[str, Any], entry: Entry, now: dict[str, str]) -> list[str]:
    """Of what an entry rests on. What has not run rests on nothing."""
    known = record["sources"].get(entry["digest"], {})
    return changes(rests_on(entry["part"], known), rests_on(entry["part"], now)) if _has_run(entry) else []


def _failed(entry: Entry) -> int:
    """Tests; of figures 1, if what they are of was not as it should be."""
    return sum((int(entry.get("failed", False)), *(count["failed"] for count in entry.get("tests", {}).values())))


def _counts(entry: Entry) -> str:
    if "tests" not in entry:
        return ", FAILED" if _failed(entry) else ""
    passed = sum(count["passed"] for count in entry["tests"].values())
    return f", {passed} passed, {_failed(entry)} failed, world sizes {entry['world_sizes']}"


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
