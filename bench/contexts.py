"""What stands around a call while it is timed, and so what is taken off the time again.

A replay is so many steps, each of which is: what comes before a call, the call, what comes after it. A call's time is
that of a step less that of the same step without a call, which takes its turn in the same rounds (bench/timing.py).

chain:  nothing stands around a call: the next one follows at once, and PDL can hide a call's start behind the end of
        the one before. No server has that, and nothing is taken off.
gemm:   as in a layer under tensor parallelism: [T, H/2] x [H/2, H] makes this rank's x, and [T, H] x [H, H/2] reads
        what the call wrote. Weights lie as `torch.nn.Linear` has them. Each step takes other weights, and so many of
        them take turns that L2 holds none of those that are due; all have the same values, so that x has as well.
skew:   in either of them, the last rank comes so many microseconds later than the first, and the others in between,
        evenly: a kernel that spins stands between what comes before a call and the call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.buffers import L2_BYTES, Inputs, Outputs, make_outputs
from bench.cells import Cell
from bench.timing import Replay
from bench.variant import Call


@dataclass(frozen=True)
class Context:
    """before: each launches what a step starts with. after: what it ends with, given what the call has written."""

    before: tuple[Call, ...] = ()
    after: Callable[[int, Outputs], None] | None = None

    @property
    def is_bare(self) -> bool:
        """Nothing is there besides the calls."""
        return not self.before and self.after is None

    def step(self, call: Call | None, outputs: Outputs) -> Call:
        """The i-th step around `call`, which writes `outputs`; without a call, what is to be taken off."""
        parts: list[Call] = [*self.before]
        if call is not None:
            parts.append(call)
        if (after := self.after) is not None:
            parts.append(lambda i: after(i, outputs))

        def run(i: int) -> None:
            for part in parts:
                part(i)

        return parts[0] if len(parts) == 1 else run


def around(cell: Cell, inputs: Inputs, rank: int, device: torch.device) -> Context:
    """The context of `cell`. In "gemm", a step writes one of `inputs.xs`: their values are there once each was written.
    Collective where the cell has a skew, since all ranks must spin for the same time."""
    gemms = Gemms(cell, inputs, rank, device) if cell.context == "gemm" else None
    before: tuple[Call, ...] = () if gemms is None else (gemms.before,)
    if cell.skew_us:
        before += (late_by(cell.skew_us * rank / (cell.tp - 1), device),)
    return Context(before, None if gemms is None else gemms.after)


def base_of(context: Context, cell: Cell, inputs: Inputs, calls: int, device: torch.device) -> Replay | None:
    """The replay of what is to be taken off, run once: where the context makes the inputs, they are there then."""
    if context.is_bare:
        return None
    outputs = make_outputs(cell, inputs)
    for out, residual in zip(outputs.outs, outputs.residuals, strict=False):
        out.copy_(residual)  # what is read there should look like a norm
    replay = Replay(context.step(None, outputs), calls, cell, device)
    replay.run()
    return replay


class Gemms:
    """The two GEMMs around the calls of a cell."""

    def __init__(self, cell: Cell, inputs: Inputs, rank: int, device: torch.device) -> None:
        tokens, hidden = cell.shape
        half = hidden // 2
        generator = torch.Generator(device).manual_seed(hidden)
        normal = functools.partial(torch.randn, generator=generator, device=device)
        first = (normal(hidden, half) * half**-0.5).to(cell.torch_dtype)
        second = (normal(half, hidden) * hidden**-0.5).to(cell.torch_dtype)
        self.weights = [(first.clone(), second.clone()) for _ in range(copies(first.nbytes + second.nbytes, device))]
        generator.manual_seed(104729 * (rank + 1) + tokens)
        source = normal(tokens, half).to(cell.torch_dtype)
        self.sources = (source, -source)  # so that the xs cancel as those of bench/buffers.py do
        self.xs = inputs.xs
        self.sink = torch.empty_like(source)

    def before(self, i: int) -> None:
        x = i % len(self.xs)
        first, _ = self.weights[i % len(self.weights)]
        torch.mm(self.sources[x % 2], first.t(), out=self.xs[x])

    def after(self, i: int, outputs: Outputs) -> None:
        """Reads the norm or the sum; where that was quantised, the residual: a GEMM of codes is another kernel."""
        written = outputs.outs or outputs.residuals
        _, second = self.weights[i % len(self.weights)]
        torch.mm(written[i % len(written)], second.t(), out=self.sink)


def copies(nbytes: int, device: torch.device) -> int:
    """How many copies of `nbytes` of weights must take turns for twice the L2 cache to be read in between. Two on the
    host, where times mean little."""
    if device.type != "cuda":
        return 2
    cache = max(L2_BYTES, torch.cuda.get_device_properties(device).L2_cache_size)
    return 1 + math.ceil(2 * cache / nbytes)


def late_by(us: float, device: torch.device) -> Call:
    """A kernel that spins for `us`, and is there with 0 as well. Only on GPUs."""
    cycles = round(us * cycles_per_us(device))
    return lambda i: torch.cuda._sleep(cycles)


@functools.cache
def cycles_per_us(device: torch.device) -> float:
    """Of the clock that `torch.cuda._sleep` counts, as the GPU runs now; measured once a process, in some 10 ms."""
    cycles, found = 2_000_000, 0.0
    for _ in range(4):  # the first ones bring an idle GPU up to its clock
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        torch.cuda.synchronize()
        found = cycles / (start.elapsed_time(end) * 1e3)
    return found
