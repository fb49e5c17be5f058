"""As it is, with FlashInfer's trtllm, and with ours: a server's environment and arguments. Ours comes in two ways: in
place of FlashInfer's functions, and as `torch.ops` with FlashInfer's all-reduce off ("ops").

As it is: without FlashInfer's all-reduce fusion. Left to itself vLLM 0.26 takes FlashInfer's mnnvl on an H200, which
makes NVLink multicast; so that backend is named in no mode but "ours", and there only after `ours_is_active` has said
that the plugin will stand in for it. Multicast is switched off by every variable that there is, in all modes.
"""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

MODES = ("ours", "as_is", "trtllm")  # that are compared
OURS = ("ours", "ops")
SERVERS = ("vllm", "sglang")
DEADLINE, STARTUP_DEADLINE = 8.0, 60.0  # seconds, in fault scenarios
# Few sequences, hence few graphs: a start is quick.
ARGUMENTS_OF_FAULTS: dict[str, dict[str, Any]] = {"vllm": {"max_num_seqs": 8}, "sglang": {"max_running_requests": 8}}
# What a server says that fuses with FlashInfer's trtllm, and what it says when it goes on without.
FUSES = {
    "vllm": "Initialized FlashInfer Allreduce norm fusion workspace with backend=trtllm",
    "sglang": "FlashInfer AllReduce Fusion enabled and workspace initialized: backend=trtllm",
}
GIVES_UP = {
    "vllm": (
        "Failed to initialize FlashInfer Allreduce norm fusion workspace",
        "Flashinfer allreduce-norm fusion will be disabled",
        "AllReduce fusion pass is disabled",
        "skipping allreduce fusion pass",
    ),
    "sglang": (
        "Failed to initialize FlashInfer workspace",
        "Skipping allreduce fusion",
        "allreduce fusion disabled globally",
        "falling back to standard implementation",
        "skipping workspace initialization",
    ),
}
_NO_MULTICAST = {
    "MNNVL_AR_DISABLE_MULTICAST": "1",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NCCL_NVLS_ENABLE": "0",
    "NVSHMEM_DISABLE_NVLS": "1",
}
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"}
_VLLM = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # would be compiled at its first use
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",  # needs multicast
    "VLLM_FLASHINFER_ALLREDUCE_BACKEND": "trtllm",
}
_SGLANG = {"SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0"}


def environment(server: str, mode: str, calls: Path, *, is_fault: bool = False) -> dict[str, str]:
    """What is added to the environment of the scenario. `calls`: the folder for counts."""
    found = {**_NO_MULTICAST, **_OFFLINE, **(_VLLM if server == "vllm" else _SGLANG)}
    if mode not in OURS:
        return {**found, "MNNVL_AR": "0"}
    found |= {"MNNVL_AR": "1", "MNNVL_AR_FALLBACK": "0", "MNNVL_AR_CALLS": str(calls)}
    if mode == "ops":
        # A graph from vLLM's cache was compiled by another process, which counted its calls.
        found |= {"MNNVL_AR_THROUGH": "ops", "VLLM_DISABLE_COMPILE_CACHE": "1"}
    elif server == "vllm":
        found["VLLM_FLASHINFER_ALLREDUCE_BACKEND"] = "mnnvl"
    if is_fault:
        found |= {"MNNVL_AR_DEADLINE": f"{DEADLINE:g}", "MNNVL_AR_STARTUP_DEADLINE": f"{STARTUP_DEADLINE:g}"}
    return found


def arguments(server: str, mode: str) -> dict[str, Any]:
    """Of `LLM` or `sgl.Engine`, and, by their names, of the command line."""
    if server == "vllm":
        passes = {"fuse_allreduce_rms": mode in ("ours", "trtllm")}
        return {"compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE", "pass_config": passes}}
    if mode in ("as_is", "ops"):
        return {"enforce_disable_flashinfer_allreduce_fusion": True}
    return {"flashinfer_allreduce_fusion_backend": "mnnvl" if mode == "ours" else "trtllm"}


def ours_is_active(server: str) -> str:
    """Why the plugin would not stand in for FlashInfer's mnnvl in the servers started from here; empty if it will."""
    try:
        servers = importlib.import_module("mnnvl_ar.compat.servers")
    except ImportError as error:
        return f"mnnvl_ar cannot be imported: {error}"
    found = next(each for each in servers.examine() if each["server"] == server)
    return "" if found["active"] else str(found["why_not"])


@functools.cache
def ours_is_active_in_a_child(server: str, mode: str) -> str:
    """The same, asked in a process that is started as a scenario's is: without the root of this repository, where a
    package without metadata would be found."""
    program = f"from servers import modes; print(modes.ours_is_active({server!r}))"
    tests = Path(__file__).resolve().parent.parent
    path = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), str(tests)]
    through = {"MNNVL_AR_THROUGH": "ops"} if mode == "ops" else {}
    added = {"MNNVL_AR": "1", **through, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(path), **_NO_MULTICAST}
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tests,
        env={**os.environ, **added},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return found.stdout.strip() if found.returncode == 0 else found.stderr.strip()[-300:]
