"""Our op in graphs as vLLM has them: what is replaced, what is left alone, and what torch.compile makes of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from common.ranks import Rank, rank_pool
from compat import vllm_ops
from compat.front import create, installed, rows
from mnnvl_ar import reference
from mnnvl_ar.compat import fusion

vllm_ops.register()
BF16, FP32 = torch.bfloat16, torch.float32
PATIENCE = 280.0  # seconds; the compiler is slow where others compute, too
HIDDEN, EPS, GROUP = 64, 1e-5, "tp:0"
OURS = "mnnvl_ar::all_reduce_rms_norm"
total = functools.partial(torch.ops.vllm.all_reduce, group_name=GROUP)
norm, add_norm = torch.ops.vllm_ir.rms_norm, torch.ops.vllm_ir.fused_add_rms_norm


def graph_of(model: Callable[..., Any], *shapes: Any, rows: DimDynamic = DimDynamic.DYNAMIC) -> torch.fx.GraphModule:
    """Of `model` with inputs of these shapes and dtypes; of those with two dimensions the first is a symbol."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    inputs = []
    for size, dtype in shapes:
        context = StatelessSymbolicContext([rows, DimDynamic.STATIC][-len(size) :])
        inputs.append(mode.from_tensor(torch.empty(size, dtype=dtype), symbolic_context=context))
    casts = torch._decomp.get_decompositions([torch.ops.aten._to_copy])  # as Inductor has them
    return make_fx(model, casts)(*inputs)


def names(module: torch.fx.GraphModule) -> list[str]:
    return [name for node in module.graph.nodes if (name := fusion._name(node))]


def fused(module: torch.fx.GraphModule, takes: Any = lambda *call: True, most_rows: int = 32) -> int:
    count = fusion.fuse(module.graph, GROUP, 7, takes, most_rows)
    module.recompile()
    assert names(module).count(OURS) == count
    return count


ROWS, WEIGHT = ((5, HIDDEN), BF16), ((HIDDEN,), BF16)
NORMED = (ROWS, ROWS, WEIGHT)


