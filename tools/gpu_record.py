"""What was run on GPUs, on which hardware and from which sources: tools/gpu_record.json.

    python -m tools.gpu_record --check             fresh, stale or not run, by kind of result, and what changed since;
                                                   exits 1 when something is stale, failed or was left out
    python -m tools.gpu_record --join A.json ...   takes over what other records hold; runs of the same GPUs and
                                                   sources are added up

The file: `runs` of tests, an entry for each number and kind of GPUs that tests need ("2 x NVIDIA H200") and part;
`figures` of other programs by key; and `sources`. How many more GPUs the machine had does not count: a test that needs
one gives the same result beside seven others. A part is a kind of result (`sources.PARTS`): it says which files an
entry rests on. `digest` of an entry names the snapshot in `sources` of the files it was run from, with a digest of
each, so that a check can say what changed. A run replaces the one of the same GPUs and part and leaves the others
alone. `make gpu-test` (tools/gpu_campaign.py) joins the records of all its processes.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.sources import PARTS, ROOT, digest, rests_on, room_of, snapshot

FILE = Path(__file__).with_name("gpu_record.json")
# Part of runs that were recorded before there were parts: all tests in one entry.
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
    """Records a run of tests on the GPUs that this process sees.

    outcomes: by test ("tests/gpu/test_x.py::test_y"), the number of GPUs that it needs and "passed", "failed" or
    "skipped". left_out: tests that did not run, and the GPUs that they need; 0 of a file of which that is not known,
    as nothing of it was collected. Of a part of which nothing was, nothing is said. Tests that need more GPUs than are
    seen are nowhere: they could not be run.
    """
    record, about, (here, name) = load(file), _about(), _gpus()
    known = (*outcomes, *(test for test, need in left_out.items() if need))
    for part in sorted({part_of(test) for test in known}):
        ran = {test: what for test, what in outcomes.items() if part_of(test) == part}
        left = {test: need or here for test, need in left_out.items() if part_of(test) == part}
        for need in sorted({gpus for gpus in (*(gpus for gpus, _ in ran.values()), *left.values()) if gpus <= here}):
            tests = dict(NO_TESTS)
            for outcome in (outcome for gpus, outcome in ran.values() if gpus == need):
                tests[outcome] += 1
            run = {**about, "hardware": hardware(need, name), "gpus": need, "tests": tests}
            run["left_out"] = sorted(test for test, gpus in left.items() if gpus == need)
            _put_run(record, {**run, **_made(record, part)})
    _write(file, record)


def part_of(test: str) -> str:
    """The part whose room the file of a test is in. Tests that are in none rest on everything."""
    room = room_of(test.split("::")[0])
    return room if room in PARTS else "other tests"


def join(others: Iterable[Path], file: Path = FILE) -> None:
    """Takes over all entries of `others`. Their runs of the same GPUs, part and digest add up to one run."""
    record, runs = load(file), dict[tuple[str, str], Entry]()
    for other in map(load, others):
        record["sources"].update(other["sources"])
        record["figures"].update(other["figures"])
        for run in other["runs"].values():
            key = run["hardware"], run["part"]
            if key in runs and runs[key]["digest"] == run["digest"]:
                runs[key] = _sum(runs[key], run)
            elif key not in runs or _has_run(run):
                runs[key] = run
    for run in runs.values():
        _put_run(record, run)
    _write(file, record)


def _sum(one: Entry, two: Entry) -> Entry:
    """One run, of which two processes made some of the tests each."""
    tests = {key: one["tests"][key] + two["tests"][key] for key in NO_TESTS}
    return {**two, "tests": tests, "left_out": left_out_of_both(one["left_out"], two["left_out"])}


def left_out_of_both(one: Sequence[str], two: Sequence[str]) -> list[str]:
    """The tests, and the files of which nothing was collected, that neither of two runs has run. A run that left a file
    out left out whatever the other one left out of it."""

    def lacks(run: Sequence[str], test: str) -> bool:
        return test in run or test.split("::")[0] in run

    return [test for test in sorted({*one, *two}) if lacks(one, test) and lacks(two, test)]


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
    return "tests" not in entry or bool(entry["tests"]["passed"] or entry["tests"]["failed"])


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


def hardware(gpus: int, name: str) -> str:
    """As entries are named: "8 x NVIDIA H200"."""
    return f"{gpus} x {name}"


def _gpus() -> tuple[int, str]:
    """How many this process sees, and what they are."""
    import torch

    count = torch.cuda.device_count()
    return count, " and ".join(sorted({torch.cuda.get_device_name(i) for i in range(count)})) or "no GPU"


def gpu_name() -> str:
    return _gpus()[1]


def _about() -> Entry:
    """Hardware and software of this process."""
    import torch

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return {
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
    and no test failed or was left out. Parts and numbers of GPUs that nobody ran are listed as not run; they do not
    count against it, since not everybody has eight GPUs."""
    record, now = load(file), snapshot(root)
    if not record["runs"]:
        return False, [f"GPU record: none in {file.name}; make it by `make gpu-test` where there are GPUs"]
    good, lines = True, list[str]()
    for part in dict.fromkeys([*PARTS, *sorted(entry["part"] for _, entry in _entries(record))]):
        entries = [(name, entry) for name, entry in _entries(record) if entry["part"] == part]
        listed: set[str] = set()  # sources whose changes are in `lines` already
        lines += [] if entries else [f"GPU record: {part}: not run"]
        for name, entry in entries:
            changed, left_out = _changed(record, entry, now), entry.get("left_out", [])
            state = "not run" if not _has_run(entry) else "STALE" if changed else "fresh"
            lines.append(f"GPU record: {part}: {state}: {name} ({entry['date']}{_counts(entry)})")
            lines += [f"  {line}" for line in changed if entry["digest"] not in listed]
            lines += [f"  left out: {len(left_out)} tests, such as {left_out[0]}"] if left_out else []
            listed.add(entry["digest"])
            good = good and not changed and not _failed(entry) and not left_out
    sizes = {entry["gpus"] for entry in record["runs"].values() if _has_run(entry)}
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
    return int(entry.get("failed", False)) + int(entry.get("tests", NO_TESTS)["failed"])


def _counts(entry: Entry) -> str:
    if "tests" not in entry:
        return ", FAILED" if _failed(entry) else ""
    return f", {entry['tests']['passed']} passed, {_failed(entry)} failed"


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
