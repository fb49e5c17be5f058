"""A server's own limit for a step, which has to be longer than a call waits for its peers: else the server ends first,
and nobody is named.

    vLLM     VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS: the engine waits so long for a step's answer
    SGLang   --watchdog-timeout: the scheduler's process ends when no forward has ended for so long
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

SHARE = 0.5  # of the limit, at most, that a call waits: the step before the wait, and our end, have the rest


class StepLimit(NamedTuple):
    name: str
    seconds: float


# Module of the server's, loaded by the time that a workspace is made, and the value in it; the first that can be read.
_READ: dict[str, tuple[str, tuple[tuple[str, Callable[[Any], Any]], ...]]] = {
    "vllm": (
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS",
        (("vllm.envs", lambda envs: envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS),),
    ),
    "sglang": (
        "--watchdog-timeout",
        (
            ("sglang.srt.runtime_context", lambda context: context.get_device().watchdog_timeout),  # from 0.5.17 on
            ("sglang.srt.server_args", lambda arguments: arguments.get_global_server_args().watchdog_timeout),
        ),
    ),
}


def of_a_step(server: str) -> StepLimit | None:
    """None where this process is no server's, where it has none, or where it cannot be read."""
    name, places = _READ.get(server, ("", ()))
    for module, read in places:
        try:
            seconds = float(read(sys.modules[module]))
        except Exception:  # another release's way, a value of None, arguments that are not there yet
            continue
        if seconds > 0:
            return StepLimit(name, seconds)
    return None
