"""torch.ops.symm_mem, one-shot and two-shot over unicast, then one kernel for the rest. The multimem ops are never
called.

One-shot copies its input into symmetric memory inside the kernel. Two-shot works in symmetric memory in place, so a
copy goes first, as in a server whose GEMMs write elsewhere.
"""

from __future__ import annotations

import os
from functools import partial

import torch

from bench.buffers import Inputs, Outputs
from bench.cells import Cell
from bench.peers.add_norm import add_norm, forms, require
from bench.team import Team
from bench.variant import Call, Limits, Unavailable, Variant
from mnnvl_ar.memory import multicast_refusal

ONE_SHOT_WIRE_BYTES = 64 << 20  # beyond, it only costs bench time


class SymmMem:
    def __init__(self, team: Team, limits: Limits) -> None:
        require()
        # Rendezvous makes a multicast object by itself unless told not to.
        if os.environ.get("TORCH_SYMM_MEM_DISABLE_MULTICAST") != "1" and multicast_refusal():
            raise Unavailable("multicast is forbidden here and TORCH_SYMM_MEM_DISABLE_MULTICAST is not 1")
        import torch.distributed._symmetric_memory as symmetric

        self.name = team.group.group_name
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
            symmetric.enable_symm_mem_for_group(self.name)
        self.buffer = symmetric.empty(limits.nbytes, dtype=torch.uint8, device=team.device)
        self.handle = symmetric.rendezvous(self.buffer, self.name)

    def variants(self, cell: Cell) -> list[Variant]:
        variants = []
        if (cell.tp - 1) * cell.nbytes <= ONE_SHOT_WIRE_BYTES:
            for name, pdl in forms("symm_mem/one_shot", cell):
                variants.append(Variant(name, partial(self._one_shot, pdl)))
        if cell.nbytes % (16 * cell.tp) == 0:
            for name, pdl in forms("symm_mem/two_shot", cell):
                variants.append(Variant(name, partial(self._two_shot, pdl)))
        return variants

    def close(self) -> None:
        del self.handle, self.buffer

    def _one_shot(self, pdl: bool, cell: Cell, inputs: Inputs, outputs: Outputs) -> Call:
        def reduce(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
            torch.ops.symm_mem.one_shot_all_reduce_copy_out(self._like(x), x, "sum", self.name, total)
            return total

        return self._call(pdl, cell, inputs, outputs, reduce)

    def _two_shot(self, pdl: bool, cell: Cell, inputs: Inputs, outputs: Outputs) -> Call:
        def reduce(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
            buffer = self._like(x)
            buffer.copy_(x)
            torch.ops.symm_mem.two_shot_all_reduce_(buffer, "sum", self.name)
            return buffer

        return self._call(pdl, cell, inputs, outputs, reduce)

    def _like(self, x: torch.Tensor) -> torch.Tensor:
        return self.buffer[: x.nbytes].view(x.dtype).view(x.shape)

    def _call(self, pdl: bool, cell: Cell, inputs: Inputs, outputs: Outputs, reduce) -> Call:  # type: ignore[no-untyped-def]
        xs, residuals, outs, weight = inputs.xs, outputs.residuals, outputs.outs, inputs.weight
        total = torch.empty_like(xs[0])

        def fused(i: int) -> None:
            add_norm(
                reduce(xs[i % len(xs)], total), residuals[i % len(residuals)], weight, outs[i % len(outs)], pdl=pdl
            )

        def plain(i: int) -> None:
            out = outs[i % len(outs)]
            if (result := reduce(xs[i % len(xs)], out)) is not out:
                out.copy_(result)

        return fused if cell.op == "fused" else plain
