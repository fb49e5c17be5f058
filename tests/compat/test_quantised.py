"""Patterns with a quantised output through the front, on the host transport: bit for bit those of the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from common.ranks import Rank, rank_pool
from compat.front import HIDDEN, create, installed, rows, works
from mnnvl_ar import reference

EPS = 1e-6
CODES = torch.float8_e4m3fn


def answers(rank: Rank, pattern: int, weight: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """norm, residual_out, and the quantised outputs."""
    xs = [rows(each, residual.shape[0], dtype=residual.dtype) for each in range(rank.world_size)]
    norm, total = reference.all_reduce_rms_norm(xs, residual, weight, EPS, 0.0)
    if pattern in (2, 4):
        return norm, total, reference.static_fp8(norm, torch.tensor([0.25]))
    return norm, total, *reference.per_token_fp8(norm)


def served(rank: Rank, backend: str, pattern: int, dtype: torch.dtype) -> None:
    """As vLLM calls it: norm_out is there for every pattern, quant_out has the shape of an outer batch."""
    weight = 1 + rows(9, 1, dtype=dtype)[0]
    with installed() as comm:
        workspace = create(comm, rank, backend=backend, dtype=dtype)
        for tokens in (1, 6, 16):
            residual = rows(77, tokens, dtype=dtype)
            norm, total, codes, *scales = answers(rank, pattern, weight, residual)
            x, r = rows(rank.rank, tokens, dtype=dtype), residual.clone()
            norm_out = torch.full_like(x, 3.0)
            quant_out = torch.empty(1, tokens, HIDDEN, dtype=CODES)
            given: dict[str, Any] = {"scale_factor": torch.tensor([0.25, 99.0])} if pattern in (2, 4) else {}
            if scales:
                given["scale_out"] = torch.empty(tokens, 1)
            got = comm.allreduce_fusion(
                input=x, workspace=workspace, pattern=pattern, residual_in=r, rms_gamma=weight, rms_eps=EPS,
                residual_out=r, norm_out=norm_out, quant_out=quant_out, layout_code=0, use_oneshot=False, **given,
            )  # fmt: skip
            assert torch.equal(quant_out.view(tokens, HIDDEN).view(torch.uint8), codes.view(torch.uint8))
            assert reference.same_bits(r, total)
            if scales:
                assert reference.same_bits(given["scale_out"], scales[0])
            if pattern in (4, 11):
                assert reference.same_bits(norm_out, norm)
                assert got is (norm_out if backend == "trtllm" else quant_out)
            else:
                assert torch.equal(norm_out, torch.full_like(x, 3.0)), "norm_out is left alone"
                assert got is quant_out
            bare = {"scale_factor": 0.25} if pattern in (2, 4) else {}  # what is left out is made
            fresh = comm.allreduce_fusion(
                input=x, workspace=workspace, pattern=pattern, residual_in=residual, rms_gamma=weight, **bare
            )
            if fresh.dtype == CODES:
                assert torch.equal(fresh.view(torch.uint8), codes.view(torch.uint8))
            else:
                assert reference.same_bits(fresh, norm)
        assert comm.calls == []
        workspace.destroy()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", [2, 4, 10, 11])
@pytest.mark.parametrize("backend", ["mnnvl", "trtllm"])
def test_as_the_reference(backend: str, pattern: int, dtype: torch.dtype) -> None:
    rank_pool(2).run(served, backend, pattern, dtype)


def bad_input(rank: Rank) -> None:
    x, r, w = rows(rank.rank), rows(5), rows(6)[0]
    of_all = {"residual_in": r, "rms_gamma": w}
    static = {"pattern": 2, "scale_factor": torch.ones(1), **of_all}
    dynamic = {"pattern": 10, **of_all}
    with installed() as comm:
        workspace = create(comm, rank)
        wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
            (ValueError, "scale_factor: a pattern of static FP8 needs it", {**static, "scale_factor": None}),
            (ValueError, "scale_out: a pattern of static FP8 does not write", {**static, "scale_out": torch.ones(1)}),
            (ValueError, "scale_factor: a pattern of FP8 with a scale a row", {**dynamic, "scale_factor": 1.0}),
            (ValueError, "residual_in: pattern 2 needs it", {**static, "residual_in": None}),
            (ValueError, "rms_gamma: pattern 10 needs it", {**dynamic, "rms_gamma": None}),
            (ValueError, "output: pattern 2 does not write it", {**static, "output": x}),
            (RuntimeError, "scale_factor: is float64, wanted", {**static, "scale_factor": torch.ones(1).double()}),
            (RuntimeError, "quant_out: is bfloat16, wanted float8_e4m3fn", {**static, "quant_out": x.clone()}),
            (RuntimeError, "quant_out: has shape", {**static, "quant_out": torch.empty(3, HIDDEN, dtype=CODES)}),
            (RuntimeError, "scale_out: has shape .4., wanted .4, 1.", {**dynamic, "scale_out": torch.ones(4)}),
            (RuntimeError, "input: is float32, wanted bfloat16 or float16",
             {**static, "input": x.float(), "residual_in": r.float(), "rms_gamma": w.float()}),
        ]  # fmt: skip
        for kind, words, given in wrong:
            with pytest.raises(kind, match=words):
                comm.allreduce_fusion(**{"input": x, "workspace": workspace, **given})
        assert works(workspace, comm)
        workspace.destroy()


def test_bad_input_is_refused_by_name() -> None:
    rank_pool(2).run(bad_input)
