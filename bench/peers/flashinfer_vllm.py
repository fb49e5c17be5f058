"""vLLM's custom all-reduce, in FlashInfer's copy, then one kernel for the rest.

As vLLM uses it: in a graph the input is registered after capture and read by the peers where it lies; an eager call
copies it into a registered buffer first. Inputs lie in memory that lives as long as the peer does, since memory that
others have mapped by CUDA IPC must not be freed under them.
"""

from __future__ import annotations

import ctypes
from functools import partial

import torch

from bench.buffers import L2_BYTES, Inputs, Outputs, tensor_at
from bench.cells import Cell
from bench.peers import flashinfer_build
from bench.peers.add_norm import add_norm, forms, require
from bench.team import Team
from bench.variant import Call, Limits, Unavailable, Variant

SIZES = (2, 4, 6, 8)
RANK_DATA_BYTES = 16 << 20  # 64 bytes a captured call
CTAS = 36


class FlashInferVllm:
    def __init__(self, team: Team, limits: Limits) -> None:
        require()
        if team.size not in SIZES:
            raise Unavailable(f"only for world sizes {SIZES}, not {team.size}")
        flashinfer_build.build_in_turn("vllm", team)
        from flashinfer.comm import cuda_ipc, vllm_ar

        self.team, self.api, self.cuda_ipc = team, vllm_ar, cuda_ipc
        self.nbytes = limits.nbytes
        meta = vllm_ar.meta_size() + self.nbytes  # signals, and room for the two-stage kernel's partial sums
        self.signals = self._zeroed(meta)
        self.registered = self._zeroed(self.nbytes)
        self.shared = self._zeroed(3 * L2_BYTES + 2 * self.nbytes)  # the inputs of any cell
        self.inputs = tensor_at(self.shared[team.rank], 3 * L2_BYTES + 2 * self.nbytes, team.device)
        self.rank_data = torch.empty(RANK_DATA_BYTES, dtype=torch.uint8, device=team.device)
        self.handle = vllm_ar.init_custom_ar(self.signals, self.rank_data, team.rank, True)
        vllm_ar.register_buffer(self.handle, self.registered)

    def variants(self, cell: Cell) -> list[Variant]:
        if cell.nbytes % 16 != 0:
            return []
        finish = self._register if cell.mode == "graph" else None
        return [Variant(name, partial(self._bind, pdl), finish=finish) for name, pdl in forms("vllm", cell)]

    def close(self) -> None:
        self.api.dispose(self.handle)
        for pointers in (self.signals, self.registered, self.shared):
            self.cuda_ipc.free_shared_buffer(pointers, group=self.team.control)

    def _zeroed(self, nbytes: int) -> list[int]:
        pointers: list[int] = self.cuda_ipc.create_shared_buffer(nbytes, group=self.team.control)
        self.cuda_ipc.cudart.cudaMemset(ctypes.c_void_p(pointers[self.team.rank]), 0, nbytes)
        torch.cuda.synchronize()
        self.team.barrier()
        return pointers

    def _register(self) -> None:
        """Tells all ranks where the inputs of the calls just captured lie. Collective."""
        handles, offsets = self.api.get_graph_buffer_ipc_meta(self.handle)
        everyone = self.team.gather(([int(b) for b in handles], [int(o) for o in offsets]))
        self.api.register_graph_buffers(self.handle, [h for h, _ in everyone], [o for _, o in everyone])

    def _place(self, xs: list[torch.Tensor]) -> list[torch.Tensor]:
        """The same inputs in shared memory."""
        nbytes = xs[0].nbytes
        placed = [self.inputs[i * nbytes : (i + 1) * nbytes].view(x.dtype).view(x.shape) for i, x in enumerate(xs)]
        for place, x in zip(placed, xs, strict=True):
            place.copy_(x)
        return placed

    def _bind(self, pdl: bool, cell: Cell, inputs: Inputs, outputs: Outputs) -> Call:
        xs, residuals, outs, weight = self._place(inputs.xs), outputs.residuals, outputs.outs, inputs.weight
        total = torch.empty_like(xs[0])
        own = self.registered[self.team.rank]

        def reduce(x: torch.Tensor, out: torch.Tensor) -> None:
            buffer = 0 if torch.cuda.is_current_stream_capturing() else own
            self.api.all_reduce(self.handle, x, out, buffer, self.nbytes, CTAS)

        def fused(i: int) -> None:
            reduce(xs[i % len(xs)], total)
            add_norm(total, residuals[i % len(residuals)], weight, outs[i % len(outs)], pdl=pdl)

        def plain(i: int) -> None:
            reduce(xs[i % len(xs)], outs[i % len(outs)])

        return fused if cell.op == "fused" else plain
