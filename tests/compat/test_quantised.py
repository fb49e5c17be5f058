"""Patterns with a quantised output through the front: bit for bit those of the reference."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from common.ranks import Rank, RankPool, rank_pool
from compat.front import HIDDEN, create, installed, rows, works
from compat.stand_in import COMMITTED
from compat.wheels import define, text_of
from mnnvl_ar import reference, scales
from mnnvl_ar.compat.patterns import NORM, PATTERNS, SUM

EPS = 1e-6
WIDE = 384  # three groups of 128
CODES = torch.float8_e4m3fn
WITH_NORM = (4, 5, 9, 11, 14)
GIVEN: dict[int, dict[str, Any]] = {
    # what a pattern asks for beside the outputs
    2: {"scale_factor": torch.tensor([0.25, 99.0])},
    3: {"scale_factor": torch.tensor([0.25, 99.0])},
    8: {"block_quant_group_size": 128},
    10: {},
    13: {},
}


def base_of(pattern: int) -> int:
    """The first one of the same epilogue."""
    return next(code for code in GIVEN if PATTERNS[code].epilogue == PATTERNS[pattern].epilogue)


def answers(
    rank: Rank, pattern: int, weight: torch.Tensor, residual: torch.Tensor, layout: str
) -> tuple[torch.Tensor, ...]:
    """norm, residual_out, and the quantised outputs."""
    xs = [rows(each, residual.shape[0], WIDE, dtype=residual.dtype) for each in range(rank.world_size)]
    norm, total = reference.all_reduce_rms_norm(xs, residual, weight, EPS, 0.0)
    kind = PATTERNS[pattern].epilogue
    if kind == "fp8":
        return norm, total, reference.static_fp8(norm, torch.tensor([0.25]))
    if kind == "nvfp4":
        return norm, total, *reference.nvfp4(norm, torch.tensor([0.25]), layout)
    if kind == "group fp8":
        return norm, total, *reference.per_token_group_fp8(norm, "ue8m0", "tma_aligned")
    return norm, total, *(reference.per_token_fp8(norm) if kind == "token fp8" else reference.mxfp8(norm, layout))


def scale_out(pattern: int, tokens: int, layout: str, on: torch.device) -> torch.Tensor | None:
    """As FlashInfer's callers hand it: vLLM's of NVFP4 in two dimensions, in tiles as int32; of MXFP8 larger than need
    be."""
    code = {"swizzled": 0, "linear": 2}[layout]
    kind = PATTERNS[pattern].epilogue
    if kind == "nvfp4":
        flat = scales.nvfp4(tokens, WIDE, code, device=on)
        if layout == "linear":
            return flat.view(-1, WIDE // 16)
        return flat.view(torch.int32).view(-1, 6) if tokens == 1 else flat.view(torch.uint8).view(-1, 24)
    if kind == "mxfp8":
        return torch.full((scales.mxfp8(tokens, WIDE, code).numel() + 5,), 77, dtype=torch.uint8, device=on)
    if kind == "group fp8":
        return scales.per_token_group_fp8(tokens, WIDE, scales.GroupScales.UE8M0, device=on)
    return torch.empty(tokens, 1, device=on) if kind == "token fp8" else None


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    """As bytes: all that either spans."""
    spans = [torch.empty(0, dtype=torch.uint8, device=each.device).set_(each.untyped_storage()) for each in (got, want)]
    return torch.equal(*(each.cpu() for each in spans))


def same_codes(got: torch.Tensor, want: torch.Tensor) -> bool:
    return torch.equal(got.view(torch.uint8).cpu().view(want.shape), want.view(torch.uint8))


def served(rank: Rank, backend: str, pattern: int, dtype: torch.dtype) -> None:
    """As vLLM calls it: norm_out is there for every pattern, quant_out has the shape of an outer batch."""
    on, weight = rank.device, 1 + rows(9, 1, WIDE, dtype=dtype)[0]
    base = base_of(pattern)
    asked = {name: each.to(on) if isinstance(each, torch.Tensor) else each for name, each in GIVEN[base].items()}
    is_pairs = base == 3
    with installed() as comm:
        workspace = create(comm, rank, backend=backend, dtype=dtype, hidden_dim=WIDE)
        for tokens, layout in ((1, "swizzled"), (6, "linear"), (16, "swizzled")):
            residual = rows(77, tokens, WIDE, dtype=dtype)
            norm, total, codes, *wanted_scales = answers(rank, pattern, weight, residual, layout)
            x, r, gamma = (
                each.to(on, copy=True) for each in (rows(rank.rank, tokens, WIDE, dtype=dtype), residual, weight)
            )
            norm_out = torch.full_like(x, 3.0)
            quant_out = torch.empty(1, *codes.shape, dtype=codes.dtype, device=on)
            if is_pairs and tokens == 6:
                quant_out = quant_out.view(torch.float4_e2m1fn_x2)
            given, layout_code = dict(asked), {"swizzled": None if tokens == 1 else 0, "linear": 2}[layout]
            if (scale := scale_out(pattern, tokens, layout, on)) is not None:
                given["scale_out"] = scale
            got = comm.allreduce_fusion(
                input=x, workspace=workspace, pattern=pattern, residual_in=r, rms_gamma=gamma, rms_eps=EPS,
                residual_out=r, norm_out=norm_out, quant_out=quant_out, layout_code=layout_code, use_oneshot=False,
                **given,
            )  # fmt: skip
            assert same_codes(quant_out, codes)
            assert reference.same_bits(r, total)
            if scale is not None:
                spare = scale.view(-1)[scale.numel() - 5 :] if base == 13 else scale[:0]
                assert spare.eq(77).all(), "what is more than it need be is left alone"
                assert same(scale.view(-1)[:-5].clone() if base == 13 else scale, wanted_scales[0])
            if pattern in WITH_NORM:
                assert reference.same_bits(norm_out, norm)
                assert got is (norm_out if backend == "trtllm" and pattern != 14 else quant_out)
            else:
                assert torch.equal(norm_out, torch.full_like(x, 3.0)), "norm_out is left alone"
                assert got is quant_out
            bare = {**asked, **({"scale_factor": 0.25} if "scale_factor" in asked else {})}
            fresh = comm.allreduce_fusion(  # what is left out is made
                input=x, workspace=workspace, pattern=pattern, residual_in=residual.to(on), rms_gamma=gamma, **bare
            )
            if fresh.dtype == codes.dtype:
                assert same_codes(fresh, codes)
            else:
                assert reference.same_bits(fresh, norm)
        assert comm.calls == []
        workspace.destroy()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", [code for code in PATTERNS if code > 1])
@pytest.mark.parametrize("backend", ["mnnvl", "trtllm"])
def test_as_the_reference(backend: str, pattern: int, dtype: torch.dtype) -> None:
    rank_pool(2).run(served, backend, pattern, dtype)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("backend", ["mnnvl", "trtllm"])
def test_on_a_gpu(backend: str) -> None:
    """Two processes that share the first GPU, which they have in turn."""
    with RankPool(2, "cuda:0") as pool:
        for pattern in (code for code in PATTERNS if code > 1):
            for dtype in (torch.bfloat16, torch.float16):
                pool.run(served, backend, pattern, dtype, timeout=60)


def test_other_scales_are_seen() -> None:
    """The control of `same`: a byte of what pads a scale, and another layout."""
    norm = rows(1, 6, WIDE)
    tiles, linear = (reference.nvfp4(norm, 0.25, layout)[1] for layout in ("swizzled", "linear"))
    wrong = tiles.clone()
    wrong.view(torch.uint8)[-1] = 1
    assert same(tiles.clone(), tiles)
    assert not same(wrong, tiles)
    assert not same(linear, tiles[: linear.numel()].clone())


def bad_input(rank: Rank) -> None:
    x, r, w = rows(rank.rank), rows(5), rows(6)[0]
    of_all = {"residual_in": r, "rms_gamma": w}
    static = {"pattern": 2, "scale_factor": torch.ones(1), **of_all}
    dynamic = {"pattern": 10, **of_all}
    group = {"pattern": 8, "block_quant_group_size": 128, **of_all}
    mxfp8 = {"pattern": 14, **of_all}
    nvfp4 = {"pattern": 5, "scale_factor": torch.ones(1), **of_all}
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
            (ValueError, "block_quant_group_size: is None, wanted 128", {**group, "block_quant_group_size": None}),
            (ValueError, "block_quant_group_size: is 64, wanted 128", {**group, "block_quant_group_size": 64}),
            (ValueError, "hidden: is 64, wanted a multiple of 128", group),
            (RuntimeError, "input: rows of 64 elements, wanted a multiple of 128",
             {**group, "scale_out": torch.ones(4, 1, dtype=torch.int32)}),
            (ValueError, "scale_factor: a pattern of MXFP8 does not", {**mxfp8, "scale_factor": 1.0}),
            (ValueError, r"layout_code: is 1, wanted 0 .SWIZZLED_128x4. or 2", {**mxfp8, "layout_code": 1}),
            (ValueError, r"layout_code: is 1, wanted 0 .SWIZZLED_128x4. or 2", {**nvfp4, "layout_code": 1}),
            (RuntimeError, "scale_out: has 8 elements, wanted 512",
             {**mxfp8, "scale_out": torch.ones(8, dtype=torch.uint8)}),
            (RuntimeError, "scale_out: is int8, wanted uint8",
             {**mxfp8, "scale_out": torch.ones(512, dtype=torch.int8)}),
            (ValueError, "scale_factor: a pattern of NVFP4 needs it", {**nvfp4, "scale_factor": None}),
            (RuntimeError, "scale_factor: is float64, wanted", {**nvfp4, "scale_factor": torch.ones(1).double()}),
            (RuntimeError, "quant_out: is float8_e4m3fn, wanted uint8",
             {**nvfp4, "quant_out": torch.empty(4, HIDDEN // 2, dtype=CODES)}),
            (RuntimeError, "quant_out: has shape .4, 64., wanted .4, 32.",
             {**nvfp4, "quant_out": torch.empty(4, HIDDEN, dtype=torch.uint8)}),
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


# ---- what is returned, beside FlashInfer's own function out of its wheel


def theirs(text: str, comm: Any) -> tuple[Any, dict[str, Any]]:
    """It, with kernels that do nothing, and a workspace of its own for each backend."""
    fields = {"world_size": 2, "rank": 0, "workspace_tensor": None, "metadata": None, "mem_handles": []}
    kinds = {
        backend: type(f"{backend.upper()}AllReduceFusionWorkspace", (), {"backend": backend, **fields})
        for backend in ("mnnvl", "trtllm")
    }
    space: dict[str, Any] = {
        "torch": torch,
        "AllReduceFusionPattern": comm.AllReduceFusionPattern,
        "QuantizationSFLayout": comm.QuantizationSFLayout,
        **{kind.__name__: kind for kind in kinds.values()},
        **{name: mock.MagicMock() for name in ("MNNVLQuantType", "MNNVLAllreduceFusionStrategy")},
        **dict.fromkeys(("trtllm_allreduce_fusion", "trtllm_mnnvl_allreduce", "_check_mxfp8_fusion_args"), mock.Mock()),
        "trtllm_mnnvl_fused_allreduce_add_rmsnorm": lambda output, residual_out, **_: (output, residual_out),
        "trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant": lambda quant_out, **_: (quant_out, None, None, None),
    }
    return define(text, "allreduce_fusion", space), {backend: kind() for backend, kind in kinds.items()}


def outputs(pattern: int, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """All that the pattern writes."""
    if pattern == SUM:
        return {"output": torch.empty_like(x)}
    written = {"residual_out": torch.empty_like(x)}
    if PATTERNS[pattern].norm:
        written["norm_out"] = torch.empty_like(x)
    if pattern == NORM:
        return written
    is_pairs = base_of(pattern) == 3
    shape, dtype = ((x.shape[0], WIDE // 2), torch.uint8) if is_pairs else (x.shape, CODES)
    written["quant_out"] = torch.empty(shape, dtype=dtype)
    scale = scale_out(pattern, x.shape[0], "swizzled", x.device)
    return written if scale is None else {**written, "scale_out": scale}


def answered(rank: Rank, version: str, text: str) -> None:
    names = {pattern.name: code for code, pattern in PATTERNS.items()}
    branches = COMMITTED["flashinfer"][version]["branches allreduce_fusion in flashinfer/comm/allreduce.py"]
    with installed(version) as comm:
        function, workspaces = theirs(text, comm)
        taken = {
            "mnnvl": [names[name] for name in branches["MNNVLAllReduceFusionWorkspace"]],
            "trtllm": [code for name, code in names.items() if hasattr(comm.AllReduceFusionPattern, name)],
        }
        x, residual, weight = rows(rank.rank, 6, WIDE), rows(77, 6, WIDE), rows(9, 1, WIDE)[0]
        seen = set()
        for backend, patterns in taken.items():
            workspace = create(comm, rank, backend=backend, hidden_dim=WIDE)
            for pattern in patterns:
                written = outputs(pattern, x)
                given = {
                    "input": x, "pattern": pattern, "residual_in": residual, "rms_gamma": weight, "layout_code": 0,
                    **(GIVEN[base_of(pattern)] if pattern > NORM else {}), **written,
                }  # fmt: skip
                told = [call(**given, workspace=place) for call, place in (
                    (function, workspaces[backend]), (comm.allreduce_fusion, workspace),
                )]  # fmt: skip
                wanted, got = (next(name for name, each in written.items() if each is answer) for answer in told)
                assert got == wanted, (backend, pattern)
                seen.add((backend, wanted))
            workspace.destroy()
        assert {("mnnvl", "quant_out"), ("trtllm", "quant_out"), ("trtllm", "norm_out")} <= seen
        assert comm.calls == []


@pytest.mark.parametrize("version", ["0.6.15.post1", "0.7.4"])
def test_the_answer_is_flashinfers(version: str) -> None:
    """Of the outputs that are given, ours returns the one that FlashInfer's function does, whatever its backend."""
    text = text_of("flashinfer-python", version, "flashinfer/comm/allreduce.py")
    rank_pool(2).run(answered, version, text)
