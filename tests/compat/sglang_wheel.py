"""SGLang's layer call, gate and registry of hooks, as they are in a wheel; the rest of SGLang is stubbed.

with server(Texts.of("0.5.23"), group) as there:
    there.gate(rows), there.layer(...)      # SGLang's own functions, or ours once there.hook() was called
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from compat.wheels import define, executed, text_of
from mnnvl_ar.compat import sglang_layer

NORM, REGISTRY = "sglang.srt.layers.layernorm", "sglang.srt.plugins.hook_registry"
ENVIRONMENT = {"MNNVL_AR": "1", "MNNVL_AR_THROUGH": "ops", "MNNVL_AR_TIMEOUT": "20"}


class Group:
    """As much of SGLang's GroupCoordinator as is used."""

    def __init__(self, group: Any) -> None:
        self.cpu_group = self.device_group = group
        self.world_size, self.sums = group.size(), 0

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.sums += 1
        total = x.float()
        dist.all_reduce(total, group=self.cpu_group)
        return total.to(x.dtype)


class A2A:
    """As much of SGLang's MoeA2ABackend."""

    def __init__(self, name: str) -> None:
        self.name = name

    def is_none(self) -> bool:
        return self.name == "none"


@dataclass(frozen=True)
class Texts:
    """The wheel's files, by module; module and name of the functions of this release that we look for."""

    files: dict[str, str]
    gate: tuple[str, str]
    dense: tuple[str, str]

    @staticmethod
    def of(version: str) -> Texts:
        gate, dense = (_one_of(version, places) for places in (sglang_layer.GATES, sglang_layer.DENSE))
        names = (sglang_layer.LAYER, NORM, REGISTRY, gate[0], dense[0])
        return Texts({name: _text(version, name) for name in names}, gate, dense)


def _text(version: str, module: str) -> str:
    return text_of("sglang", version, f"{module.replace('.', '/')}.py")


def _one_of(version: str, places: tuple[tuple[str, str], ...]) -> tuple[str, str]:
    for module, name in places:
        with contextlib.suppress(KeyError, pytest.skip.Exception):
            if f"\ndef {name}(" in _text(version, module):
                return module, name
    raise LookupError(f"none of {places} in sglang {version}")


@contextlib.contextmanager
def server(
    texts: Texts, group: Any, *, dp_attention: bool = False, a2a: str = "none", moe_dense_tp_size: int | None = None
) -> Iterator[Any]:
    """SGLang's modules: the functions that matter as they are, the rest as stubs. `a2a` may be changed later on."""
    files, gate = texts.files, texts.gate
    root = mock.MagicMock(name="sglang")
    coordinator = Group(group)
    parallel = SimpleNamespace(
        attn_tp_size=group.size(), moe_ep_size=1, moe_tp_size=group.size(), tp_size=group.size(), tp_group=coordinator,
        moe_dense_tp_size=moe_dense_tp_size,
    )  # fmt: skip
    arguments = SimpleNamespace(moe_dense_tp_size=moe_dense_tp_size, enable_aiter_allreduce_fusion=False)
    sizes = {
        f"get_{name}_world_size": lambda: group.size() for name in ("attn_tensor_model_parallel", "moe_tensor_parallel")
    }
    shared: dict[str, Any] = {
        "torch": torch,
        "get_parallel": lambda: parallel,
        **dict.fromkeys(("get_global_server_args", "get_server_args"), lambda: arguments),
        "get_moe_expert_parallel_world_size": lambda: 1,
        **sizes,
        "is_dp_attention_enabled": lambda: dp_attention,
        "_use_aiter": False,
        "_is_sm90_supported": True,
        "_is_flashinfer_available": False,
        "is_flashinfer_available": lambda: False,
        "FUSE_ALLREDUCE_MAX_BATCH_SIZE": 2048,
        "logger": mock.MagicMock(),
    }
    modules: dict[str, Any] = {}
    for name in (
        *("sglang", "sglang.srt", "sglang.srt.layers", "sglang.srt.plugins", "sglang.srt.distributed"),
        *("sglang.srt.layers.layer_boundary", "sglang.srt.layers.layer_boundary.residual", "sglang.srt.layers.moe"),
        *(sglang_layer.EXPERTS, sglang_layer.LAYER, NORM, *dict.fromkeys((gate[0], texts.dense[0]))),
        *(sglang_layer.STATE, sglang_layer.ATTENTION),
    ):
        modules[name] = module = ModuleType(name)
        module.__path__ = []
        vars(module).update(shared)
        if name != "sglang":
            setattr(modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)
    layer = modules[sglang_layer.LAYER]
    define(files[sglang_layer.LAYER], sglang_layer.FUSED, vars(layer))
    layer.ensure_workspace_initialized = mock.MagicMock(side_effect=AssertionError("FlashInfer's"))
    define(files[NORM], "_forward_with_allreduce_fusion", vars(modules[NORM]))
    for module, name in (gate, texts.dense):
        define(files[module], name, vars(modules[module]))
    for name in sglang_layer.GROUPS:
        setattr(
            modules[sglang_layer.STATE],
            name,
            lambda name=name: SimpleNamespace(world_size=1) if "ep" in name else coordinator,
        )
    for name in (
        *("attention_tensor_model_parallel_all_reduce", "tensor_model_parallel_all_reduce"),
        *("tensor_model_parallel_fused_allreduce_rmsnorm", *sizes, "get_moe_expert_parallel_world_size"),
    ):
        setattr(modules["sglang.srt.distributed"], name, shared.get(name, root))
    experts = modules[sglang_layer.EXPERTS]
    experts.deferred_post_experts_all_reduce = root
    experts.MoeA2ABackend = A2A
    modules[REGISTRY] = registry = executed(files[REGISTRY], "hook_registry")
    modules["sglang.srt.plugins"].hook_registry = registry
    forget()
    try:
        with mock.patch.dict(sys.modules, modules), mock.patch.dict(os.environ, ENVIRONMENT):
            there = SimpleNamespace(
                modules=modules,
                registry=registry.HookRegistry,
                group=coordinator,
                a2a=a2a,
                gate=lambda rows: getattr(modules[gate[0]], gate[1])(rows),
                layer=modules[NORM]._forward_with_allreduce_fusion,
                hook=lambda: (sglang_layer.hook(), registry.HookRegistry.apply_hooks()),
            )
            experts.get_moe_a2a_backend = lambda: A2A(there.a2a)
            yield there
    finally:
        calls = sglang_layer._calls.pop("tp", None)
        if calls is not None:
            calls.workspace.destroy()
        forget()


def forget() -> None:
    """What a process has learnt of its server."""
    sglang_layer._calls.clear()
    sglang_layer._over_all_ranks.cache_clear()
    sglang_layer._a2a_backend.cache_clear()
