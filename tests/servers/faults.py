"""A plugin of both servers that does one worker harm at a step of its own choice, so that nothing depends on a clock.

What and when is in the environment, SERVERS_FAULT, as JSON {"kind", "where", "rank", "step", "seconds", "folder"}:

    kind    "stop" and "kill": the signals, to itself. "delay": sleeps `seconds`. "raise": an exception
    where   "decode", "prefill": as the worker enters its `step`-th such step after FOLDER/armed is there; its peers are
            in that step, or on their way. "start-up": as it enters warm-up and capture

Before that it writes FOLDER/harmed.RANK: the Unix time. Entry points are only found beside metadata: `install` writes
that into a folder which is to be on PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIABLE = "SERVERS_FAULT"
KINDS = ("stop", "kill", "raise", "delay")
_steps = 0


def install(folder: Path) -> None:
    metadata = folder / "servers_faults-1.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: servers-faults\nVersion: 1\n")
    groups = {"vllm.general_plugins": "vllm", "sglang.srt.plugins": "sglang"}
    text = "".join(f"[{group}]\nservers_faults = servers.faults:{name}\n\n" for group, name in groups.items())
    (metadata / "entry_points.txt").write_text(text)


def vllm() -> None:
    """Called in each worker by `WorkerWrapperBase`, through which all calls to the worker go."""
    module: Any = sys.modules.get("vllm.v1.worker.worker_base")
    if VARIABLE not in os.environ or module is None:
        return
    wrapper = module.WorkerWrapperBase
    inner = wrapper.execute_model

    def execute_model(self: Any, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        counts = scheduled.num_scheduled_tokens.values()
        if counts:
            at_step(self.global_rank, "prefill" if max(counts) > 8 else "decode")
        return inner(self, scheduled, *args, **kwargs)

    def compile_or_warm_up_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        at_start_up(self.global_rank)
        return self.worker.compile_or_warm_up_model(*args, **kwargs)

    wrapper.execute_model = execute_model
    wrapper.compile_or_warm_up_model = compile_or_warm_up_model


def sglang() -> None:
    """Called first in each scheduler's process."""
    module: Any = sys.modules.get("sglang.srt.managers.scheduler")
    runner: Any = sys.modules.get("sglang.srt.model_executor.model_runner")
    if VARIABLE not in os.environ or module is None or runner is None:
        return
    step, capture = module.Scheduler.run_batch, runner.ModelRunner.init_cuda_graphs

    def run_batch(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        at_step(self.ps.tp_rank, "decode" if batch.forward_mode.is_decode() else "prefill")
        return step(self, batch, *args, **kwargs)

    def init_cuda_graphs(self: Any, *args: Any, **kwargs: Any) -> Any:
        at_start_up(self.ps.tp_rank)
        return capture(self, *args, **kwargs)

    module.Scheduler.run_batch = run_batch
    runner.ModelRunner.init_cuda_graphs = init_cuda_graphs


def at_step(rank: int, where: str) -> None:
    global _steps
    fault = _fault()
    if (rank, where) == (fault["rank"], fault["where"]) and (Path(fault["folder"]) / "armed").exists():
        _steps += 1
        if _steps == fault["step"]:
            _harm(fault, rank)


def at_start_up(rank: int) -> None:
    fault = _fault()
    if (rank, "start-up") == (fault["rank"], fault["where"]):
        _harm(fault, rank)


def _fault() -> dict[str, Any]:
    return dict(json.loads(os.environ[VARIABLE]))


def _harm(fault: dict[str, Any], rank: int) -> None:
    (Path(fault["folder"]) / f"harmed.{rank}").write_text(repr(time.time()))
    HARMS[fault["kind"]](fault)


def _raise(fault: dict[str, Any]) -> None:
    raise RuntimeError("servers.faults: raised on purpose")


HARMS: dict[str, Callable[[dict[str, Any]], object]] = {
    "stop": lambda fault: os.kill(os.getpid(), signal.SIGSTOP),
    "kill": lambda fault: os.kill(os.getpid(), signal.SIGKILL),
    "raise": _raise,
    "delay": lambda fault: time.sleep(fault["seconds"]),
}
