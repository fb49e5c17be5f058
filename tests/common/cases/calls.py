"""One call, checked: inputs from a seed, the op, and every output bit held against the reference."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from common.rows import DTYPES, hostile_rows, weights

# Outputs of the ops.
NAMES = {"all_reduce": ("out",), "all_reduce_rms_norm": ("norm_out", "residual_out")}

# Aliasing, as callers do it. A: norm_out is x, residual_out is residual. B: residual is zeros, residual_out is x. C:
# residual_out is x, residual is kept. D: norm_out is x, residual_out fresh. E: all fresh, all inputs kept.
ALIASING = ("A", "B", "C", "D", "E")


@dataclass(frozen=True)
class Call:
    """A call of all ranks."""

    op: str = "all_reduce_rms_norm"
    tokens: int = 1
    hidden: int = 64
    dtype: str = "bf16"
    out: str = ""  # "": the functional form; else the `_out` form, aliased as in ALIASING; all_reduce_out knows A and E
    strategy: int = -1
    pdl: int = -1
    fp32_weight: bool = False
    weight_bias: float = 0.0
    eps: float = 1e-6
    tag: int = 0
    lead: tuple[int, ...] = ()  # leading dimensions in place of (tokens,); their product is tokens
    seed: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (*(self.lead or (self.tokens,)), self.hidden)


_one_at_a_time = threading.RLock()  # virtual ranks share what is cached


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Caches results, and computes each only once among threads."""
    cached = functools.lru_cache(64)(function)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        with _one_at_a_time:
            return cached(*arguments)

    return call


@once
def inputs(call: Call, world_size: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """(each rank's x, residual, weight) on the CPU. Not to be written."""
    dtype = DTYPES[call.dtype]
    xs = [
        hostile_rows(call.tokens, call.hidden, dtype, seed=call.seed, rank=rank).view(call.shape)
        for rank in range(world_size)
    ]
    residual = hostile_rows(call.tokens, call.hidden, dtype, seed=call.seed, rank=world_size).view(call.shape)
    if call.out == "B":
        residual = torch.zeros_like(residual)
    return xs, residual, weights(call.hidden, torch.float32 if call.fp32_weight else dtype, seed=call.seed)


@once
def wanted(call: Call, world_size: int) -> tuple[torch.Tensor, ...]:
    """What the reference answers."""
    from mnnvl_ar import reference

    xs, residual, weight = inputs(call, world_size)
    if call.op == "all_reduce":
        return (reference.all_reduce(xs),)
    return reference.all_reduce_rms_norm(xs, residual, weight, call.eps, call.weight_bias)


class Prepared:
    """A call with its inputs on the device of `rank`; outputs of the `_out` form are poisoned beforehand."""

    def __init__(self, rank: Any, call: Call) -> None:
        self.call, self.rank = call, rank
        xs, residual, weight = inputs(call, rank.world_size)
        self._x, self._residual = xs[rank.rank], residual
        self.x, self.residual, self.weight = (t.to(rank.device, copy=True) for t in (self._x, residual, weight))
        fresh = [torch.full_like(self._x, 3.0).to(rank.device) for _ in range(2)] if call.out else []
        if call.out:
            self.norm_out = self.x if call.out in ("A", "D") else fresh[0]
            self.residual_out = {"A": self.residual, "B": self.x, "C": self.x}.get(call.out, fresh[1])
        self.outputs: tuple[torch.Tensor, ...] = ()

    def refill(self) -> None:
        """Puts back inputs that the call overwrites."""
        if self.call.out not in ("", "E"):
            self.x.copy_(self._x)
            self.residual.copy_(self._residual)

    def launch(self, handle: int) -> None:
        from mnnvl_ar import ops

        call, choice = self.call, {"strategy": self.call.strategy, "pdl": self.call.pdl, "tag": self.call.tag}
        if call.op == "all_reduce" and not call.out:
            self.outputs = (ops.all_reduce(self.x, handle, **choice),)
        elif call.op == "all_reduce":
            ops.all_reduce_out(self.x, self.norm_out, handle, **choice)
            self.outputs = (self.norm_out,)
        else:
            arguments, choice = (
                (self.x, self.residual, self.weight, call.eps),
                {**choice, "weight_bias": call.weight_bias},
            )
            if call.out:
                ops.all_reduce_rms_norm_out(*arguments, self.norm_out, self.residual_out, handle, **choice)
                self.outputs = (self.norm_out, self.residual_out)
            else:
                self.outputs = ops.all_reduce_rms_norm(*arguments, handle, **choice)

    def wrong(self) -> list[str]:
        """What differs from the reference, or was written and should not have been. Waits for the call."""
        from mnnvl_ar.reference import same_bits

        call, found = self.call, []
        for name, got, want in zip(NAMES[call.op], self.outputs, wanted(call, self.rank.world_size), strict=True):
            if not same_bits(got, want):
                integer = torch.int16 if want.element_size() == 2 else torch.int32
                differs = (got.cpu().view(integer) != want.view(integer)) & ~(got.cpu().isnan() & want.isnan())
                place = tuple(differs.nonzero()[0].tolist()) if differs.any() else ()
                found.append(
                    f"{call}: {name} of rank {self.rank.rank} differs in {int(differs.sum())}, first at {place}"
                )
        kept = {"x": (self.x, self._x), "residual": (self.residual, self._residual)}
        for name, (now, before) in kept.items():
            written = any(now.data_ptr() == output.data_ptr() for output in self.outputs)
            if not written and not same_bits(now, before):
                found.append(f"{call}: {name} of rank {self.rank.rank} was written")
        return found


def check_calls(
    rank: Any, calls: list[Call], workspace: dict[str, Any] | None = None, handle: int = 0, late: float = 0.0
) -> int:
    """Makes the calls back to back on a kept workspace (or on `handle`), the last rank `late` seconds after the others,
    then checks every bit of each. Returns how many.
    """
    handle = handle or rank.workspace(**(workspace or {})).handle
    for start in range(0, len(calls), 32):
        prepared = [Prepared(rank, call) for call in calls[start : start + 32]]
        rank.barrier()  # so that ranks race in the calls, not in the preparation
        if rank.rank == rank.world_size - 1:
            time.sleep(late)
        for each in prepared:
            each.launch(handle)
        rank.synchronize()
        wrong = [line for each in prepared for line in each.wrong()]
        assert not wrong, "\n".join(wrong[:8])
    return len(calls)
