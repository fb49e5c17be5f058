"""FlashInfer's MNNVL all-reduce over NVLink multicast. Only on a machine of one's own (bench/options.py)."""

from __future__ import annotations

import torch

from bench.buffers import EPS, Inputs, Outputs
from bench.cells import Cell
from bench.peers import flashinfer_build
from bench.team import Team
from bench.variant import Call, Limits, Unavailable, Variant
from mnnvl_ar.memory import multicast_refusal

SIZES = (2, 4, 8, 16, 32, 64)


class FlashInferMnnvl:
    def __init__(self, team: Team, limits: Limits) -> None:
        if multicast_refusal():
            raise Unavailable("it needs NVLink multicast, which is off (--multicast, on a machine of your own)")
        if team.size not in SIZES:
            raise Unavailable(f"only for world sizes {SIZES}, not {team.size}")
        flashinfer_build.build_in_turn("trtllm_mnnvl", team)
        from flashinfer.comm import Mapping, trtllm_mnnvl_ar
        from flashinfer.comm.mnnvl import TorchDistBackend

        self.api = trtllm_mnnvl_ar
        self.workspace = trtllm_mnnvl_ar.MNNVLAllReduceFusionWorkspace(
            Mapping(world_size=team.size, rank=team.rank, tp_size=team.size, gpus_per_node=torch.cuda.device_count()),
            max_num_tokens=limits.tokens,
            hidden_dim=limits.hidden,
            dtype=max(limits.dtypes, key=lambda dtype: dtype.itemsize),
            comm_backend=TorchDistBackend(group=team.group),
        )
        if not self.workspace.mc_ptr:
            raise Unavailable("its workspace came without a multicast address")

    def variants(self, cell: Cell) -> list[Variant]:
        return [Variant("flashinfer_mnnvl", self._bind)]

    def close(self) -> None:
        self.workspace.destroy()

    def _bind(self, cell: Cell, inputs: Inputs, outputs: Outputs) -> Call:
        xs, residuals, outs, weight = inputs.xs, outputs.residuals, outputs.outs, inputs.weight

        def fused(i: int) -> None:
            residual = residuals[i % len(residuals)]
            self.api.trtllm_mnnvl_fused_allreduce_add_rmsnorm(
                xs[i % len(xs)],
                residual,
                weight,
                self.workspace,
                EPS,
                outs[i % len(outs)],
                residual,
                launch_with_pdl=True,
            )

        def plain(i: int) -> None:
            self.api.trtllm_mnnvl_allreduce(
                xs[i % len(xs)], self.workspace, launch_with_pdl=True, output=outs[i % len(outs)]
            )

        return fused if cell.op == "fused" else plain
