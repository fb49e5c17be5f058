"""FlashInfer compiles its kernels at first use, for minutes: once, on one rank of a node, and while the others wait."""

from __future__ import annotations

import importlib
import logging
import os
import time

import torch

from bench.team import Team
from bench.variant import Unavailable

MODULES = {
    "trtllm": "get_trtllm_comm_module",
    "vllm": "get_vllm_comm_module",
    "trtllm_mnnvl": "get_trtllm_mnnvl_comm_module",
}


def environment() -> None:
    """What FlashInfer should compile for, before it is imported: this GPU only."""
    major, minor = torch.cuda.get_device_capability()
    suffix = {9: "a", 10: "a", 12: "a"}.get(major, "")
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", f"{major}.{minor}{suffix}")


def build(kind: str) -> float:
    """Compiles and loads one of MODULES in this process; seconds it took."""
    environment()
    start = time.monotonic()
    try:
        module = importlib.import_module(f"flashinfer.comm.{kind}_ar")
    except ImportError as error:
        raise Unavailable(f"no flashinfer: {error}") from None
    logging.getLogger("flashinfer").setLevel(logging.ERROR)
    getattr(module, MODULES[kind])()
    return time.monotonic() - start


def build_in_turn(kind: str, team: Team) -> None:
    """`build` on all ranks, the first process of a node first. Collective; all ranks raise alike."""
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    failure = _try(kind) if first else None
    if (why := team.vote(failure)) is None:
        why = team.vote(None if first else _try(kind))
    if why is not None:
        raise Unavailable(why)


def _try(kind: str) -> str | None:
    try:
        build(kind)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[-500:]}"
    return None
