"""What becomes of a script on a GPU once a rule of the protocol is switched off, in a test build."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from common.ranks import TEST_LIBRARY, RankPool, RanksFailed
from replay.gpu import serve
from replay.host import total
from replay.script import Profile, vllm

ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}  # a hardware queue for each stream


class Controls:
    """A process for each control, since one may leave kernels behind; they start, which takes long, side by side."""

    def __init__(self, names: Iterable[str]) -> None:
        self.pools = {name: RankPool(1, "cuda", library=TEST_LIBRARY, env=ENVIRONMENT) for name in names}
        for running in [pool.start(warm) for pool in self.pools.values()]:
            running.results(120)

    def symptom(self, name: str, off: str, **named: Any) -> str:
        """What goes wrong without the rules in `off`, or "" if nothing does."""
        deadline = 1.0 if off else 20.0
        try:
            (figures,) = self.pools[name].run(in_virtual_ranks, off, {"deadline": deadline, **named}, timeout=60)
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
    """CUDA's start, and loading the kernels."""
    from common.virtual_ranks import VirtualRanks

    VirtualRanks(2).run(_open_and_close)


def _open_and_close(rank: Any) -> None:
    rank.new_workspace(hidden=64).close()


def in_virtual_ranks(rank: Any, off: str, named: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs by a single process, whose threads are the ranks."""
    from common.virtual_ranks import VirtualRanks

    script = vllm(
        Profile(2, 5, hidden=2048, layers=2, max_tokens=32, forwards=60, late=0.001, eager=0.25, impatient=True)
    )
    return VirtualRanks(2).run(serve, script, off, timeout=45, **named)
