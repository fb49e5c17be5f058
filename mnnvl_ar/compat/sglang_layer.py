"""SGLang's layers, which call our ops for the sum, residual and norm between them. MNNVL_AR_THROUGH=ops.

By hooks of SGLang's own registry on two functions of its layers:

    the fused layer call   `flashinfer_allreduce_residual_rmsnorm`: `fused`, in its place
    its gate               whether a batch takes it: `applies`. SGLang's own says no with FlashInfer's all-reduce off

Where attention, experts and dense layers sum over all tensor-parallel ranks; elsewhere the gate says no: with
data-parallel attention, and where layers leave complete rows of other tokens on each rank, as they do behind an expert
all-to-all (`moe_a2a_backend`) and with moe_dense_tp_size=1. Up to 0.5.12 SGLang asks nothing but the gate about those.
Batches up to SGLang's own limit of 2048 rows. The first call brings the workspace up, collectively, before anything is
captured, since SGLang warms up first; where that fails all ranks go on as SGLang does without us.

A call behind the gate must not be declined: before 0.5.21 SGLang would go on without the sum. What is not for us is
therefore summed by SGLang's group, and normed here.

SGLang compiles its layers in one graph (torch.compile with fullgraph=True) for its piecewise CUDA graphs. There the
gate's answer is a constant, as it was when the graph was made, and the layer call is one op: its body is `fused`'s.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from mnnvl_ar import _inductor, ops
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
EXPERTS = "sglang.srt.layers.moe.utils"
DENSE = (  # module, function that says whether dense layers are whole on each rank; each release has one
    ("sglang.srt.layers.communicator", "enable_moe_dense_fully_dp"),
    ("sglang.srt.layers.layer_boundary.layout", "enable_moe_dense_fully_dp"),
    ("sglang.srt.layers.layer_boundary.layout", "is_dense_ffn_fully_dp"),
)
NEEDED = (  # module, function without parameters
    *((STATE, name) for name in GROUPS),
    (ATTENTION, "is_dp_attention_enabled"),
    (EXPERTS, "get_moe_a2a_backend"),
)
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
    gate = _one_of(GATES, ["batch_size"], problems)
    _one_of(DENSE, [], problems)
    problems += [f"there is no {module}.{name}" for module, name in NEEDED if not callable(_attribute(module, name))]
    if not callable(getattr(_attribute(EXPERTS, "MoeA2ABackend"), "is_none", None)):
        problems.append(f"there is no {EXPERTS}.MoeA2ABackend.is_none")
    if problems:
        raise MnnvlArError(f"SGLang is left as it is: {'; '.join(problems)}")
    return gate


def _one_of(places: tuple[tuple[str, str], ...], takes: list[str], problems: list[str]) -> tuple[str, str]:
    """The one that this release has; what is wrong with it goes to `problems`."""
    found = [each for each in places if callable(_attribute(*each))]
    if len(found) != 1:
        problems.append(f"of {', '.join(sorted({name for _, name in places}))} there are {len(found)}, wanted one")
        return places[0]
    if [*inspect.signature(_attribute(*found[0])).parameters] != takes:
        problems.append(f"{found[0][1]} does not take ({', '.join(takes)})")
    return found[0]


def _attribute(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def applies(batch_size: int) -> bool:
    """In place of the gate."""
    return _is_open() and 0 < batch_size <= MOST_ROWS


@torch.compiler.assume_constant_result
def _is_open() -> bool:
    """For batches of any size. Not remembered as a whole: a draft model may have another expert all-to-all."""
    return _over_all_ranks() and _calls.get("tp", True) is not None and _a2a_backend()().is_none()


@functools.cache
def _a2a_backend() -> Callable[[], Any]:
    return _attribute(EXPERTS, "get_moe_a2a_backend")  # type: ignore[no-any-return]


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
    """In place of the layer call: norm and new residual, fresh tensors. All but one of the last five are
    FlashInfer's."""
    if torch.compiler.is_compiling():
        norm, total = _in_graphs(input_tensor, residual, weight, eps, use_attn_tp_group)
        return norm, total
    return _fused(input_tensor, residual, weight, eps, use_attn_tp_group)


# Its name begins like that of all ops that are not for others to call.
@torch.library.custom_op(
    "mnnvl_ar::_sglang_layer",
    mutates_args=(),
    schema="(Tensor x, Tensor residual, Tensor weight, float eps, bool attention) -> (Tensor, Tensor)",
)
def _in_graphs(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, attention: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    norm, total = _fused(x, residual, weight, eps, attention)
    return norm.contiguous(), total.contiguous()


@_in_graphs.register_fake
def _like_rows(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, attention: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    _inductor.know(["_sglang_layer"])
    norm, total = (torch.empty_like(each, memory_format=torch.contiguous_format) for each in (x, residual))
    return norm, total


def _fused(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, attention: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    group = importlib.import_module(STATE).get_tp_group()
    calls = _brought_up(group, x) if _over_all_ranks() else None
    alike = residual.dtype == x.dtype and weight.dtype in (x.dtype, torch.float32)
    if calls is not None and alike and calls.takes_norm(x.shape[0], x.shape[-1], x.dtype):
        made[NORM] += 1
        x, residual, weight = (each.contiguous() for each in (x, residual, weight))
        return ops.all_reduce_rms_norm(x, residual, weight, eps, calls.workspace.handle)
    return _unfused(_group_of(attention), x, residual, weight, eps)


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
    """Whether every sum between layers is over all tensor-parallel ranks, which one workspace serves, but for what an
    expert all-to-all changes. Known once the groups are."""
    dense = next(filter(callable, (_attribute(*each) for each in DENSE)))
    if importlib.import_module(ATTENTION).is_dp_attention_enabled() or dense():
        return False
    size = importlib.import_module(STATE).get_tp_group().world_size
    return size > 1 and all(_group_of(attention).world_size == size for attention in (True, False))


def _unfused(
    group: Any, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    added = group.all_reduce(x).float() + residual.float()
    norm = added * torch.rsqrt(added.pow(2).mean(-1, keepdim=True) + eps)
    return (norm * weight.float()).to(x.dtype), added.to(residual.dtype)
