"""A cell's tensors: random inputs that all variants share, and outputs that each variant has for itself."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from bench.cells import Cell
from bench.quantised import KINDS, memory_of

EPS = 1e-6
L2_BYTES = 64 << 20  # of an H200 and less than twice it; cold buffers cover it twice


@dataclass(frozen=True)
class Inputs:
    """xs: call i reads xs[i % len(xs)]. residuals: what a chain of calls starts from, the same on all ranks. weight:
    [hidden]."""

    xs: list[torch.Tensor]
    residuals: list[torch.Tensor]
    weight: torch.Tensor


@dataclass(frozen=True)
class Outputs:
    """Call i writes set i % len: `residuals` in place and `outs`, as a server does. `outs`: the norm, or the sum when
    plain; none when quantised. `quants`: what is stored of the norm then."""

    residuals: list[torch.Tensor]
    outs: list[torch.Tensor]
    quants: list[tuple[torch.Tensor, ...]] = field(default_factory=list)


def sets(cell: Cell, calls: int) -> int:
    """How many sets of buffers the calls of one replay go through."""
    if cell.l2 == "warm":
        return 1
    return max(1, min(calls, 2 * L2_BYTES // cell.nbytes + 1))


def make_inputs(cell: Cell, rank: int, calls: int, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(1000 * cell.tokens + cell.hidden)
    shared = [_normal(cell.shape, cell, generator) for _ in range(sets(cell, calls))]
    weight = 1 + 0.1 * _normal((cell.hidden,), cell, generator)
    generator.manual_seed(7919 * (rank + 1) + cell.tokens)
    if cell.l2 == "warm":
        # Two inputs that cancel: a residual of many calls then stays of one size, so that rounding does not pile up,
        # and what is left in a ring's slot from three calls ago is never what is due now.
        x = _normal(cell.shape, cell, generator)
        xs = [x, -x]
    else:
        xs = [_normal(cell.shape, cell, generator) for _ in range(len(shared))]
    return Inputs(xs, shared, weight)


def make_outputs(cell: Cell, inputs: Inputs) -> Outputs:
    residuals = [r.clone() for r in inputs.residuals]
    if kind := KINDS.get(cell.op):
        return Outputs(residuals, [], [kind.outputs(*cell.shape, r.device) for r in residuals])
    return Outputs(residuals, [torch.empty_like(r) for r in residuals])


def reset(inputs: Inputs, outputs: Outputs) -> None:
    """Brings residuals back to their start, and poisons what is to be written."""
    for residual, start in zip(outputs.residuals, inputs.residuals, strict=True):
        residual.copy_(start)
    for out in outputs.outs:
        out.fill_(float("nan"))
    for quant in outputs.quants:
        for each in quant:
            memory_of(each).fill_(0xA5)


def _normal(shape: tuple[int, ...], cell: Cell, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).to(cell.torch_dtype)


def tensor_at(pointer: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """Bytes at `pointer` on `device`, a GPU, which the caller keeps allocated."""

    class Memory:
        __cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (pointer, False), "version": 3}  # noqa: RUF012

    return torch.as_tensor(Memory(), device=device)