def first_layer(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    summed = total(x)
    return norm(summed, weight, EPS), summed + residual


def later_layer(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    return add_norm(total(x), residual, weight, EPS)


def last_layer(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    return add_norm(total(x), residual, weight, 1e-6)[0]


def gemma(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    return add_norm(total(x), residual, weight.float() + 1.0, EPS)


def in_place(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    """As vLLM 0.20 has it, when its own norm is asked for."""
    op = torch.ops._C.fused_add_rms_norm.default
    _, normed, added = auto_functionalized(op, input=total(x), residual=residual, weight=weight, epsilon=EPS)
    return normed, added


@pytest.mark.parametrize("model", [first_layer, later_layer, last_layer, gemma, in_place])
def test_each_form_of_the_norm(model: Any) -> None:
    module = graph_of(model, *NORMED)
    before = [node.meta["val"] for node in module.graph.output_node().all_input_nodes]
    assert fused(module) == 1
    assert "vllm::all_reduce" not in names(module)
    (ours,) = (node for node in module.graph.nodes if fusion._name(node) == OURS)
    eps, handle = ours.args[3:]
    assert (eps, handle) == (1e-6 if model is last_layer else EPS, 7)
    assert ours.kwargs == ({"weight_bias": 1.0} if model is gemma else {})
    assert ours.args[2].op == "placeholder"
    after = [node.meta["val"] for node in module.graph.output_node().all_input_nodes]
    assert [(each.shape, each.dtype) for each in after] == [(each.shape, each.dtype) for each in before]


def test_a_weight_of_1_more_that_is_fp32_already() -> None:
    module = graph_of(lambda x, r, w: add_norm(total(x), r, w + 1.0, EPS), ROWS, ROWS, ((HIDDEN,), FP32))
    assert fused(module) == 1
    assert "'weight_bias': 1.0" in str([node.kwargs for node in module.graph.nodes])


def test_layers_behind_each_other() -> None:
    def model(x: torch.Tensor, weight: torch.Tensor) -> Any:
        residual = total(x)
        x = norm(residual, weight, EPS)
        for _ in range(3):
            x, residual = add_norm(total(x.relu()), residual, weight, EPS)
        return x

    module = graph_of(model, ROWS, WEIGHT)
    assert fused(module) == 4
    assert "vllm::all_reduce" not in names(module)


def other_group(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    return add_norm(torch.ops.vllm.all_reduce(x, "ep:0"), residual, weight, EPS)


def used_beside(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    summed = total(x)
    return *add_norm(summed, residual, weight, EPS), summed.relu()


def used_before(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    summed = total(x)
    return summed.relu() + norm(summed, weight, EPS)


def as_residual(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    return add_norm(residual, total(x), weight, EPS)


def as_residual_in_place(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    op = torch.ops._C.fused_add_rms_norm.default
    return auto_functionalized(op, input=residual, residual=total(x), weight=weight, epsilon=EPS)[1:]


def with_itself(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    summed = total(x)
    return add_norm(summed, summed, weight, EPS)


def part_of_the_row(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    return add_norm(total(x), residual, weight, EPS, HIDDEN // 2)


def without_weight(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    return add_norm(total(x), residual, None, EPS)


def more_than_1(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    return add_norm(total(x), residual, weight.float() + 2.0, EPS)


def no_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    return total(x) + residual


@pytest.mark.parametrize(
    "model",
    [
        *(other_group, used_beside, used_before, as_residual, as_residual_in_place),
        *(with_itself, part_of_the_row, without_weight, no_norm),
    ],
)
def test_what_is_left_alone(model: Any) -> None:
    module = graph_of(model, *NORMED)
    before = str(module.graph)
    assert fused(module) == 0
    assert str(module.graph) == before


def test_only_1_is_a_bias() -> None:
    """Another number is a part of the weight."""
    module = graph_of(more_than_1, *NORMED)
    assert fused(module) == 1
    (ours,) = (node for node in module.graph.nodes if fusion._name(node) == OURS)
    assert (ours.kwargs, fusion._name(ours.args[2])) == ({}, "aten::add.Tensor")


@pytest.mark.parametrize(
    "shapes",
    [
        (((5, HIDDEN), torch.float64), ((5, HIDDEN), torch.float64), ((HIDDEN,), torch.float64)),
        (ROWS, ((5, HIDDEN), FP32), WEIGHT),
        (ROWS, ((1, HIDDEN), BF16), WEIGHT),
        (ROWS, ROWS, ((HIDDEN,), torch.float16)),
        (ROWS, ROWS, ((1,), BF16)),
    ],
    ids=["fp64", "another residual", "a row for all", "another weight", "a weight for all"],
)
def test_shapes_and_dtypes_that_are_left_alone(shapes: Any) -> None:
    assert fused(graph_of(later_layer, *shapes)) == 0


def test_calls_that_are_declined_are_left_alone() -> None:
    asked = []

    def takes(*call: Any) -> bool:
        asked.append(call)
        return call[0] <= 31

    assert fused(graph_of(later_layer, *NORMED), takes, most_rows=31) == 1
    assert fused(graph_of(later_layer, *NORMED), takes, most_rows=32) == 0
    assert asked == [(31, HIDDEN, BF16), (32, HIDDEN, BF16)]
    constant = graph_of(later_layer, *NORMED, rows=DimDynamic.STATIC)
    assert fused(constant, takes, most_rows=1000) == 1  # the number of rows is in the graph
    assert asked[-1] == (5, HIDDEN, BF16)


# ---- torch.compile


def compiled(rank: Rank) -> tuple[int, int]:
    """Two layers, for any number of rows, by Inductor with our pass, on the host transport. No other operations, so
    that no C++ has to be compiled."""
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass
    from torch._inductor.utils import run_and_get_code

    vllm_ops.register()

    def model(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
        x, residual = add_norm(total(x), residual, weight, EPS)
        return add_norm(total(x), residual, weight.float() + 1.0, 1e-6)

    with installed() as comm:
        workspace = create(comm, rank, max_token_num=64)

        class Ours(CustomGraphPass):  # type: ignore[misc]
            fused = 0

            def __call__(self, graph: torch.fx.Graph) -> None:
                self.fused += fusion.fuse(graph, GROUP, workspace.handle, lambda *call: True, 64)

            def uuid(self) -> Any:
                return None  # not cached

        ours, weight, codes = Ours(), 1 + rows(9, 1)[0], []
        with config.patch(
            post_grad_custom_post_pass=ours, enable_auto_functionalized_v2=False, force_disable_caches=True
        ):
            quick = torch.compile(model)
            for tokens in (3, 17):
                xs, residual = [rows(each, tokens) for each in range(rank.world_size)], rows(77, tokens)
                x = xs[rank.rank].clone()
                for each in (x, residual):
                    torch._dynamo.mark_dynamic(each, 0)
                got, code = run_and_get_code(quick, x, residual, weight)
                codes += code
                first, added = reference.all_reduce_rms_norm(xs, residual, weight, EPS)
                wanted = reference.all_reduce_rms_norm([first] * len(xs), added, weight, 1e-6, weight_bias=1.0)
                assert all(map(reference.same_bits, got, wanted))
        workspace.destroy()
        return ours.fused, "".join(codes).count("mnnvl_ar.all_reduce_rms_norm.default(")


def test_torch_compile_keeps_our_op_and_its_bits() -> None:
    for fused_, called in rank_pool(2).run(compiled, timeout=PATIENCE):
        assert fused_ == called >= 2
