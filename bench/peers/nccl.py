"""NCCL: ncclAllReduce, then one kernel for the rest."""

from __future__ import annotations

import torch

from bench.buffers import Inputs, Outputs
from bench.cells import Cell
from bench.peers.add_norm import add_norm, require
from bench.peers.nccl_library import Communicator
from bench.team import Team
from bench.variant import Call, Limits, Variant


class Nccl:
    def __init__(self, team: Team, limits: Limits) -> None:
        require()
        self.communicator = Communicator(team)

    def variants(self, cell: Cell) -> list[Variant]:
        return [Variant("nccl", self._bind)]

    def close(self) -> None:
        self.communicator.close()

    def _bind(self, cell: Cell, inputs: Inputs, outputs: Outputs) -> Call:
        xs, residuals, outs, weight = inputs.xs, outputs.residuals, outputs.outs, inputs.weight
        total = torch.empty_like(xs[0])

        def fused(i: int) -> None:
            self.communicator.all_reduce(xs[i % len(xs)], total)
            add_norm(total, residuals[i % len(residuals)], weight, outs[i % len(outs)])

        def plain(i: int) -> None:
            self.communicator.all_reduce(xs[i % len(xs)], outs[i % len(outs)])

        return fused if cell.op == "fused" else plain
