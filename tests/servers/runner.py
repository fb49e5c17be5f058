"""Runs scenarios, each in a process of its own with a time limit, and adds each to the record as it ends. What a
scenario has started ends with it, also if the runner is told to end (`ends_when_told`), and at the latest when the next
runner with its folder begins (`end_all`): a server that is left holds half of each GPU."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from servers import events, faults, judge, modes
from servers.plan import PATIENCE, Scenario

ROOT = Path(__file__).resolve().parent.parent.parent
MARK = "SERVERS_SCENARIO"  # in the environment of all that a scenario starts: what is left of it is found by that
SPARE = 5.0  # seconds in which a scenario that comes to the end of all time is ended and recorded
FAULT_STEP = 20  # of a decode; of prefills there are few


@dataclass
class Ended:
    log: judge.Lines
    cut: str
    seconds: float


def why_not(scenario: Scenario, gpus: int) -> str:
    """Why this scenario cannot run here; empty if it can."""
    needed = 2 if scenario.server else 1
    if gpus < needed:
        return f"needs {needed} GPUs, {gpus} here"
    if scenario.server:
        try:
            metadata.version(scenario.server)
        except metadata.PackageNotFoundError:
            return f"{scenario.server} is not installed"
        if scenario.is_ours and (reason := modes.ours_is_active_in_a_child(scenario.server, scenario.mode)):
            return f"ours would not be active: {reason}"
    return ""


def ends_when_told() -> None:
    """SIGTERM, as of `timeout`, is an exception from here on."""

    def end(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)


def run(scenario: Scenario, work: Path, out: Path, limit: float = math.inf) -> dict[str, Any]:
    """The record of it. `out` gets its log and events. limit: seconds, beside its own."""
    folder = out / scenario.name.replace("/", ".")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "calls").mkdir(parents=True)
    limit = min(limit, scenario.limit)
    ended = process(command(scenario, work, folder), environment(scenario, work, folder), limit, folder, scenario)
    told = events.read(folder / "events.jsonl")
    found = judge.judged(scenario, told, ended.log, ended.cut, _harmed(folder))
    return {**found, "seconds": ended.seconds, "when": time.time()}


def command(scenario: Scenario, work: Path, folder: Path) -> list[str]:
    if scenario.server:
        return [sys.executable, "-m", "servers.scenario", scenario.name, str(work), str(folder)]
    model, told = work / "models" / scenario.model.name, folder / "events.jsonl"
    return [sys.executable, "-m", "servers.against_fp32", *map(str, (model, scenario.subject, work, told))]


def environment(scenario: Scenario, work: Path, folder: Path) -> dict[str, str]:
    """The tests' folder comes last on the path, and the root, where an unbuilt mnnvl_ar may lie, not at all."""
    added = modes.environment(scenario.server, scenario.mode, folder / "calls", is_fault=scenario.is_fault)
    added |= scenario.environment
    path = [
        each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each and Path(each).resolve() != ROOT
    ]
    if scenario.is_fault:
        faults.install(folder / "plugin")
        path.append(str(folder / "plugin"))
        asked = next(each.options for each in scenario.measures if each.kind == "fault")
        step = {"decode": FAULT_STEP}.get(asked["where"], 1)
        harm = {**asked, "step": step, "seconds": 3 * modes.DEADLINE, "folder": str(folder)}
        added[faults.VARIABLE] = json.dumps(harm)
    path = [each for each in path if Path(each).resolve() != ROOT / "tests"] + [str(ROOT / "tests")]
    return {**os.environ, **added, "PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1", MARK: str(folder)}


