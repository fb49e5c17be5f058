"""SGLang's own layer call and gate with our hooks, by its own registry, FlashInfer absent; on the host transport."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from common.ranks import Rank, rank_pool
from compat.front import rows
from compat.sglang_wheel import Texts, server
from compat.wheels import define
from mnnvl_ar import reference
from mnnvl_ar.compat import sglang_layer
from mnnvl_ar.errors import MnnvlArError

EPS = 1e-5
VERSIONS = ["0.5.11", "0.5.17", "0.5.23"]


def layers(rank: Rank, texts: Texts) -> None:
    norm = SimpleNamespace(variance_epsilon=EPS, forward=mock.MagicMock(side_effect=AssertionError("unfused")))
    xs, residual = [rows(each, 5) for each in range(rank.world_size)], rows(77, 5)
    weight = 1 + rows(9, 1)[0]
    wanted = reference.all_reduce_rms_norm(xs, residual, weight, EPS)
    with server(texts, rank.group) as there:
        assert not there.gate(5)  # FlashInfer's all-reduce is off
        there.hook()
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
    rank_pool(2).run(layers, Texts.of(version))


def without(rank: Rank, texts: Texts, how: str) -> None:
    """No workspace is to be had, or attention is data-parallel: SGLang's own sum."""
    xs, residual, weight = [rows(each, 5) for each in range(rank.world_size)], rows(77, 5), 1 + rows(9, 1)[0]
    wanted = reference.all_reduce_rms_norm(xs, residual, weight, EPS)
    with server(texts, rank.group, dp_attention=how == "dp attention") as there:
        there.hook()
        assert there.gate(5) == (how == "row")
        width = 60 if how == "row" else 64  # no whole 16 bytes
        given = (xs[rank.rank][:, :width], residual[:, :width], None, weight[:width], True)
        got = there.layer(SimpleNamespace(variance_epsilon=EPS), *given)
        assert not there.gate(5)
        assert there.group.sums == 1
        assert torch.allclose(got[1].float(), wanted[1][:, :width].float(), atol=0.1)


@pytest.mark.parametrize("how", ["row", "dp attention"])
def test_where_all_ranks_go_without(how: str) -> None:
    rank_pool(2).run(without, Texts.of("0.5.23"), how)


class Two:
    """As much of a group as what asks no other rank needs."""

    @staticmethod
    def size() -> int:
        return 2


def leaves_its_sum(there: Any, texts: Texts) -> bool:
    """Whether SGLang has the next layer sum an MLP's rows, by its own function, where a rank has complete rows of other
    tokens. They are summed over all ranks then, and wrong: up to 0.5.12 this asks the gate alone."""
    module = there.modules[texts.gate[0]]
    vars(module).update(
        is_enable_moe_cp_allgather=lambda: False,
        get_attn_tp_context=lambda: SimpleNamespace(input_scattered=False),
        get_tensor_model_parallel_world_size=lambda: 2,
        is_flashinfer_allreduce_unavailable=lambda: False,
    )
    should = define(texts.files[texts.gate[0]], "should_fuse_mlp_allreduce_with_next_layer", vars(module))
    layer = SimpleNamespace(
        _speculative_algo=None,
        is_last_layer=False,
        _context=SimpleNamespace(tp_size=2),
        layer_scatter_modes=SimpleNamespace(mlp_mode="SCATTERED"),
    )
    return bool(should(layer, SimpleNamespace(input_ids=mock.Mock(shape=(8,)))))


@pytest.mark.parametrize("version", ["0.5.11", "0.5.12"])
def test_complete_rows_are_not_summed(version: str) -> None:
    texts = Texts.of(version)
    for where, sums in (({}, True), ({"a2a": "deepep"}, False), ({"moe_dense_tp_size": 1}, False)):
        with server(texts, Two, **where) as there:  # type: ignore[arg-type]
            assert not leaves_its_sum(there, texts)
            there.hook()
            assert leaves_its_sum(there, texts) == there.gate(8) == sums  # the first: a control


@pytest.mark.parametrize("version", ["0.5.11", "0.5.20", "0.5.21", "0.5.22", "0.5.23"])
def test_the_gate_of_releases_that_say_it_elsewhere(version: str) -> None:
    texts = Texts.of(version)
    with server(texts, Two, moe_dense_tp_size=1) as there:
        there.hook()
        assert not there.gate(8)
    with server(texts, Two, a2a="deepep") as there:
        there.hook()
        assert not there.gate(8)
        there.a2a = "none"  # a draft model's, while it runs
        assert there.gate(8)
        there.a2a = "deepep"
        assert not there.gate(8)


@pytest.mark.parametrize(
    ("breaks", "says"),
    [
        ("layer", "there is no sglang.srt.layers.flashinfer_comm_fusion.flashinfer_allreduce_residual_rmsnorm"),
        ("parameter", "flashinfer_allreduce_residual_rmsnorm has a parameter bias that is not known"),
        ("gate", "there are 0, wanted one"),
        ("gate's parameter", "flashinfer_ar_fusion_applies does not take (batch_size)"),
        ("group", "there is no sglang.srt.distributed.parallel_state.get_moe_tp_group"),
        ("experts", "there is no sglang.srt.layers.moe.utils.get_moe_a2a_backend"),
        ("experts' backend", "there is no sglang.srt.layers.moe.utils.MoeA2ABackend.is_none"),
        ("dense", "of enable_moe_dense_fully_dp, is_dense_ffn_fully_dp there are 0, wanted one"),
    ],
)
def test_what_is_not_as_we_know_it(breaks: str, says: str) -> None:
    texts = Texts.of("0.5.23")
    gate = texts.gate
    with server(texts, Two) as there:
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
        elif breaks == "group":
            del there.modules[sglang_layer.STATE].get_moe_tp_group
        elif breaks == "experts":
            del there.modules[sglang_layer.EXPERTS].get_moe_a2a_backend
        elif breaks == "experts' backend":
            del there.modules[sglang_layer.EXPERTS].MoeA2ABackend
        else:
            delattr(there.modules[texts.dense[0]], texts.dense[1])
        with pytest.raises(MnnvlArError) as caught:
            sglang_layer.hook()
        assert says in str(caught.value)
        assert not there.registry._hooks
