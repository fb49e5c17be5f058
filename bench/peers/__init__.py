"""The peers: one file each. Each is imported only when it is asked for, and skipped with a reason where it cannot
run."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.team import Team
    from bench.variant import Limits, Peer

PEERS = {
    "yardsticks": "bench.peers.yardsticks:Yardsticks",
    "nccl": "bench.peers.nccl:Nccl",
    "nccl_symmetric": "bench.peers.nccl:NcclSymmetric",
    "symm_mem": "bench.peers.symm_mem:SymmMem",
    "flashinfer": "bench.peers.flashinfer_trtllm:FlashInferTrtllm",
    "flashinfer_quantised": "bench.peers.flashinfer_quantised:FlashInferQuantised",
    "vllm": "bench.peers.flashinfer_vllm:FlashInferVllm",
    "vllm_quantised": "bench.peers.vllm_quantised:VllmQuantised",
    "flashinfer_mnnvl": "bench.peers.flashinfer_mnnvl:FlashInferMnnvl",
    "gloo": "bench.peers.gloo:Gloo",
    "twin": "bench.peers.twin:Twin",  # only where it is asked for
}
ANY_OP = ("yardsticks", "flashinfer_quantised", "vllm_quantised")  # the others cannot quantise
ON_GPU = (
    *("yardsticks", "nccl", "nccl_symmetric", "symm_mem", "flashinfer"),
    *("flashinfer_quantised", "vllm", "vllm_quantised", "flashinfer_mnnvl"),
)
ON_HOST = ("gloo",)


def make(name: str, team: Team, limits: Limits) -> Peer:
    module, cls = PEERS[name].split(":")
    peer: Peer = getattr(importlib.import_module(module), cls)(team, limits)
    return peer
