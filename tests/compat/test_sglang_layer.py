"""SGLang's own layer call and gate with our hooks, by its own registry, FlashInfer absent; on the host transport."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from common.ranks import Rank, rank_pool
from compat.front import rows
from compat.wheels import define, executed, text_of
from mnnvl_ar import reference
from mnnvl_ar.compat import sglang_layer
from mnnvl_ar.errors import MnnvlArError

EPS = 1e-5
VERSIONS = ["0.5.11", "0.5.17", "0.5.23"]
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


def gate_of(version: str) -> tuple[str, str]:
    """Module and name of the gate of this release."""
    for module, name in sglang_layer.GATES:
        with contextlib.suppress(KeyError, pytest.skip.Exception):
            if f"\ndef {name}(" in text_of("sglang", version, f"{module.replace('.', '/')}.py"):
                return module, name
    raise LookupError(f"no gate in sglang {version}")


def texts(version: str) -> dict[str, str]:
    gate = gate_of(version)[0]
    names = (sglang_layer.LAYER, "sglang.srt.layers.layernorm", "sglang.srt.plugins.hook_registry", gate)
    return {name: text_of("sglang", version, f"{name.replace('.', '/')}.py") for name in names}


@contextlib.contextmanager
def server(files: dict[str, str], gate: tuple[str, str], group: Any, *, dp_attention: bool = False) -> Iterator[Any]:
    """SGLang's modules: the functions that matter as they are, the rest as stubs."""
    root = mock.MagicMock(name="sglang")
    coordinator = Group(group)
    parallel = SimpleNamespace(
        attn_tp_size=group.size(), moe_ep_size=1, moe_tp_size=group.size(), tp_size=group.size(), tp_group=coordinator
    )
    sizes = {
        f"get_{name}_world_size": lambda: group.size() for name in ("attn_tensor_model_parallel", "moe_tensor_parallel")
    }
    shared: dict[str, Any] = {
        "torch": torch,
        "get_parallel": lambda: parallel,
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
        *("sglang.srt.layers.moe.utils", sglang_layer.LAYER, "sglang.srt.layers.layernorm", gate[0]),
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
    define(
        files["sglang.srt.layers.layernorm"],
        "_forward_with_allreduce_fusion",
        vars(modules["sglang.srt.layers.layernorm"]),
    )
    define(files[gate[0]], gate[1], vars(modules[gate[0]]))
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
    modules["sglang.srt.layers.moe.utils"].deferred_post_experts_all_reduce = root
    modules["sglang.srt.plugins.hook_registry"] = registry = executed(
        files["sglang.srt.plugins.hook_registry"], "hook_registry"
    )
    modules["sglang.srt.plugins"].hook_registry = registry
    sglang_layer._calls.clear()
    sglang_layer._over_all_ranks.cache_clear()
    try:
        with mock.patch.dict(sys.modules, modules), mock.patch.dict(os.environ, ENVIRONMENT):
            yield SimpleNamespace(
                modules=modules,
                registry=registry.HookRegistry,
                group=coordinator,
                gate=lambda rows: getattr(modules[gate[0]], gate[1])(rows),
                layer=modules["sglang.srt.layers.layernorm"]._forward_with_allreduce_fusion,
            )
    finally:
        calls = sglang_layer._calls.pop("tp", None)
        if calls is not None:
            calls.workspace.destroy()
        sglang_layer._over_all_ranks.cache_clear()


def layers(rank: Rank, files: dict[str, str], gate: tuple[str, str]) -> None:
    norm = SimpleNamespace(variance_epsilon=EPS, forward=mock.MagicMock(side_effect=AssertionError("unfused")))
    xs, residual = [rows(each, 5) for each in range(rank.world_size)], rows(77, 5)
    weight = 1 + rows(9, 1)[0]
    wanted = reference.all_reduce_rms_norm(xs, residual, weight, EPS)
    with server(files, gate, rank.group) as there:
        assert not there.gate(5)  # FlashInfer's all-reduce is off
        sglang_layer.hook()
        there.registry.apply_hooks()
        assert [bool(there.gate(count)) for count in (0, 1, 2048, 2049)] == [False, True, True, False]
        for attention in (True, False):
            x, r = xs[rank.rank].clone(), residual.clone()
            got = there.layer(norm, x, r, None, weight, attention)
            assert all(map(reference.same_bits, got, wanted))
            assert reference.same_bits(x, xs[rank.rank])
            assert reference.same_bits(r, residual)
        assert there.group.sums == 0
        for odd in ((xs[rank.rank].double(), residual.double()), (xs[rank.rank], residual.float())):
            got = there.layer(norm, *odd, None, weight, True)  # declined, and still summed: no layer may go without
            assert torch.allclose(got[0].float(), wanted[0].float(), atol=0.1)
        assert there.group.sums == 2
        assert there.gate(5)


@pytest.mark.parametrize("version", VERSIONS)
def test_layers(version: str) -> None:
    rank_pool(2).run(layers, texts(version), gate_of(version))


def without(rank: Rank, files: dict[str, str], gate: tuple[str, str], how: str) -> None:
    """No workspace is to be had, or attention is data-parallel: SGLang's own sum."""
    xs, residual, weight = [rows(each, 5) for each in range(rank.world_size)], rows(77, 5), 1 + rows(9, 1)[0]
    wanted = reference.all_reduce_rms_norm(xs, residual, weight, EPS)
    with server(files, gate, rank.group, dp_attention=how == "dp attention") as there:
        sglang_layer.hook()
        there.registry.apply_hooks()
        assert there.gate(5) == (how == "row")
        width = 60 if how == "row" else 64  # no whole 16 bytes
        given = (xs[rank.rank][:, :width], residual[:, :width], None, weight[:width], True)
        got = there.layer(SimpleNamespace(variance_epsilon=EPS), *given)
        assert not there.gate(5)
        assert there.group.sums == 1
        assert torch.allclose(got[1].float(), wanted[1][:, :width].float(), atol=0.1)


@pytest.mark.parametrize("how", ["row", "dp attention"])
def test_where_all_ranks_go_without(how: str) -> None:
    rank_pool(2).run(without, texts("0.5.23"), gate_of("0.5.23"), how)


class Alone:
    @staticmethod
    def size() -> int:
        return 1


@pytest.mark.parametrize(
    ("breaks", "says"),
    [
        ("layer", "there is no sglang.srt.layers.flashinfer_comm_fusion.flashinfer_allreduce_residual_rmsnorm"),
        ("parameter", "flashinfer_allreduce_residual_rmsnorm has a parameter bias that is not known"),
        ("gate", "there are 0, wanted one"),
        ("gate's parameter", "flashinfer_ar_fusion_applies does not take (batch_size)"),
        ("group", "there is no sglang.srt.distributed.parallel_state.get_moe_tp_group"),
    ],
)
def test_what_is_not_as_we_know_it(breaks: str, says: str) -> None:
    gate = gate_of("0.5.23")
    with server(texts("0.5.23"), gate, Alone) as there:
        sglang_layer.checked()
        layer, home = there.modules[sglang_layer.LAYER], there.modules[gate[0]]
        if breaks == "layer":
            delattr(layer, sglang_layer.FUSED)
        elif breaks == "parameter":
            layer.flashinfer_allreduce_residual_rmsnorm = lambda input_tensor, residual, weight, bias: None
        elif breaks == "gate":
            delattr(home, gate[1])
        elif breaks == "gate's parameter":
            setattr(home, gate[1], lambda rows: True)
        else:
            del there.modules[sglang_layer.STATE].get_moe_tp_group
        with pytest.raises(MnnvlArError) as caught:
            sglang_layer.hook()
        assert says in str(caught.value)
        assert not there.registry._hooks
