"""What becomes of a script on a GPU once a rule of the protocol is switched off, in a test build."""

from __future__ import annotations

from typing import Any

from common.ranks import TEST_LIBRARY, RankPool, RanksFailed
from replay.gpu import serve
from replay.host import total
from replay.script import Profile, vllm


def in_virtual_ranks(rank: Any, seed: int, off: str, named: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs by a single process, whose virtual ranks may be left hanging."""
    from common.virtual_ranks import VirtualRanks

    sizes: dict[str, Any] = {
        "hidden": 2048,
        "layers": 2,
        "max_tokens": 32,
        "forwards": 60,
        "late": 0.001,
        "impatient": True,
    }
    script = vllm(Profile(2, seed, **sizes))
    return VirtualRanks(2).run(serve, script, off, timeout=40, **{"deadline": 1.0, **named})


def symptom(off: str, **named: Any) -> str:
    """What goes wrong without the rules, or "" if nothing does."""
    pool = RankPool(1, "cuda", library=TEST_LIBRARY, env={"CUDA_DEVICE_MAX_CONNECTIONS": "32"})
    try:
        (figures,) = pool.run(in_virtual_ranks, 5, off, named, timeout=60)
        wrong = total(figures)["wrong_by_form"]
        return f"wrong rows: {wrong}" if wrong else ""
    except RanksFailed as failed:
        return str(failed)
    finally:
        pool.discard()
