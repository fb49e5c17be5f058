"""What `vllm_platform.Platform` names to vLLM: two classes of vLLM's, each with a little more.

    Communicator   CudaCommunicator: of the group "tp", brings the workspace up, and sums by `ops.all_reduce`
    Passes         PostGradPassManager: `Fusion` where FlashInfer's pass would be, before norms meet quantisation

This module imports vLLM, and is loaded by it alone, when its platform is known.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import vllm.compilation.passes.pass_manager as pass_manager
from vllm.compilation.passes.inductor_pass import InductorPass, get_pass_context
from vllm.compilation.passes.pass_manager import PostGradPassManager
from vllm.config import get_current_vllm_config_or_none, set_current_vllm_config
from vllm.distributed.device_communicators.cuda_communicator import CudaCommunicator
from vllm.distributed.parallel_state import get_tp_group

from mnnvl_ar import ops
from mnnvl_ar.compat import fusion
from mnnvl_ar.compat.calls import made
from mnnvl_ar.compat.group_calls import GroupCalls
from mnnvl_ar.compat.patterns import NORM
from mnnvl_ar.compat.vllm_platform import brought_up, key_of

# Passes that ours comes after: behind them all-reduces and norms are as `fusion` knows them.
EARLIER = ("NoOpEliminationPass", "SequenceParallelismPass", "AsyncTPPass", "AddRMSNormFusionPass")

_log = logging.getLogger("mnnvl_ar")


class Communicator(CudaCommunicator):
    """mnnvl_ar: what is ours of this group's calls; None where it is another group's, or no workspace was to be had."""

    mnnvl_ar: GroupCalls | None = None

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        config = get_current_vllm_config_or_none()
        tensor_parallel = self.unique_name.split(":")[0] == "tp" and self.world_size > 1
        if tensor_parallel and config is not None and config.model_config is not None:
            self.mnnvl_ar = brought_up(self.cpu_group, config)

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        ours = self.mnnvl_ar
        if ours is not None and ours.takes_sum(input_):
            return ops.all_reduce(input_, ours.workspace.handle)
        return super().all_reduce(input_)  # type: ignore[no-any-return]

    def destroy(self) -> None:
        if self.mnnvl_ar is not None:
            self.mnnvl_ar.workspace.destroy()
            self.mnnvl_ar = None
        super().destroy()

    def _asleep(self, verb: str) -> None:
        if self.mnnvl_ar is not None:
            self.mnnvl_ar.workspace.checkpoint_prepare()
        getattr(super(), verb)()

    def _awake(self, verb: str) -> None:
        getattr(super(), verb)()
        if self.mnnvl_ar is not None:
            self.mnnvl_ar.workspace.checkpoint_restore(self.cpu_group)

    # Of releases that have them; others do not call them.
    def suspend(self) -> None:
        self._asleep("suspend")

    def resume(self) -> None:
        self._awake("resume")

    def checkpoint_prepare(self) -> None:
        self._asleep("checkpoint_prepare")

    def checkpoint_restore(self) -> None:
        self._awake("checkpoint_restore")


class Passes(PostGradPassManager):
    def configure(self, config: Any) -> None:
        super().configure(config)
        group = get_tp_group()
        calls = getattr(group.device_communicator, "mnnvl_ar", None)
        if calls is not None:
            self._add_norms(config)
            self._insert_behind(EARLIER, Fusion(group.unique_name, calls))

    def _add_norms(self, config: Any) -> None:
        """In graphs of the Transformers backend a residual is added before the norm, by itself. vLLM makes one op of
        both, from 0.27 on, for fusions that are on; its own of the all-reduce, which ours stands for, is off."""
        adds: Any = getattr(pass_manager, "AddRMSNormFusionPass", None)
        known = {type(each).__name__ for each in self.passes}
        if adds is not None and adds.__name__ not in known and config.model_config.using_transformers_backend():
            with set_current_vllm_config(config, check_compile=False):
                self._insert_behind(EARLIER[:1], adds(config))

    def _insert_behind(self, names: tuple[str, ...], new: Any) -> None:
        known = [place for place, each in enumerate(self.passes) if type(each).__name__ in names]
        self.passes.insert(max(known, default=-1) + 1, new)


class Fusion(InductorPass):
    """Our op in the graphs of this process. fused: how many calls it put into them."""

    def __init__(self, group: str, calls: GroupCalls) -> None:
        self.group, self.calls, self.fused = group, calls, 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        calls, most_rows = self.calls, get_pass_context().compile_range.end
        count = fusion.fuse(graph, self.group, calls.workspace.handle, calls.takes_norm, most_rows)
        if count and not self.fused:
            _log.info("mnnvl_ar: graphs of this process call torch.ops.mnnvl_ar.all_reduce_rms_norm")
        self.fused += count
        made[NORM] += count

    def is_applicable_for_range(self, compile_range: Any) -> bool:
        return True  # calls are looked at one by one

    def uuid(self) -> str:
        return f"{self.group} {key_of(self.calls)}"
