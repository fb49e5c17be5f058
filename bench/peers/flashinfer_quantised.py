"""FlashInfer's fused kinds with a quantised output, over trtllm_allreduce_fusion: unicast, as its norm alone is here.

| op | pattern, and with the norm stored | from | what it takes besides quant_out, and writes |
|---|---|---|---|
| static_fp8 | 2, 4 | 0.6.13 | scale_factor, fp32, which the norm is divided by |
| nvfp4 | 3, 5 | 0.6.13 | scale_factor, multiplied in; layout_code. Scales e4m3 in tiles, padding not written |
| group_fp8_packed | 8, 9 | 0.6.13 | block_quant_group_size. Scales int32 [T, ceil(G / 4)], strides (1, align(T, 4)) |
| per_token_fp8 | 10, 11 | 0.7.4 | scales fp32 [T, 1] |
| mxfp8 | 13, 14 | 0.7.4 | layout_code. Scales uint8 in tiles, padding rows not written |

"From": of the releases that were read, 0.6.13, 0.6.14 and 0.7.4. The other kinds of bench/quantised.py it has not.
Below sm_100 its NVFP4 stores zeros and no scales, without an error, so it is left out there.

Codes and scales are judged beside the reference's of the norm that FlashInfer made (bench/codes.py), as its norm is not
ours to the bit: it has another order of adding and a fast reciprocal root. A pattern that stores no norm is given it by
the one that does, called once more on an input of zeros and the residual that was stored, which is then the sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from bench import codes
from bench.buffers import Inputs, Outputs
from bench.cells import Cell
from bench.check import Oracle, verdict
from bench.peers.flashinfer_trtllm import FlashInferTrtllm, Form, forms, unchained
from bench.quantised import KINDS
from bench.team import Team
from bench.variant import Call, Limits, Unavailable, Variant
from mnnvl_ar import scales

TILES = {"layout_code": int(scales.BlockLayout.TILES_128X4)}
# How a pattern's name ends, and the arguments that it alone takes. By the kind's name in bench.quantised.
PATTERNS: dict[str, tuple[str, dict[str, int]]] = {
    "static_fp8": ("FP8Quant", {}),
    "per_token_fp8": ("DynamicFP8Quant", {}),
    "group_fp8_packed": ("PerTokenGroupFP8PackedQuant", {"block_quant_group_size": scales.GROUP}),
    "mxfp8": ("MXFP8Quant", TILES),
    "nvfp4": ("FP4Quant", TILES),
}


def pattern_name(op: str, with_norm: bool) -> str:
    return f"kARResidualRMSNorm{'Out' if with_norm else ''}{PATTERNS[op][0]}"


def has_fp4(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (10, 0)


class FlashInferQuantised(FlashInferTrtllm):
    def __init__(self, team: Team, limits: Limits) -> None:
        super().__init__(team, limits)
        self._oracle: Oracle | None = None
        self._expected: tuple[Inputs, int, Outputs] | None = None

    def variants(self, cell: Cell) -> list[Variant]:
        if cell.op not in PATTERNS:
            return []
        if why := self._refusal(cell.op):
            return [Variant("flashinfer", _refused(why))]
        ways = [(form, with_norm) for form in forms(cell) for with_norm in (False, True)]
        return [Fused(self, cell, *way).variant() for way in ways]

    def arguments(self, cell: Cell, inputs: Inputs, form: Form, with_norm: bool) -> dict[str, Any]:
        """Those that are the same for every call of a cell."""
        fixed = self._fixed(_normed(cell), inputs, *form[1:])
        del fixed["quant_out"], fixed["scale_out"]
        pattern = getattr(self.comm.AllReduceFusionPattern, pattern_name(cell.op, with_norm))
        if (scale := KINDS[cell.op].scale) is not None:
            fixed["scale_factor"] = torch.tensor([scale], device=inputs.weight.device)
        return {**fixed, **PATTERNS[cell.op][1], "pattern_code": pattern}

    def sources(self, cell: Cell, inputs: Inputs, outputs: Outputs, form: Form) -> list[torch.Tensor]:
        """The residuals that calls read. Collective."""
        if not form.early or len(outputs.residuals) > 1:
            return outputs.residuals
        fixed = self._fixed(_normed(cell), inputs, *form[1:])
        return unchained(self.op(), inputs, torch.empty_like(inputs.xs[0]), fixed)

    def norms(self, cell: Cell, inputs: Inputs, outputs: Outputs, form: Form) -> list[torch.Tensor]:
        """Its norms of the residuals that calls have stored. Collective."""
        fixed = self.arguments(cell, inputs, form._replace(early=False), with_norm=True)
        zeros, z = torch.zeros_like(inputs.xs[0]), torch.empty_like(inputs.xs[0])
        quant = KINDS[cell.op].outputs(*cell.shape, zeros.device)
        norms = [torch.empty_like(zeros) for _ in outputs.residuals]
        for residual, norm in zip(outputs.residuals, norms, strict=True):
            call(self.op(), zeros, residual, z, norm, quant, fixed)
        return norms

    def wrong(self, cell: Cell, inputs: Inputs, calls: int, got: Outputs) -> str | None:
        """What is wrong with residuals and norms, whatever was made of these. Collective."""
        known = self._expected
        if known is None or known[0] is not inputs or known[1] != calls:
            oracle = self.oracle()
            known = (inputs, calls, oracle.expected(_normed(cell), inputs, oracle.sums(self.team, inputs), calls))
            self._expected = known
        return verdict(_normed(cell), got, known[2], exact=False)

    def oracle(self) -> Oracle:
        self._oracle = self._oracle or Oracle(self.team.device)
        return self._oracle

    def _refusal(self, op: str) -> str | None:
        for name in (pattern_name(op, with_norm) for with_norm in (False, True)):
            if not hasattr(self.comm.AllReduceFusionPattern, name):
                return f"FlashInfer {self.about['version']} has no {name}"
        if op == "nvfp4" and not has_fp4(self.team.device):
            return "FlashInfer's NVFP4 stores zeros and no scales below sm_100"
        return None


class Fused:
    """One form of a cell's pattern. What `judge` finds out goes into the row, by the variant's `extra`."""

    def __init__(self, peer: FlashInferQuantised, cell: Cell, form: Form, with_norm: bool) -> None:
        self.peer, self.cell, self.form, self.with_norm = peer, cell, form, with_norm
        self.extra: dict[str, Any] = {**peer.about}
        self.norms: list[torch.Tensor] = []  # that calls have stored

    def variant(self) -> Variant:
        name = self.form.name + ("/with_norm" if self.with_norm else "")
        return Variant(name, self.bind, extra=self.extra, judge=self.judge)

    def bind(self, cell: Cell, inputs: Inputs, outputs: Outputs) -> Call:
        run, fixed = self.peer.op(), self.peer.arguments(cell, inputs, self.form, self.with_norm)
        sources = self.peer.sources(cell, inputs, outputs, self.form)
        xs, residuals, quants = inputs.xs, outputs.residuals, outputs.quants
        nan = float("nan")  # nothing else poisons them
        self.norms = [torch.full_like(residual, nan) for residual in residuals] if self.with_norm else []

        def one(i: int) -> None:
            at = i % len(residuals)
            norm = self.norms[at] if self.norms else None
            call(run, xs[i % len(xs)], sources[i % len(sources)], residuals[at], norm, quants[at], fixed)

        return one

    def judge(self, inputs: Inputs, outputs: Outputs, calls: int) -> str | None:
        norms = self.norms or self.peer.norms(self.cell, inputs, outputs, self.form)
        wrong = self.peer.wrong(self.cell, inputs, calls, Outputs(outputs.residuals, norms))
        row, off = codes.judge(self.cell.op, norms, outputs.quants, self.peer.oracle().device)
        self.extra.update(row)
        return wrong or off


def call(
    run: Callable[..., None],
    x: torch.Tensor,
    residual: torch.Tensor,
    z: torch.Tensor,
    norm: torch.Tensor | None,
    quant: tuple[torch.Tensor, ...],
    fixed: dict[str, Any],
) -> None:
    run(
        allreduce_in=x,
        allreduce_out=None,
        residual_in=residual,
        residual_out=z,
        norm_out=norm,
        quant_out=quant[0],
        scale_out=quant[1] if len(quant) > 1 else None,
        **fixed,
    )


def _normed(cell: Cell) -> Cell:
    """The same without the quantised output."""
    return dataclasses.replace(cell, op="fused")


def _refused(why: str) -> Callable[[Cell, Inputs, Outputs], Call]:
    def bind(cell: Cell, inputs: Inputs, outputs: Outputs) -> Call:
        raise Unavailable(why)

    return bind
