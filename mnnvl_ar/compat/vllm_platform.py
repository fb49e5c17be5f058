"""vLLM's CUDA platform, whose tensor-parallel group and compiled graphs call our ops. MNNVL_AR_THROUGH=ops.

vLLM asks its platform for the classes that sum and compile; this one is `CudaPlatform`, but for those two
(`vllm_classes`), and for FlashInfer's fusion, which it switches off in the configuration. No function is replaced.

`wrong` looks at what these rest on before anything is changed; where something is not as it should be, the platform
is vLLM's own in all that matters.

What is compiled is kept by vLLM on disk. The workspace's handle stands in it as a number, so handle, version and sizes
are put into `additional_config`, which is a part of the key: a graph of another server, with or without us, is not
taken. With VLLM_BATCH_INVARIANT=1 calls of every size are ours, in pieces if need be, so that a row's bits do not
depend on its batch; without, those up to vLLM's own limit for the fusion (`fi_allreduce_fusion_max_size_mb`).

This module imports vLLM, and is loaded by it alone.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import logging
import math
from pathlib import Path
from typing import Any

import torch
import vllm.envs as envs
from vllm.platforms.cuda import CudaPlatform

from mnnvl_ar.compat import fusion
from mnnvl_ar.compat.creation import joined, version
from mnnvl_ar.compat.group_calls import GroupCalls
from mnnvl_ar.compat.settings import Settings
from mnnvl_ar.errors import MnnvlArError

COMMUNICATOR = "vllm.distributed.device_communicators.cuda_communicator.CudaCommunicator"
PASSES = "vllm.compilation.passes.pass_manager.PostGradPassManager"
CLASSES = "mnnvl_ar.compat.vllm_classes"
KEY = "mnnvl_ar"  # in additional_config

_log = logging.getLogger("mnnvl_ar")


class Platform(CudaPlatform):
    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return f"{CLASSES}.Communicator" if not problems() else str(super().get_device_communicator_cls())

    @classmethod
    def get_pass_manager_cls(cls) -> str:
        return f"{CLASSES}.Passes" if not problems() else str(super().get_pass_manager_cls())

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        super().check_and_update_config(vllm_config)
        if vllm_config.parallel_config.tensor_parallel_size > 1 and not problems():
            configure(vllm_config)


@functools.cache
def problems() -> tuple[str, ...]:
    """What is not as it should be, told of once; `SystemExit` where vLLM as it is would be no choice."""
    from mnnvl_ar.compat import servers

    try:
        found = tuple(wrong())
    except Exception as error:  # anything may come of importing vLLM's modules
        found = (servers.said(error),)
    if found:
        refused = MnnvlArError(f"vLLM is left as it is: {'; '.join(found)}")
        # By `servers.ENVIRONMENT`, and where one switch of multicast is set all of them are.
        servers.refuse(refused, Settings.read(), makes_multicast=False)
    return found


def wrong() -> list[str]:
    """What of vLLM is not as this module knows it, a line each."""
    lines = []
    for name, method, least in (
        (COMMUNICATOR, "__init__", {"cpu_group", "unique_name"}),
        (COMMUNICATOR, "all_reduce", {"input_"}),
        (COMMUNICATOR, "destroy", set()),
        (PASSES, "configure", {"config"}),
        ("vllm.compilation.passes.inductor_pass.InductorPass", "is_applicable_for_range", {"compile_range"}),
        ("vllm.compilation.passes.inductor_pass.InductorPass", "uuid", set()),
        ("vllm.config.compilation.PassConfig", "flashinfer_max_size", {"world_size"}),
    ):
        function = getattr(_named(name), method, None)
        if not callable(function):
            lines.append(f"there is no {name}.{method}")
        elif missing := least - {*inspect.signature(function).parameters}:
            lines.append(f"{name}.{method} has no parameter {min(missing)}")
    for name in (
        "vllm.compilation.passes.inductor_pass.get_pass_context",
        "vllm.config.get_current_vllm_config_or_none",
        "vllm.config.set_current_vllm_config",
        "vllm.distributed.parallel_state.get_tp_group",
    ):
        if not callable(_named(name)):
            lines.append(f"there is no {name}")
    schema = getattr(getattr(torch.ops.vllm, "all_reduce", None), "default", None)
    if schema is None or [each.name for each in schema._schema.arguments] != ["tensor", "group_name"]:
        lines.append("torch.ops.vllm.all_reduce does not take (tensor, group_name)")
    return lines


def _named(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except ImportError:
        return None


def configure(config: Any) -> None:
    """What has to be different in vLLM's configuration. May be called again with the same one."""
    compilation = config.compilation_config
    if compilation.pass_config.fuse_allreduce_rms:
        _log.info("mnnvl_ar: fuse_allreduce_rms is switched off, its place is taken by torch.ops.mnnvl_ar")
    compilation.pass_config.fuse_allreduce_rms = False
    # Without it, 0.20 has the norm of a sum and a residual in the graph as a dozen operations of no name.
    adds = hasattr(importlib.import_module("vllm.ir.ops"), "fused_add_rms_norm")
    if not adds and not {"all", "+rms_norm", "-rms_norm"} & {*compilation.custom_ops}:
        compilation.custom_ops.append("+rms_norm")
    tokens = most_tokens(config)
    if tokens < (config.scheduler_config.max_num_batched_tokens or 0):
        ends = compilation.compile_ranges_endpoints or []
        compilation.compile_ranges_endpoints = sorted({*ends, tokens})


def most_bytes(config: Any) -> float:
    """Of the largest call that is ours: vLLM's own limit for the fusion, where there is one."""
    if envs.VLLM_BATCH_INVARIANT:
        return math.inf
    size = config.compilation_config.pass_config.flashinfer_max_size(config.parallel_config.tensor_parallel_size)
    return math.inf if size is None else float(size)


def hidden_of(config: Any) -> int:
    """The widest row: a draft model's calls are on the same workspace."""
    draft = getattr(config.speculative_config, "draft_model_config", None)
    return max(int(each.get_hidden_size()) for each in (config.model_config, draft) if each is not None)


def most_tokens(config: Any) -> int:
    """Of a call that is ours, as far as the scheduler makes them."""
    scheduled = config.scheduler_config.max_num_batched_tokens or 1
    if config.model_config is None:
        return int(scheduled)
    return max(1, int(min(scheduled, most_bytes(config) // (hidden_of(config) * config.model_config.dtype.itemsize))))


def brought_up(group: Any, config: Any) -> GroupCalls | None:
    """The workspace of the tensor-parallel group, collectively over it; None, on all ranks, where it cannot be had and
    vLLM's own all-reduce is a choice. Part of the key of what is compiled from then on."""
    if not isinstance(config.additional_config, dict):
        _log.warning("mnnvl_ar is not active: additional_config is no dict, so compiled graphs could not be told apart")
        return None
    size = most_tokens(config), hidden_of(config), config.model_config.dtype
    workspace = joined(group, *size, Settings.read(), "vLLM's own all-reduce")
    if workspace is None:
        return None
    calls = GroupCalls(workspace, most_bytes(config))
    config.additional_config[KEY] = key_of(calls)
    return calls


def key_of(calls: GroupCalls) -> str:
    """All that graphs depend on: what they hold, and what our pass does to them."""
    ours = (Path(fusion.__file__), Path(__file__).with_name("vllm_classes.py"))
    digest = hashlib.sha256(b"".join(each.read_bytes() for each in ours)).hexdigest()[:16]
    return f"{version()} {calls.workspace.handle} {calls.most_bytes} {digest}"
