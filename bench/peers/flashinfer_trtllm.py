"""FlashInfer's trtllm_allreduce_fusion, one-shot and two-shot over unicast, with PDL.

Written for flashinfer_python 0.6.13. Rows have the `version` that ran; another one is another run, in an environment of
its own. Its workspace comes from PyTorch's symmetric memory, which makes no multicast object while
TORCH_SYMM_MEM_DISABLE_MULTICAST is 1 (bench/options.py); `use_symm_dev_mem`, which would, stays False.

Its kernels load `residual_in` (of the row each thread takes first) before they wait for the kernel ahead of them
(flashinfer-ai/flashinfer pull request 5081). Two one-shot calls in a row with early trigger therefore must not pass a
residual on: the second would add what the call before the first had left. So the early variants read residuals that no
call writes, and the others, which let the next kernel start only at their end, update the residual in place.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import itertools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from bench.buffers import EPS, Inputs, Outputs
from bench.cells import Cell
from bench.peers import flashinfer_build
from bench.team import Team
from bench.variant import Call, Limits, Unavailable, Variant
from mnnvl_ar.memory import multicast_refusal

SIZES = (2, 4, 8, 16)
ONE_SHOT_WIRE_BYTES = 64 << 20  # beyond, it only costs bench time
LAMPORT_BYTES = (2**31 - 1) & ~((1 << 21) - 1)


class Form(NamedTuple):
    """A way to run a call. early: trigger before the work, not after it; two-shot always does the latter."""

    name: str
    one_shot: bool
    fp32_acc: bool
    early: bool


def forms(cell: Cell) -> list[Form]:
    found = []
    lamport = cell.nbytes * cell.tp
    if (cell.tp - 1) * cell.nbytes <= ONE_SHOT_WIRE_BYTES and lamport <= LAMPORT_BYTES:
        triggers = (True,) if cell.op == "plain" else (True, False)
        for fp32_acc, early in itertools.product((False, True), triggers):
            name = "flashinfer/one_shot" + ("_fp32" if fp32_acc else "") + ("" if early else "_late")
            found.append(Form(name, True, fp32_acc, early))
    if cell.tokens > cell.tp:
        found.append(Form("flashinfer/two_shot", False, fp32_acc=False, early=False))
    return found


class FlashInferTrtllm:
    def __init__(self, team: Team, limits: Limits) -> None:
        if team.size not in SIZES:
            raise Unavailable(f"only for world sizes {SIZES}, not {team.size}")
        if os.environ.get("TORCH_SYMM_MEM_DISABLE_MULTICAST") != "1" and multicast_refusal():
            raise Unavailable("multicast is forbidden here and TORCH_SYMM_MEM_DISABLE_MULTICAST is not 1")
        flashinfer_build.build_in_turn("trtllm", team)
        import flashinfer.comm as comm

        self.team, self.comm = team, comm
        self.limits = limits
        self.about = {"version": importlib.metadata.version("flashinfer-python")}
        self._made: dict[bool, tuple[Any, torch.Tensor]] = {}
        for fp32 in sorted({dtype == torch.float32 for dtype in limits.dtypes}):
            self._made[fp32] = self._workspace(fp32)

    def variants(self, cell: Cell) -> list[Variant]:
        return [Variant(form.name, self._bind(form), extra=self.about) for form in forms(cell)]

    def functional(self, cell: Cell, inputs: Inputs) -> Callable[[], object]:
        """One fused one-shot call into fresh outputs, for bench/cpu_cost.py. As users call it, decorators and all."""
        x, residual = inputs.xs[0], inputs.residuals[0]
        fixed = self._fixed(cell, inputs, one_shot=True, fp32_acc=False, early=True)

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

    def _fixed(self, cell: Cell, inputs: Inputs, one_shot: bool, fp32_acc: bool, early: bool) -> dict[str, Any]:
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
            "trigger_completion_at_end": not early,
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

    def op(self) -> Callable[..., None]:
        """Its op without the decorator that warns of deprecation at every call and would cost the peer CPU time."""
        run: Callable[..., None] = inspect.unwrap(self.comm.trtllm_allreduce_fusion)
        return run

    def _bind(self, form: Form) -> Callable[[Cell, Inputs, Outputs], Call]:
        run = self.op()

        def bind(cell: Cell, inputs: Inputs, outputs: Outputs) -> Call:
            fused = cell.op == "fused"
            fixed = self._fixed(cell, inputs, *form[1:])
            sources = outputs.residuals
            if fused and form.early and len(sources) == 1:
                sources = unchained(run, inputs, outputs.outs[0], fixed)

            def call(i: int) -> None:
                out = outputs.outs[i % len(outputs.outs)]
                run(
                    allreduce_in=inputs.xs[i % len(inputs.xs)],
                    allreduce_out=None if fused else out,
                    residual_in=sources[i % len(sources)] if fused else None,
                    residual_out=outputs.residuals[i % len(outputs.residuals)] if fused else None,
                    norm_out=out if fused else None,
                    **fixed,
                )

            return call

        return bind


def unchained(
    run: Callable[..., None], inputs: Inputs, norm: torch.Tensor, fixed: dict[str, Any]
) -> list[torch.Tensor]:
    """What the calls of a chain would find in its only residual, each in a tensor of its own: as the inputs cancel,
    it repeats with them. The last call then leaves what the chain would have left, up to rounding. Collective.
    fixed: arguments of calls that store their norm, which goes to `norm`."""
    alone = {**fixed, "launch_with_pdl": False, "trigger_completion_at_end": True}
    sources = [inputs.residuals[0]]
    for x in inputs.xs[:-1]:
        following = torch.empty_like(x)
        run(
            allreduce_in=x,
            allreduce_out=None,
            residual_in=sources[-1],
            residual_out=following,
            norm_out=norm,
            **alone,
        )
        sources.append(following)
    return sources
