"""Outputs that an op makes and outputs that it is given: the same call to other ranks, whatever a tensor's layout is
called; and where there is no memory for one, PyTorch's own word for it."""

from __future__ import annotations

import resource
from typing import Any

import pytest
import torch

from common.ranks import RankPool
from mnnvl_ar import ops, scales

HIDDEN, EPS = 256, 1e-6


def inputs(tokens: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.arange(tokens * hidden, dtype=torch.float32).remainder(13).view(tokens, hidden).bfloat16()
    return x, x / 2, torch.ones(hidden, dtype=torch.bfloat16)


def one_made_one_given(rank: Any, tokens: int, hidden: int, layout: int) -> list[float]:
    """Rank 0 asks for a layout, the others bring a tensor of its strides. The scales, row by row."""
    workspace = rank.new_workspace(max_tokens=tokens, hidden=hidden, deadline=5.0)
    x, residual, weight = inputs(tokens, hidden)
    if rank.rank == 0:
        op = ops.all_reduce_rms_norm_per_token_group_fp8
        _, scale, _, _ = op(x, residual, weight, EPS, workspace.handle, layout=layout)
    else:
        scale = scales.per_token_group_fp8(tokens, hidden, layout=layout)
        codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn)
        op_out = ops.all_reduce_rms_norm_per_token_group_fp8_out
        op_out(x, residual, weight, EPS, codes, scale, None, torch.empty_like(x), workspace.handle)
    workspace.check()
    workspace.close()
    return [float(value) for value in scale.contiguous().flatten()]


@pytest.mark.parametrize("layout", list(scales.GroupLayout))
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 256), (4, 256), (3, 128), (1, 128), (5, 384)])
def test_a_layout_is_one_by_whatever_name(tokens: int, hidden: int, layout: int) -> None:
    """With one row, one group, or rows in fours, some layouts are the same memory."""
    with RankPool(2) as pool:
        made, given = pool.run(one_made_one_given, tokens, hidden, layout)
    assert made == given
    assert len(made) == tokens * hidden // 128


def other_layouts(rank: Any) -> str:
    workspace = rank.new_workspace(max_tokens=4, hidden=HIDDEN, deadline=5.0)
    x, residual, weight = inputs(4, HIDDEN)
    op = ops.all_reduce_rms_norm_per_token_group_fp8
    with pytest.raises(RuntimeError) as caught:
        op(x, residual, weight, EPS, workspace.handle, layout=rank.rank)
    workspace.close(force=True)
    return str(caught.value)


def test_control_layouts_of_other_memory_differ() -> None:
    with RankPool(2) as pool:
        first, second = pool.run(other_layouts)
        assert "with layout of scales TMA-aligned instead of row-major" in first  # with 4 rows column-major is that
        assert "with layout of scales row-major instead of TMA-aligned" in second


def without_memory(rank: Any) -> str:
    workspace = rank.new_workspace(max_tokens=4, hidden=HIDDEN)
    x = torch.ones(200_000, HIDDEN, dtype=torch.bfloat16)  # 100 MB
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 20, hard))
    try:
        with pytest.raises(RuntimeError) as caught:
            ops.all_reduce(x, workspace.handle)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert ops.all_reduce(x[:1], workspace.handle)[0, 0] == 1.0
    workspace.close()
    return str(caught.value)


def test_out_of_memory_says_so() -> None:
    with RankPool(1) as pool:
        (said,) = pool.run(without_memory)
    assert "output: PyTorch makes no such tensor: " in said
    assert "can't allocate memory" in said
