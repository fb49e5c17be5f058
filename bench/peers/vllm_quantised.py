"""A quantised output in two kernels: mnnvl_ar's call with the norm, then vLLM's op that quantises it.

What a server has that fuses the norm, but not the codes. vLLM's ops are loaded from its wheel without importing vLLM;
those of FP4 and MXFP8 are not for an H200.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch

from bench.buffers import EPS, Inputs, Outputs
from bench.cells import Cell
from bench.quantised import KINDS, SCALE
from bench.team import Team
from bench.variant import Call, Limits, Unavailable, Variant
from mnnvl_ar import Workspace, ops

NAME = "mnnvl_ar+vllm"
LIBRARY = "_C_stable_libtorch.abi3.so"  # from vLLM 0.20 on

GROUP = (128, 1e-10, -448.0, 448.0)  # elements, the least of a group's largest, and the range of codes

Quantise = Callable[..., None]


def load_ops() -> None:
    """Makes the ops of the vLLM that is installed `torch.ops._C`'s."""
    found = importlib.util.find_spec("vllm")
    folders = found.submodule_search_locations if found is not None else None
    library = next((path for folder in folders or () if (path := Path(folder) / LIBRARY).exists()), None)
    if library is None:
        raise Unavailable(f"no vllm/{LIBRARY}")
    torch.ops.load_library(str(library))


def static_fp8(norm: torch.Tensor, quant: torch.Tensor, scale: torch.Tensor) -> None:
    torch.ops._C.static_scaled_fp8_quant(quant, norm, scale)


def per_token_fp8(norm: torch.Tensor, quant: torch.Tensor, scale: torch.Tensor) -> None:
    torch.ops._C.dynamic_per_token_scaled_fp8_quant(quant, norm, scale, None)


def _by_group(norm: torch.Tensor, quant: torch.Tensor, scale: torch.Tensor, power_of_two: bool) -> None:
    by_strides = (True, True)  # what it calls dummies: it reads the layout off the scale
    torch.ops._C.per_token_group_fp8_quant(norm, quant, scale, *GROUP, power_of_two, *by_strides)


def group_fp8(norm: torch.Tensor, quant: torch.Tensor, scale: torch.Tensor) -> None:
    _by_group(norm, quant, scale, power_of_two=False)


def group_fp8_power(norm: torch.Tensor, quant: torch.Tensor, scale: torch.Tensor) -> None:
    _by_group(norm, quant, scale, power_of_two=True)


def group_fp8_packed(norm: torch.Tensor, quant: torch.Tensor, scale: torch.Tensor) -> None:
    torch.ops._C.per_token_group_fp8_quant_packed(norm, quant, scale, *GROUP)


# By the kind's name in bench.quantised. Each is given norm, codes and scale.
QUANTISE: dict[str, Quantise] = {
    op.__name__: op for op in (static_fp8, per_token_fp8, group_fp8, group_fp8_power, group_fp8_packed)
}


class VllmQuantised:
    def __init__(self, team: Team, limits: Limits) -> None:
        load_ops()
        size = (limits.tokens, limits.hidden, torch.bfloat16)
        self.workspace = Workspace(team.control, *size, device=team.device, deadline=30.0, concurrent=False)

    def variants(self, cell: Cell) -> list[Variant]:
        return [Variant(NAME, self._bind)] if cell.op in QUANTISE else []

    def close(self) -> None:
        self.workspace.close()

    def _bind(self, cell: Cell, inputs: Inputs, outputs: Outputs) -> Call:
        xs, residuals, quants, weight = inputs.xs, outputs.residuals, outputs.quants, inputs.weight
        norm, handle, quantise = torch.empty_like(xs[0]), self.workspace.handle, QUANTISE[cell.op]
        given = () if KINDS[cell.op].scale is None else (torch.tensor([SCALE], device=norm.device),)

        def call(i: int) -> None:
            residual = residuals[i % len(residuals)]
            ops.all_reduce_rms_norm_out(xs[i % len(xs)], residual, weight, EPS, norm, residual, handle)
            quantise(norm, *quants[i % len(quants)], *given)

        return call
