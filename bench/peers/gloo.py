"""gloo on the host, for the bench's own tests: the one peer that needs no GPU."""

from __future__ import annotations

import torch
import torch.distributed as dist

from bench.buffers import EPS, Inputs, Outputs
from bench.cells import Cell
from bench.team import Team
from bench.variant import Call, Limits, Variant


class Gloo:
    def __init__(self, team: Team, limits: Limits) -> None:
        self.group = team.group

    def variants(self, cell: Cell) -> list[Variant]:
        return [Variant("gloo", self._bind)]

    def close(self) -> None:
        pass

    def _bind(self, cell: Cell, inputs: Inputs, outputs: Outputs) -> Call:
        def call(i: int) -> None:
            out, residual = outputs.outs[i % len(outputs.outs)], outputs.residuals[i % len(outputs.residuals)]
            total = inputs.xs[i % len(inputs.xs)].clone()
            dist.all_reduce(total, group=self.group)
            if cell.op == "plain":
                out.copy_(total)
                return
            residual += total
            out.copy_(torch.nn.functional.rms_norm(residual.float(), (cell.hidden,), inputs.weight.float(), EPS))

        return call
