"""All-reduces of a compiled graph that end in a norm, by our op: `torch.ops.mnnvl_ar.all_reduce_rms_norm`.

    count = fuse(graph, "tp:0", handle, takes, most_rows)

Of the graph, functional as Inductor's post-grad passes see it, these are known, by the names of their ops alone:

    vllm::all_reduce             of the group that is named; another group's is left alone
    vllm_ir::rms_norm            of its result: norm, and the sum goes on as the residual (the first layer)
    vllm_ir::fused_add_rms_norm  of its result and a residual (every other layer), also as vLLM 0.20 has it:
    _C::fused_add_rms_norm       in an `auto_functionalized`

with any eps, with a weight in the rows' dtype or fp32, or 1 + such a weight (Gemma). What is not so is left as it is:
no weight, a norm of a part of the row, other dtypes, a sum that is used beside the norm before it, rows that `takes`
declines. No vLLM is imported.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from mnnvl_ar import ops
from mnnvl_ar.workspace import DTYPES

Takes = Callable[[int, int, torch.dtype], bool]  # whether a call of so many rows, hidden and dtype is ours

ALL_REDUCE = "vllm::all_reduce"
NORM, ADD_NORM, ADD_NORM_IN_PLACE = "vllm_ir::rms_norm", "vllm_ir::fused_add_rms_norm", "_C::fused_add_rms_norm"


@dataclass(frozen=True)
class _Norm:
    """A node that norms `x`, and which of its results are the norm and the residual (None: it is no tuple)."""

    node: Node
    x: Node
    residual: Node | None
    weight: Any
    eps: float
    results: tuple[int, int] | None


def fuse(graph: Graph, group: str, handle: int, takes: Takes, most_rows: int) -> int:
    """Puts our op in place of each all-reduce over `group` with the norm behind it; how many there were. A number of
    rows that only the running program knows counts as `most_rows`."""
    sums = [node for node in graph.nodes if _sums(node, group)]
    count = sum(_replaced(each, norm, handle, takes, most_rows) for each in sums if (norm := _norm_behind(each)))
    if count:
        graph.lint()
    return count


def _sums(node: Node, group: str) -> bool:
    return _name(node) == ALL_REDUCE and _given(node).get("group_name") == group


def _norm_behind(total: Node) -> _Norm | None:
    """The norm that takes this sum and may be calculated with it."""
    norms = [norm for user in total.users for norm in [_norm(user)] if norm is not None and norm.x is total]
    if not norms:
        return None
    norm = norms[0]
    if norm.residual is not None:
        return norm if len(total.users) == 1 and norm.residual is not total else None
    # Others read the sum as well, but they must come later: our op stands where the norm does.
    return norm if next(node for node in total.graph.nodes if node in total.users) is norm.node else None


def _norm(node: Node) -> _Norm | None:
    name, given = _name(node), _given(node)
    if name == NORM and given.get("variance_size") is None:
        return _Norm(node, given["x"], None, given["weight"], given["epsilon"], None)
    if name == ADD_NORM and given.get("variance_size") is None:
        return _Norm(node, given["x"], given["x_residual"], given["weight"], given["epsilon"], (0, 1))
    functional = node.target is torch.ops.higher_order.auto_functionalized
    if functional and isinstance(node.args[0], OpOverload) and node.args[0].name() == ADD_NORM_IN_PLACE:
        given = dict(node.kwargs)
        return _Norm(node, given["input"], given["residual"], given["weight"], given["epsilon"], (1, 2))
    return None


def _replaced(total: Node, norm: _Norm, handle: int, takes: Takes, most_rows: int) -> bool:
    rows, residual = _given(total)["tensor"], norm.residual
    weight, bias = _plain_weight(norm.weight)
    example = rows.meta["val"]
    count = math.prod(each if isinstance(each, int) else most_rows for each in example.shape[:-1])
    if not _fits(example, residual, weight) or not takes(count, example.shape[-1], example.dtype):
        return False
    graph = total.graph
    with graph.inserting_before(norm.node):
        if residual is None:
            residual = _zeros_like(graph, rows)
        arguments = (rows, residual, weight, norm.eps, handle)
        both = _called(graph, ops.all_reduce_rms_norm, arguments, {"weight_bias": bias} if bias else {})
        normed, added = (_called(graph, operator.getitem, (both, index), {}) for index in (0, 1))
    if norm.results is None:
        norm.node.replace_all_uses_with(normed)
    else:
        for user in list(norm.node.users):
            if user.args[1] in norm.results:
                user.replace_all_uses_with(normed if user.args[1] == norm.results[0] else added)
            graph.erase_node(user)
    graph.erase_node(norm.node)
    total.replace_all_uses_with(added)
    graph.erase_node(total)
    return True


def _fits(example: torch.Tensor, residual: Node | None, weight: Any) -> bool:
    """Whether our op may be given these at all."""
    dtype, hidden = example.dtype, example.shape[-1]
    if dtype not in DTYPES or not isinstance(hidden, int) or not isinstance(weight, Node):
        return False
    known = weight.meta["val"]
    if known.shape != (hidden,) or known.dtype not in (dtype, torch.float32):
        return False
    added = example if residual is None else residual.meta["val"]
    return bool(added.dtype == dtype and added.shape == example.shape)


def _plain_weight(weight: Any) -> tuple[Any, float]:
    """Of `weight.float() + 1.0`: the weight, and 1."""
    if _name(weight) == "aten::add.Tensor" and weight.args[1] == 1:
        cast = weight.args[0]
        if _name(cast) == "prims::convert_element_type" and cast.args[1] == torch.float32:
            return cast.args[0], 1.0
        if isinstance(cast, Node) and cast.meta["val"].dtype == torch.float32:
            return cast, 1.0
    return weight, 0.0


def _zeros_like(graph: Graph, rows: Node) -> Node:
    """Of operations that Inductor lowers; `full_like` is none."""
    example = rows.meta["val"]
    size = [
        count if isinstance(count, int) else _called(graph, torch.ops.aten.sym_size.int, (rows, dimension), {})
        for dimension, count in enumerate(example.shape)
    ]
    kind = {"dtype": example.dtype, "layout": torch.strided, "device": example.device, "pin_memory": False}
    return _called(graph, torch.ops.aten.full.default, (size, 0), kind)


def _called(graph: Graph, target: Any, arguments: tuple[Any, ...], choice: dict[str, Any]) -> Node:
    """A call, with the example of its result that later passes read."""
    node = graph.call_function(target, arguments, choice)
    examples = torch.fx.map_arg(arguments, lambda each: each.meta["val"])
    mode = torch._guards.detect_fake_mode([each.meta.get("val") for each in graph.find_nodes(op="placeholder")])
    with mode or contextlib.nullcontext():
        node.meta["val"] = target(*examples, **choice)
    return node


def _name(node: Any) -> str:
    """ "namespace::op.overload" of a call, without the default overload's name; empty for what is none."""
    target = node.target if isinstance(node, Node) else None
    return str(target.name()) if isinstance(target, OpOverload) else ""


def _given(node: Node) -> dict[str, Any]:
    """Arguments of a call by the names that its op has for them, defaults left out."""
    if not isinstance(node.target, OpOverload):
        return {}
    names = [argument.name for argument in node.target._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}
