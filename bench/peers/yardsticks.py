"""What something else takes in a call's place, to read a call's time by. None is an all-reduce, so none competes.

trivial:   a kernel that stores one word: what any kernel costs there, which includes the gap between two of them.
           PyTorch's `fill_`, since a server's kernels are launched as that is: by the runtime, with a plain edge.
copy:      this rank's rows into the output, by a kernel: what reading and writing them costs. PyTorch's `copy_` would
           be a copy node in a graph, so the rows are multiplied by 1.
add_norm:  in a world of one only, where there is nothing to reduce: add + RMSNorm by the peers' Triton kernel. That is
           the answer, and checked as such.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.buffers import Inputs, Outputs
from bench.cells import Cell
from bench.check import same_bits
from bench.peers import add_norm
from bench.team import Team
from bench.variant import Call, Limits, Variant

MARK = 3.0


class Yardsticks:
    def __init__(self, team: Team, limits: Limits) -> None:
        self.has_norm = add_norm.triton is not None and team.device.type == "cuda"

    def variants(self, cell: Cell) -> list[Variant]:
        found = [
            Variant("yardstick/trivial", _trivial, judge=_is_marked),
            Variant("yardstick/copy", _copy, judge=_is_copied),
        ]
        if cell.tp == 1 and cell.op == "fused" and self.has_norm:
            found.append(Variant("yardstick/add_norm", _add_norm))
        return found

    def close(self) -> None: ...


def _written(outputs: Outputs) -> list[torch.Tensor]:
    return outputs.outs or outputs.residuals


def _trivial(cell: Cell, inputs: Inputs, outputs: Outputs) -> Call:
    words = [out.view(-1)[:1] for out in _written(outputs)]

    def call(i: int) -> None:
        words[i % len(words)].fill_(MARK)

    return call


def _is_marked(inputs: Inputs, outputs: Outputs, calls: int) -> str | None:
    marked = all(float(out.view(-1)[0]) == MARK for out in _written(outputs)[:calls])
    return None if marked else "the word is not there"


def _copy(cell: Cell, inputs: Inputs, outputs: Outputs) -> Call:
    xs, outs = inputs.xs, _written(outputs)

    def call(i: int) -> None:
        torch.mul(xs[i % len(xs)], 1, out=outs[i % len(outs)])

    return call


def _is_copied(inputs: Inputs, outputs: Outputs, calls: int) -> str | None:
    copied = all(same_bits(outputs_, x) for outputs_, x in _last(inputs.xs, _written(outputs), calls))
    return None if copied else "other bits than the rows"


def _last(xs: list[torch.Tensor], outs: list[torch.Tensor], calls: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each output, and what the last call that wrote it has read."""
    for call in range(max(0, calls - len(outs)), calls):
        yield outs[call % len(outs)], xs[call % len(xs)]


def _add_norm(cell: Cell, inputs: Inputs, outputs: Outputs) -> Call:
    xs, residuals, outs = inputs.xs, outputs.residuals, outputs.outs

    def call(i: int) -> None:
        add_norm.add_norm(xs[i % len(xs)], residuals[i % len(residuals)], inputs.weight, outs[i % len(outs)])

    return call
