"""SGLang's layers, which call our ops for the sum, residual and norm between them. MNNVL_AR_THROUGH=ops.

By hooks of SGLang's own registry on two functions of its layers:

    the fused layer call   `flashinfer_allreduce_residual_rmsnorm`: `fused`, in its place
    its gate               whether a batch takes it: `applies`. SGLang's own says no with FlashInfer's all-reduce off

Where attention and experts sum over all tensor-parallel ranks, and attention is not data-parallel; elsewhere the gate
says no. Batches up to SGLang's own limit of 2048 rows. The first call brings the workspace up, collectively, before
anything is captured, since SGLang warms up first; where that fails all ranks go on as SGLang does without us.

A call behind the gate must not be declined: before 0.5.21 SGLang would go on without the sum. What is not for us is
therefore summed by SGLang's group, and normed here.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from mnnvl_ar import ops
from mnnvl_ar.compat.calls import made
from mnnvl_ar.compat.creation import joined, version
from mnnvl_ar.compat.group_calls import GroupCalls
from mnnvl_ar.compat.patterns import NORM
from mnnvl_ar.compat.settings import Settings
from mnnvl_ar.errors import MnnvlArError

LAYER = "sglang.srt.layers.flashinfer_comm_fusion"
FUSED = "flashinfer_allreduce_residual_rmsnorm"
GATES = (  # module, function; each release has one
    ("sglang.srt.layers.communicator", "apply_flashinfer_allreduce_fusion"),
    ("sglang.srt.layers.layer_boundary.residual.add_norm", "apply_flashinfer_allreduce_fusion"),
    ("sglang.srt.layers.layer_boundary.residual.add_norm", "flashinfer_ar_fusion_applies"),
)
STATE, ATTENTION = "sglang.srt.distributed.parallel_state", "sglang.srt.layers.dp_attention"
GROUPS = ("get_tp_group", "get_attn_tp_group", "get_moe_ep_group", "get_moe_tp_group")
MOST_ROWS = 2048  # FUSE_ALLREDUCE_MAX_BATCH_SIZE of every release

_calls: dict[str, GroupCalls | None] = {}  # "tp", once it was tried


def hook() -> str:
    """Registers the hooks, which SGLang applies when all plugins are loaded. `MnnvlArError` says what is not as we know
    it, and then nothing was registered."""
    module, gate = checked()
    registry: Any = importlib.import_module("sglang.srt.plugins.hook_registry")
    registry.HookRegistry.register(f"{LAYER}.{FUSED}", fused, registry.HookType.REPLACE)
    registry.HookRegistry.register(f"{module}.{gate}", applies, registry.HookType.REPLACE)
    return f"mnnvl_ar {version()} stands in for {FUSED} and {gate} of SGLang, by torch.ops.mnnvl_ar"


def checked() -> tuple[str, str]:
    """Module and name of the gate, everything else being as we know it."""
    problems = []
    takes = [*inspect.signature(fused).parameters]
    layer = _attribute(LAYER, FUSED)
    if not callable(layer):
        problems.append(f"there is no {LAYER}.{FUSED}")
    elif odd := [name for name in inspect.signature(layer).parameters if name not in takes]:
        problems.append(f"{FUSED} has a parameter {odd[0]} that is not known")
    gates = [each for each in GATES if callable(_attribute(*each))]
    if len(gates) != 1:
        problems.append(f"of {', '.join(sorted({name for _, name in GATES}))} there are {len(gates)}, wanted one")
    elif [*inspect.signature(_attribute(*gates[0])).parameters] != ["batch_size"]:
        problems.append(f"{gates[0][1]} does not take (batch_size)")
    needed = [(STATE, name) for name in GROUPS] + [(ATTENTION, "is_dp_attention_enabled")]
    problems += [f"there is no {module}.{name}" for module, name in needed if not callable(_attribute(module, name))]
    if problems:
        raise MnnvlArError(f"SGLang is left as it is: {'; '.join(problems)}")
    return gates[0]


def _attribute(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def applies(batch_size: int) -> bool:
    """In place of the gate."""
    return _over_all_ranks() and _calls.get("tp", True) is not None and 0 < batch_size <= MOST_ROWS


def fused(
    input_tensor: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    max_token_num: int = MOST_ROWS,
    use_oneshot: bool | None = None,
    trigger_completion_at_end: bool = False,
    fp32_acc: bool = False,
    use_attn_tp_group: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of the layer call: norm and new residual, fresh tensors. The last five are FlashInfer's."""
    group = importlib.import_module(STATE).get_tp_group()
    calls = _brought_up(group, input_tensor) if _over_all_ranks() else None
    dtype = input_tensor.dtype
    alike = residual.dtype == dtype and weight.dtype in (dtype, torch.float32)
    if calls is not None and alike and calls.takes_norm(input_tensor.shape[0], input_tensor.shape[-1], dtype):
        made[NORM] += 1
        x, residual, weight = (each.contiguous() for each in (input_tensor, residual, weight))
        return ops.all_reduce_rms_norm(x, residual, weight, eps, calls.workspace.handle)
    return _unfused(_group_of(use_attn_tp_group), input_tensor, residual, weight, eps)


def _brought_up(group: Any, rows: torch.Tensor) -> GroupCalls | None:
    if "tp" not in _calls:
        made = joined(
            *(group.cpu_group, MOST_ROWS, rows.shape[-1], rows.dtype), Settings.read(), "SGLang's own all-reduce"
        )
        _calls["tp"] = GroupCalls(made, float("inf")) if made is not None else None
    return _calls["tp"]


def _group_of(attention: bool) -> Any:
    """The group that a layer sums over, as SGLang finds it."""
    resolve: Callable[..., Any] | None = _attribute(LAYER, "resolve_fusion_group")
    if resolve is not None:
        return resolve(use_attn_tp_group=attention)[2]
    state: Any = importlib.import_module(STATE)
    if attention:
        return state.get_attn_tp_group()
    experts = state.get_moe_ep_group()
    return experts if experts.world_size > 1 else state.get_moe_tp_group()


@functools.cache
def _over_all_ranks() -> bool:
    """Whether every sum between layers is over all tensor-parallel ranks, which one workspace serves. Known once the
    groups are."""
    if importlib.import_module(ATTENTION).is_dp_attention_enabled():
        return False
    size = importlib.import_module(STATE).get_tp_group().world_size
    return size > 1 and all(_group_of(attention).world_size == size for attention in (True, False))


def _unfused(
    group: Any, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    added = group.all_reduce(x).float() + residual.float()
    norm = added * torch.rsqrt(added.pow(2).mean(-1, keepdim=True) + eps)
    return (norm * weight.float()).to(x.dtype), added.to(residual.dtype)
