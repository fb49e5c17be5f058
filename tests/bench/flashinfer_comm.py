"""Stands in for `flashinfer.comm`: patterns and the one op that the bench calls, with the keywords that 0.6.13, 0.6.14
and 0.7.4 have, checked as FlashInfer's own front checks them; outputs are the reference's of a norm that is not ours.

Results reach memory when the next call waits for them, after it has loaded its residual; of a call that triggers at its
end, before. The sum over ranks is this rank's x.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from bench.quantised import KINDS
from mnnvl_ar import reference
from mnnvl_ar.reference.layouts import swizzled

OLD = {"static_fp8": ("FP8Quant", 2, 4), "nvfp4": ("FP4Quant", 3, 5)}
OLD |= {"group_fp8_packed": ("PerTokenGroupFP8PackedQuant", 8, 9)}
NEW = {**OLD, "per_token_fp8": ("DynamicFP8Quant", 10, 11), "mxfp8": ("MXFP8Quant", 13, 14)}
RELEASES = {"0.6.13": OLD, "0.6.14": OLD, "0.7.4": NEW}

Spoil = Callable[[tuple[torch.Tensor, ...]], None]


def patterns_of(release: str) -> SimpleNamespace:
    codes = {"kAllReduce": 0, "kARResidualRMSNorm": 1}
    for suffix, alone, with_norm in RELEASES[release].values():
        codes |= {f"kARResidualRMSNorm{suffix}": alone, f"kARResidualRMSNormOut{suffix}": with_norm}
    return SimpleNamespace(**codes)


class FlashInfer:
    """spoil: changes the codes and scales that a call is about to write. early: calls may start early; none does where
    nobody is there to `flush` the last."""

    def __init__(self, release: str = "0.7.4", spoil: Spoil = lambda quant: None, early: bool = True) -> None:
        self.AllReduceFusionPattern, self.spoil, self.early = patterns_of(release), spoil, early
        self.kinds = {code: op for op, (_, *both) in RELEASES[release].items() for code in both}
        self.stores_norm = {1, *(with_norm for _, _, with_norm in RELEASES[release].values())}
        self.due: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.calls: list[dict[str, Any]] = []

    def trtllm_allreduce_fusion(
        self,
        allreduce_in: torch.Tensor,
        world_size: int,
        world_rank: int,
        token_num: int,
        hidden_dim: int,
        workspace_ptrs: torch.Tensor,
        launch_with_pdl: bool,
        trigger_completion_at_end: bool,
        fp32_acc: bool,
        pattern_code: int,
        use_oneshot: bool | None,
        allreduce_out: torch.Tensor | None,
        residual_in: torch.Tensor,
        residual_out: torch.Tensor,
        norm_out: torch.Tensor | None,
        quant_out: torch.Tensor | None,
        scale_out: torch.Tensor | None,
        rms_gamma: torch.Tensor,
        rms_eps: float,
        scale_factor: torch.Tensor | None,
        layout_code: int | None,
        metadata: dict[str, object] | None = None,
        block_quant_group_size: int | None = None,
        weight_bias: float | None = None,
    ) -> None:
        told = {name: value for name, value in locals().items() if name != "self"}
        self.calls.append(told)
        assert allreduce_out is None
        assert (token_num, hidden_dim) == allreduce_in.shape == residual_in.shape == residual_out.shape
        assert use_oneshot or token_num > world_size
        assert (norm_out is not None) == (pattern_code in self.stores_norm)
        if not launch_with_pdl:
            self.flush()
        loaded = residual_in.clone()
        self.flush()
        norm, z = reference.all_reduce_rms_norm([allreduce_in], loaded, rms_gamma, rms_eps)
        norm.view(torch.int16)[..., ::7] ^= 1  # as if by another order of adding
        self.due = [(residual_out, z)] if norm_out is None else [(residual_out, z), (norm_out, norm)]
        if pattern_code in self.kinds:
            self._quantise(self.kinds[pattern_code], norm, told)
        else:
            assert quant_out is scale_out is scale_factor is None
        if trigger_completion_at_end or not use_oneshot or not self.early:
            self.flush()

    def flush(self) -> None:
        for memory, value in self.due:
            memory.copy_(value)
        self.due = []

    def _quantise(self, op: str, norm: torch.Tensor, told: dict[str, Any]) -> None:
        tokens, hidden = norm.shape
        quant, scale, factor = told["quant_out"], told["scale_out"], told["scale_factor"]
        codes = torch.uint8 if op == "nvfp4" else torch.float8_e4m3fn
        assert (quant.dtype, quant.shape) == (codes, (tokens, hidden // 2 if op == "nvfp4" else hidden))
        assert quant.is_contiguous()
        assert (factor is not None) == (op in ("static_fp8", "nvfp4"))
        assert (scale is None) == (op == "static_fp8")
        assert (told["block_quant_group_size"] is not None) == (op == "group_fp8_packed")
        if op == "static_fp8":
            made: tuple[torch.Tensor, ...] = (reference.static_fp8(norm, factor),)
        elif op == "nvfp4":
            made = reference.nvfp4(norm, factor)
        else:
            made = KINDS[op].of_norm(norm)
        self.spoil(made)
        self.due.append((quant.view(torch.uint8), made[0].view(torch.uint8)))
        if op in ("mxfp8", "nvfp4"):
            assert told["layout_code"] in (None, 0)
            assert scale.is_contiguous()
            stored = swizzled(torch.ones(tokens, hidden // (16 if op == "nvfp4" else 32), dtype=torch.uint8)).bool()
            behind = scale.view(torch.uint8).clone()  # what pads it stays
            behind[stored] = made[1].view(torch.uint8)[stored]
            self.due.append((scale.view(torch.uint8), behind))
        elif op == "group_fp8_packed":
            groups = hidden // told["block_quant_group_size"]
            assert (scale.dtype, scale.shape) == (torch.int32, (tokens, (groups + 3) // 4))
            assert scale.stride() == (1, (tokens + 3) // 4 * 4)
            self.due.append((scale, made[1]))
        elif op == "per_token_fp8":
            assert (scale.dtype, scale.shape, scale.is_contiguous()) == (torch.float32, (tokens, 1), True)
            self.due.append((scale, made[1]))