def process(
    command: Sequence[str],
    environment: dict[str, str],
    limit: float,
    folder: Path,
    scenario: Scenario | None = None,
    patience: float = PATIENCE,
) -> Ended:
    """Runs it in `folder`; its log goes to folder/log, each line with the Unix time. It is ended by `limit`, or, after
    a fault was done, by `patience`; and so is all that it has left."""
    began, lines, cut = time.monotonic(), judge.Lines(), ""
    child = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    reader = threading.Thread(target=_read, args=(child, lines, folder / "log"), daemon=True)
    reader.start()
    try:
        while child.poll() is None and not cut:
            time.sleep(0.05)
            harmed = _harmed(folder)
            if time.monotonic() - began > limit:
                cut = f"ended by its limit of {limit:.0f} s"
            elif harmed is not None and time.time() - harmed > patience + (
                modes.STARTUP_DEADLINE if _starts(scenario) else 0
            ):
                cut = f"the server had not ended {patience:g} s after the fault"
        if child.returncode is not None and child.returncode != 0 and not cut:
            events.Teller(folder / "events.jsonl").tell("gone", status=child.returncode)
    finally:
        end_all(environment[MARK])
        child.wait()
    reader.join(5.0)
    return Ended(list(lines), cut, time.monotonic() - began)


def _starts(scenario: Scenario | None) -> bool:
    return scenario is not None and any(each.options.get("where") == "start-up" for each in scenario.measures)


def _harmed(folder: Path) -> float | None:
    for file in folder.glob("harmed.*"):
        with contextlib.suppress(ValueError):  # not yet written
            return float(file.read_text())
    return None


def _read(child: subprocess.Popen[bytes], lines: judge.Lines, file: Path) -> None:
    assert child.stdout is not None
    with file.open("w", buffering=1) as out:
        for raw in child.stdout:
            line = raw.decode(errors="replace").rstrip()
            lines.append((time.time(), line))
            out.write(f"{lines[-1][0]:.2f} {line}\n")


def end_all(folder: str | Path) -> list[int]:
    """Ends every process whose mark is this folder, or one in it, stopped ones too. Returns them."""
    wanted, found = f"{MARK}={folder}".encode(), []
    for place in Path("/proc").iterdir():
        if place.name.isdigit() and int(place.name) != os.getpid():
            with contextlib.suppress(OSError):
                given = (place / "environ").read_bytes().split(b"\0")
                if any(each == wanted or each.startswith(wanted + b"/") for each in given):
                    os.kill(int(place.name), signal.SIGKILL)
                    found.append(int(place.name))
    return found


def expected(scenario: Scenario, before: Sequence[dict[str, Any]]) -> float:
    """Seconds that it will take: as planned, or a sixth more than recorded runs in which it measured something."""
    took = [
        run["seconds"]
        for run in before
        if run["scenario"] == scenario.name and (run["measured"] or run.get("fault", {}).get("harmed"))
    ]
    return min(1.15 * max(took), scenario.limit) if took else scenario.seconds


def campaign(
    wanted: Sequence[Scenario],
    seconds: float,
    one: Callable[[Scenario, float], dict[str, Any]],
    ended: Callable[[dict[str, Any]], None],
    before: Sequence[dict[str, Any]] = (),
) -> tuple[list[dict[str, Any]], list[Scenario]]:
    """Runs those in order that are expected to end in time, and gives each what is left of it; tells of progress. What
    is compared with fp32 has to have run. before: recorded runs, by which is expected. Returns the runs, and what there
    was no time for."""
    end, runs, not_run = time.monotonic() + seconds, list[dict[str, Any]](), list[Scenario]()
    for place, scenario in enumerate(wanted):
        left, takes = end - time.monotonic(), expected(scenario, before)
        lacks = scenario.mode == "fp32" and scenario.subject in {each.subject for each in not_run}
        if takes > left or lacks:
            not_run.append(scenario)
            continue
        later = [expected(each, before) for each in wanted[place + 1 :]]
        print(f"{scenario.name}: begins, some {takes:.0f} s; {left:.0f} s left, {len(later)} more wait,"
              f" some {sum(later):.0f} s", flush=True)  # fmt: skip
        run = one(scenario, left - SPARE)
        runs.append(run)
        ended(run)
        said = "passed" if run["passed"] else "FAILED: " + "; ".join(run["problems"])
        print(f"{scenario.name}: {said} ({run['seconds']:.0f} s)", flush=True)
    return runs, not_run
