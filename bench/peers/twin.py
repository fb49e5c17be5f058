"""The twin in CuTe DSL (mnnvl_ar/dsl), on a workspace of its own: what a kernel that is written in Python gets of ours.

No speed is promised of it, and none expected: docs/twin.md says where it loses. Only by `--peers twin`.
"""

from __future__ import annotations

import torch

from bench.buffers import EPS, Inputs, Outputs
from bench.cells import Cell
from bench.team import Team
from bench.variant import Call, Limits, Unavailable, Variant
from mnnvl_ar import Strategy, Workspace, dsl
from mnnvl_ar.dsl import constants
from mnnvl_ar.dsl.launch import TwinUnavailable

NAME = "mnnvl_ar/twin"  # of ours: a wrong bit of it is ours


class Twin:
    def __init__(self, team: Team, limits: Limits) -> None:
        if team.size not in constants.WORLD_SIZES or team.device.type != "cuda":
            raise Unavailable(f"it is for {', '.join(map(str, constants.WORLD_SIZES))} GPUs")
        try:
            dsl.load(team.device, team.size)
        except TwinUnavailable as why:
            raise Unavailable(str(why)) from why
        self.workspace = Workspace(
            team.control,
            limits.tokens,
            min(limits.hidden, constants.MOST_HIDDEN),
            torch.bfloat16,
            device=team.device,
            transport="unicast",
            strategy="one_shot",
            deadline=30.0,
            concurrent=False,  # all variants are on one stream
        )

    def variants(self, cell: Cell) -> list[Variant]:
        has = cell.op == "fused" and cell.torch_dtype == torch.bfloat16 and cell.hidden <= constants.MOST_HIDDEN
        if not has or not self.workspace.fits(cell.tokens, cell.hidden, cell.torch_dtype, "one_shot"):
            return []
        return [Variant(NAME, self._bind, exact=True, extra={"strategy": "one_shot", "transport": "unicast"})]

    def close(self) -> None:
        self.workspace.close()

    def _bind(self, cell: Cell, inputs: Inputs, outputs: Outputs) -> Call:
        xs, residuals, outs, weight = inputs.xs, outputs.residuals, outputs.outs, inputs.weight
        handle, strategy = self.workspace.handle, int(Strategy.ONE_SHOT)

        def call(i: int) -> None:
            residual, out = residuals[i % len(residuals)], outs[i % len(outs)]
            dsl.all_reduce_rms_norm(
                xs[i % len(xs)], residual, weight, EPS, handle, strategy=strategy, out=(out, residual)
            )

        return call
