"""The process of one scenario: starts the server, measures, and tells each thing as it ends (`events`).

    python -m servers.scenario NAME WORK FOLDER

WORK has models/, outputs/ and caches that later scenarios find again; FOLDER is this scenario's own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from servers import answers, client, counts, measures, sglang_server, vllm_server
from servers.events import Teller
from servers.modes import ARGUMENTS_OF_FAULTS, arguments, ours_is_active
from servers.plan import FEW_SIZES, Scenario, scenarios

WORDS: dict[str, Any] = {"vllm": vllm_server, "sglang": sglang_server}
PORT = 18731
START_PATIENCE = 280.0  # seconds


def keywords(scenario: Scenario, models: Path) -> dict[str, Any]:
    """What the server is started with, beside its model."""
    found = {**WORDS[scenario.server].USUAL, **arguments(scenario.server, scenario.mode), **scenario.extra}
    if scenario.is_fault:
        found |= ARGUMENTS_OF_FAULTS[scenario.server]
    if scenario.server == "vllm" and scenario.model.layers < 32:
        drafted = found.get("speculative_config", {}).get("num_speculative_tokens", 0)
        sizes = [size for size in FEW_SIZES if size <= found["max_num_seqs"] * (1 + drafted)]
        found["compilation_config"] = {**found["compilation_config"], "cudagraph_capture_sizes": sizes}
    if scenario.drafter is not None:
        found["speculative_config"] = {**found["speculative_config"], "model": str(models / scenario.drafter.name)}
    return found


def run(scenario: Scenario, work: Path, folder: Path) -> None:
    teller, words = Teller(folder / "events.jsonl"), WORDS[scenario.server]
    if scenario.is_ours and (why_not := ours_is_active(scenario.server)):
        raise SystemExit(f"the server is not started: FlashInfer's own mnnvl could run, as {why_not}")
    teller.tell("installed", version=words.version(), **versions())
    for model in filter(None, (scenario.model, scenario.drafter)):
        if not (work / "models" / model.name / "config.json").exists():
            make = [sys.executable, "-m", "servers.models.make", str(work / "models"), json.dumps(asdict(model))]
            subprocess.run(make, check=True)
    teller.tell("written")
    given = keywords(scenario, work / "models")
    model_folder, began = work / "models" / scenario.model.name, time.perf_counter()
    try:
        with _started(scenario, model_folder, given) as server:
            teller.tell("started", seconds=time.perf_counter() - began)
            subject = measures.Subject(
                *(words, server, PORT, scenario.model, folder),
                *(answers.folder(work, scenario.server), scenario.name, teller),
            )
            for measure in scenario.measures:
                before = counts.settled(folder / "calls", time.time()) if scenario.is_ours else []
                found = measures.KINDS[measure.kind](subject, **measure.options)
                served = measures.counted(subject, before) if scenario.is_ours else {}
                teller.tell("measured", kind=measure.kind, options=measure.options, counted=served, **found)
    except BaseException as error:  # what a server raises when its engine has died differs
        teller.tell("raised", type=type(error).__name__, text=str(error)[:500])
        raise
    teller.tell("ended")


@contextmanager
def _started(scenario: Scenario, model: Path, given: dict[str, Any]) -> Iterator[Any]:
    """The offline server, or None while the one of HTTP listens."""
    words = WORDS[scenario.server]
    if not scenario.http:
        yield words.Offline(model, given)
        return
    process = subprocess.Popen(words.command(model, given, PORT))
    try:
        end = time.monotonic() + START_PATIENCE
        while client.get(PORT, "/health") != 200:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with status {process.returncode} while it started")
            if time.monotonic() > end:
                raise RuntimeError(f"the server was not healthy within {START_PATIENCE:g} s")
            time.sleep(0.5)
        yield None
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def versions() -> dict[str, str]:
    return {name: answers.release(name) for name in ("torch", "flashinfer-python", "transformers", "mnnvl-ar")}


if __name__ == "__main__":
    chosen = next(each for each in scenarios() if each.name == sys.argv[1])
    status = 0
    try:
        run(chosen, Path(sys.argv[2]), Path(sys.argv[3]))
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)  # a server's own end can take long, and all has been told; the runner ends what is left
