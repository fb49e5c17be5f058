"""FlashInfer's trtllm_allreduce_fusion, one-shot and two-shot over unicast, with PDL and early trigger.

Written for flashinfer_python 0.6.13. Its workspace comes from PyTorch's symmetric memory, which makes no multicast
object while TORCH_SYMM_MEM_DISABLE_MULTICAST is 1 (bench/safety.py); `use_symm_dev_mem`, which would, stays False.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

import torch

from bench.buffers import EPS, Inputs, Outputs
from bench.cells import Cell
from bench.peers import flashinfer_build
from bench.safety import multicast_allowed
from bench.team import Team
from bench.variant import Call, Limits, Unavailable, Variant

SIZES = (2, 4, 8, 16)
ONE_SHOT_WIRE_BYTES = 64 << 20  # beyond, it only costs bench time
LAMPORT_BYTES = (2**31 - 1) & ~((1 << 21) - 1)


class FlashInferTrtllm:
    def __init__(self, team: Team, limits: Limits) -> None:
        if team.size not in SIZES:
            raise Unavailable(f"only for world sizes {SIZES}, not {team.size}")
        if os.environ.get("TORCH_SYMM_MEM_DISABLE_MULTICAST") != "1" and not multicast_allowed():
            raise Unavailable("multicast is forbidden here and TORCH_SYMM_MEM_DISABLE_MULTICAST is not 1")
        flashinfer_build.build_in_turn("trtllm", team)
        import flashinfer.comm as comm

        self.team, self.comm = team, comm
        self.limits = limits
        self._made: dict[bool, tuple[Any, torch.Tensor]] = {}
        for fp32 in sorted({dtype == torch.float32 for dtype in limits.dtypes}):
            self._made[fp32] = self._workspace(fp32)

    def variants(self, cell: Cell) -> list[Variant]:
        variants = []
        lamport = cell.nbytes * cell.tp
        if (cell.tp - 1) * cell.nbytes <= ONE_SHOT_WIRE_BYTES and lamport <= LAMPORT_BYTES:
            variants.append(Variant("flashinfer/one_shot", self._bind(True, fp32_acc=False)))
            variants.append(Variant("flashinfer/one_shot_fp32", self._bind(True, fp32_acc=True)))
        if cell.tokens > cell.tp:
            variants.append(Variant("flashinfer/two_shot", self._bind(False, fp32_acc=False)))
        return variants

    def functional(self, cell: Cell, inputs: Inputs) -> Callable[[], object]:
        """One fused one-shot call into fresh outputs, for bench/cpu_cost.py. As users call it, decorators and all."""
        x, residual = inputs.xs[0], inputs.residuals[0]
        fixed = self._fixed(cell, inputs, one_shot=True, fp32_acc=False)

        def call() -> tuple[torch.Tensor, torch.Tensor]:
            norm, residual_out = torch.empty_like(x), torch.empty_like(x)
            self.comm.trtllm_allreduce_fusion(
                allreduce_in=x,
                allreduce_out=None,
                residual_in=residual,
                residual_out=residual_out,
                norm_out=norm,
                **fixed,
            )
            return norm, residual_out

        return call

    def close(self) -> None:
        for handles, _ in self._made.values():
            self.comm.trtllm_destroy_ipc_workspace_for_all_reduce_fusion(handles, group=self.team.group)

    def _workspace(self, fp32: bool) -> tuple[Any, torch.Tensor]:
        made = self.comm.trtllm_create_ipc_workspace_for_all_reduce_fusion(
            tp_rank=self.team.rank,
            tp_size=self.team.size,
            max_token_num=self.limits.tokens,
            hidden_dim=self.limits.hidden,
            use_fp32_lamport=fp32,
            group=self.team.group,
            use_symm_dev_mem=False,
        )
        torch.cuda.synchronize()
        self.team.barrier()
        return made[0], made[1]

    def _fixed(self, cell: Cell, inputs: Inputs, one_shot: bool, fp32_acc: bool) -> dict[str, Any]:
        """The arguments that are the same for every call of a cell."""
        fused = cell.op == "fused"
        patterns = self.comm.AllReduceFusionPattern
        return {
            "world_size": self.team.size,
            "world_rank": self.team.rank,
            "token_num": cell.tokens,
            "hidden_dim": cell.hidden,
            "workspace_ptrs": self._made[cell.dtype == "float32"][1],
            "launch_with_pdl": True,
            "trigger_completion_at_end": False,
            "fp32_acc": fp32_acc,
            "pattern_code": patterns.kARResidualRMSNorm if fused else patterns.kAllReduce,
            "use_oneshot": one_shot,
            "quant_out": None,
            "scale_out": None,
            "rms_gamma": inputs.weight if fused else None,
            "rms_eps": EPS if fused else None,
            "scale_factor": None,
            "layout_code": None,
        }

    def _bind(self, one_shot: bool, fp32_acc: bool) -> Callable[[Cell, Inputs, Outputs], Call]:
        run = _unwrapped(self.comm.trtllm_allreduce_fusion)

        def bind(cell: Cell, inputs: Inputs, outputs: Outputs) -> Call:
            fused = cell.op == "fused"
            fixed = self._fixed(cell, inputs, one_shot, fp32_acc)

            def call(i: int) -> None:
                residual = outputs.residuals[i % len(outputs.residuals)] if fused else None
                out = outputs.outs[i % len(outputs.outs)]
                run(
                    allreduce_in=inputs.xs[i % len(inputs.xs)],
                    allreduce_out=None if fused else out,
                    residual_in=residual,
                    residual_out=residual,
                    norm_out=out if fused else None,
                    **fixed,
                )

            return call

        return bind


def _unwrapped(function: Any) -> Any:
    """Without the decorator that warns of deprecation at every call and would cost the peer CPU time."""
    return inspect.unwrap(function)
