"""NCCL: ncclAllReduce, then one kernel for the rest.

nccl:           on buffers that it knows nothing of. With NCCL_GRAPH_MIXING_SUPPORT=0 in the environment, which spares
                captured calls some nodes, the variants are called "nccl/unmixed": NCCL reads the switch once a process,
                so that is a run of its own
nccl_symmetric: on symmetric windows, for which it has other kernels; which of them is its choice, unless
                NCCL_SYM_KERNEL names one. Inputs are copied into the window when a variant is bound: in a server, the
                kernel before would have written them there
"""

from __future__ import annotations

import os
from functools import partial

import torch

from bench.buffers import L2_BYTES, Inputs, Outputs, tensor_at
from bench.cells import Cell
from bench.peers.add_norm import add_norm, forms, require
from bench.peers.nccl_library import Communicator
from bench.team import Team
from bench.variant import Call, Limits, Unavailable, Variant
from mnnvl_ar.memory import multicast_refusal

ALIGNMENT = 512  # bytes, as PyTorch's allocator


class Nccl:
    def __init__(self, team: Team, limits: Limits) -> None:
        require()
        self.name = "nccl/unmixed" if os.environ.get("NCCL_GRAPH_MIXING_SUPPORT") == "0" else "nccl"
        self.communicator = Communicator(team)

    def variants(self, cell: Cell) -> list[Variant]:
        return [Variant(name, partial(self._bind, pdl)) for name, pdl in forms(self.name, cell)]

    def close(self) -> None:
        self.communicator.close()

    def _bind(self, pdl: bool, cell: Cell, inputs: Inputs, outputs: Outputs) -> Call:
        return self._call(pdl, cell, inputs, outputs, inputs.xs, torch.empty_like(inputs.xs[0]))

    def _call(
        self,
        pdl: bool,
        cell: Cell,
        inputs: Inputs,
        outputs: Outputs,
        xs: list[torch.Tensor],
        total: torch.Tensor,
    ) -> Call:
        residuals, outs, weight = outputs.residuals, outputs.outs, inputs.weight

        def fused(i: int) -> None:
            self.communicator.all_reduce(xs[i % len(xs)], total)
            add_norm(total, residuals[i % len(residuals)], weight, outs[i % len(outs)], pdl=pdl)

        def plain(i: int) -> None:
            self.communicator.all_reduce(xs[i % len(xs)], outs[i % len(outs)])

        return fused if cell.op == "fused" else plain


class NcclSymmetric(Nccl):
    def __init__(self, team: Team, limits: Limits) -> None:
        if os.environ.get("NCCL_NVLS_ENABLE") != "0" and multicast_refusal():
            raise Unavailable("multicast is forbidden here and NCCL_NVLS_ENABLE is not 0")
        if team.size == 1:
            raise Unavailable("a world of one has nobody to share a window with")
        super().__init__(team, limits)
        self.name = "nccl_symmetric"
        # What a cell has of inputs, as much of outputs, and a sum.
        self.window = self.communicator.window(6 * L2_BYTES + 5 * (limits.nbytes + ALIGNMENT))
        self.memory = tensor_at(self.window.pointer, self.window.nbytes, team.device)

    def close(self) -> None:
        del self.memory
        self.communicator.free(self.window)
        super().close()

    def _bind(self, pdl: bool, cell: Cell, inputs: Inputs, outputs: Outputs) -> Call:
        """All variants of a cell share the window's memory, as they run one after the other. In a plain cell, what the
        outputs are from then on lies there too."""
        count = len(inputs.xs)
        likes = [*inputs.xs, inputs.xs[0], *(outputs.outs if cell.op == "plain" else [])]
        places = placed(self.memory, likes)
        for place, x in zip(places, inputs.xs, strict=False):
            place.copy_(x)
        if cell.op == "plain":
            outputs.outs[:] = places[count + 1 :]
        return self._call(pdl, cell, inputs, outputs, places[:count], places[count])


def placed(memory: torch.Tensor, likes: list[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors like those given, one behind the other in `memory`, a tensor of bytes."""
    found, at = [], 0
    for like in likes:
        if at + like.nbytes > memory.nbytes:
            raise Unavailable(f"{memory.nbytes} bytes of window are too small for {len(likes)} x {like.nbytes}")
        found.append(memory[at : at + like.nbytes].view(like.dtype).view(like.shape))
        at += -(-like.nbytes // ALIGNMENT) * ALIGNMENT
    return found
