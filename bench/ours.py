"""mnnvl_ar itself, by strategy and PDL mode, over one workspace a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.buffers import EPS, Inputs, Outputs
from bench.cells import Cell
from bench.quantised import KINDS, bind
from bench.team import Team
from bench.variant import Call, Limits, Variant
from mnnvl_ar import Pdl, Strategy, Workspace, ops

NAME = "mnnvl_ar"


class Ours:
    def __init__(
        self, team: Team, limits: Limits, strategies: Sequence[str], pdls: Sequence[str], transport: str
    ) -> None:
        self.strategies, self.pdls = strategies, pdls
        largest = max(limits.dtypes, key=lambda dtype: dtype.itemsize)
        # A forced one-shot needs more room than auto ever uses, so it gets a workspace of its own, if it is asked for.
        self.workspaces = {
            kind: Workspace(
                team.control,
                limits.tokens,
                limits.hidden,
                largest,
                device=team.device,
                transport=transport,
                strategy=kind,
                deadline=30.0,
                concurrent=False,  # all variants are on one stream
            )
            for kind in ("auto", "one_shot")
            if kind == "auto" or kind in strategies
        }

    def variants(self, cell: Cell) -> list[Variant]:
        return [
            self._variant(cell, strategy, pdl, pdl == self.pdls[0], with_norm)
            for strategy in self.strategies
            for pdl in self.pdls
            for with_norm in ((False, True) if cell.op in KINDS else (False,))
            if self._workspace(strategy).fits(cell.tokens, cell.hidden, cell.torch_dtype)
        ]

    def close(self) -> None:
        for workspace in self.workspaces.values():
            workspace.close()

    def check(self) -> None:
        for workspace in self.workspaces.values():
            workspace.check()

    def _workspace(self, strategy: str) -> Workspace:
        return self.workspaces["one_shot" if strategy == "one_shot" else "auto"]

    def _variant(self, cell: Cell, strategy: str, pdl: str, first: bool, with_norm: bool) -> Variant:
        name = NAME + (f"/{strategy}" if strategy != "auto" else "") + ("" if first else f"/pdl_{pdl}")
        name += "/with_norm" if with_norm else ""
        extra = {"strategy": strategy, "pdl": pdl, "transport": self._workspace(strategy).transport}
        handle = self._workspace(strategy).handle
        options = {"strategy": int(Strategy[strategy.upper()]), "pdl": int(Pdl[pdl.upper()])}

        def bind(cell: Cell, inputs: Inputs, outputs: Outputs) -> Call:
            return bind_call(cell, inputs, outputs, handle, options, with_norm)

        return Variant(name, bind, exact=True, extra=extra)


def bind_call(
    cell: Cell, inputs: Inputs, outputs: Outputs, handle: int, options: dict[str, Any], with_norm: bool = False
) -> Call:
    """Call i of `cell` on workspace `handle`: residual in place, norm or what stands for it into its own buffers.
    with_norm: of a quantised op, the norm besides."""
    if kind := KINDS.get(cell.op):
        return bind(kind, inputs, outputs, EPS, handle, options, with_norm)
    xs, residuals, outs, weight = inputs.xs, outputs.residuals, outputs.outs, inputs.weight

    def fused(i: int) -> None:
        residual = residuals[i % len(residuals)]
        out = outs[i % len(outs)]
        ops.all_reduce_rms_norm_out(xs[i % len(xs)], residual, weight, EPS, out, residual, handle, **options)

    def plain(i: int) -> None:
        ops.all_reduce_out(xs[i % len(xs)], outs[i % len(outs)], handle, **options)

    return fused if cell.op == "fused" else plain
