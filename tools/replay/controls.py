"""What goes wrong with a script on two GPUs when a rule of the protocol is switched off, in a test build."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from common.ranks import TEST_LIBRARY, RankPool, RanksFailed
from tools.replay.gpu import serve
from tools.replay.host import total
from tools.replay.script import Profile, vllm

SIZES: dict[str, Any] = {"hidden": 2048, "layers": 2, "max_tokens": 32, "forwards": 60, "late": 0.001}
SCRIPT = vllm(Profile(2, 5, eager=0.25, impatient=True, aside=False, **SIZES))


class Controls:
    """Processes for each control, since a control may leave kernels running. All start at once, as that is slow."""

    def __init__(self, names: Iterable[str]) -> None:
        self.pools = {name: RankPool(2, "cuda", library=TEST_LIBRARY) for name in names}
        for running in [pool.start(warm) for pool in self.pools.values()]:
            running.results(120)

    def symptom(self, name: str, off: str, **named: Any) -> str:
        """What goes wrong without the rules in `off`, or "" if nothing does."""
        deadline = 1.0 if off else 20.0
        try:
            figures = self.pools[name].run(serve, SCRIPT, off, deadline=deadline, timeout=45, **named)
            wrong = total(figures)["wrong_by_form"]
            return f"wrong rows: {wrong}" if wrong else ""
        except RanksFailed as failed:
            return str(failed)
        finally:
            self.pools[name].discard()

    def close(self) -> None:
        for pool in self.pools.values():
            pool.discard()


def warm(rank: Any) -> None:
    """Initialises CUDA and loads the kernels."""
    rank.new_workspace(hidden=64).close()
