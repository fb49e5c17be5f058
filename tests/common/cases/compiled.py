"""The ops under the compiler: schemas and fakes as `torch.library.opcheck` wants them, no graph break, and calls in
place that stay what they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._inductor.config

from common.cases.calls import Call, inputs, wanted
from common.rows import DTYPES


def check_ops(rank: Any, dtype: str) -> None:
    """opcheck of all four ops, by a world size of 1."""
    from mnnvl_ar import ops

    handle = rank.workspace().handle
    # Finite, as opcheck does not take NaN for equal to NaN.
    x, residual, norm, out = (torch.randn(3, 64).to(DTYPES[dtype]).to(rank.device) for _ in range(4))
    weight = torch.ones(64, device=rank.device)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for op, arguments in (
        (ops.all_reduce, (x, handle)),
        (ops.all_reduce_out, (x, out, handle)),
        (ops.all_reduce_rms_norm, (x, residual, weight, 1e-6, handle)),
        (ops.all_reduce_rms_norm_out, (x, residual, weight, 1e-6, norm, out, handle)),
    ):
        for choice in ({}, {"strategy": 1, "pdl": 0}):
            torch.library.opcheck(op, arguments, choice, test_utils=tests)


def check_fakes(rank: Any) -> None:
    """Shapes, dtypes and devices of the outputs without running anything, with a size that is not known too."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from mnnvl_ar import ops

    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        for shape in ((5, 64), (2, 3, 64), (0, 64)):
            x = mode.from_tensor(torch.empty(shape, dtype=torch.bfloat16, device="meta").to(rank.device))
            weight = torch.empty(64, device=rank.device)
            for got in (ops.all_reduce(x, 1), *ops.all_reduce_rms_norm(x, x, weight, 1e-6, 1)):
                assert (got.shape, got.dtype, got.device) == (x.shape, x.dtype, x.device)
                assert got.is_contiguous()
            assert ops.all_reduce_out(x, x, 1) is None


ALIASED = ("A", "C", "A behind an operation", "all_reduce_out")


def layer(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, matrix: torch.Tensor, handle: int) -> Any:
    """A transformer layer's skeleton: both ops, work between them, inputs that are transposed on the way."""
    from mnnvl_ar import ops

    summed = ops.all_reduce(x, handle)
    norm, residual = ops.all_reduce_rms_norm(summed, residual, weight, 1e-6, handle, weight_bias=1.0)
    hidden = (norm.float() @ matrix).to(x.dtype).relu()
    turned = hidden.t().contiguous().t().contiguous()  # Inductor would like to choose the layout itself
    norm, residual = ops.all_reduce_rms_norm(turned, residual, weight, 1e-6, handle)
    out = torch.empty_like(norm)
    torch.ops.mnnvl_ar.all_reduce_out(norm, out, handle)
    return out, norm * 2, residual


def check_compiles(rank: Any, backend: str) -> None:
    """`layer` compiles as one graph and gives the bits it gives uncompiled, also for another number of tokens."""
    import mnnvl_ar

    torch._dynamo.reset()
    torch._inductor.config.force_disable_caches = True  # a cached result would hide what the compiler makes of the ops
    torch._inductor.config.compile_threads = 1
    handle = rank.workspace().handle
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    matrix = (torch.eye(64) * 0.5).to(rank.device)  # no rounding in the product, so that the order of its sums is free
    for tokens in (4, 7):
        generator = torch.Generator().manual_seed(tokens + 100 * rank.rank)
        x = torch.randn(tokens, 64, generator=generator).bfloat16().to(rank.device)
        residual, weight = torch.ones_like(x), torch.linspace(0.5, 1.5, 64, device=rank.device)
        rank.barrier()
        want = layer(x, residual, weight, matrix, handle)
        rank.barrier()
        got = compiled(x, residual, weight, matrix, handle)
        rank.barrier()
        for g, w in zip(got, want, strict=True):
            assert mnnvl_ar.reference.same_bits(g, w), f"{backend}, {tokens} tokens"
    if backend == "inductor":
        from torch._inductor.lowering import FALLBACK_ALLOW_LIST, lowerings

        assert "mnnvl_ar::all_reduce_rms_norm" in FALLBACK_ALLOW_LIST
        assert mnnvl_ar.ops.all_reduce_rms_norm in lowerings


def aliased(
    case: str, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, handle: int
) -> tuple[torch.Tensor, ...]:
    """One call that writes over its inputs (`common.cases.calls.ALIASING`): its outputs, used once more, as they are
    and behind another operation.
    """
    from mnnvl_ar import ops

    if case == "A behind an operation":  # what is written over is of the graph, not of the caller
        x, residual = x * 2, residual + 1
    if case == "all_reduce_out":
        ops.all_reduce_out(x, x, handle)
        return x, x + 1
    norm_out, residual_out = (torch.full_like(x, 3.0), x) if case == "C" else (x, residual)
    ops.all_reduce_rms_norm_out(x, residual, weight, 1e-6, norm_out, residual_out, handle)
    return norm_out.clone(), residual_out.clone(), norm_out + residual_out


def check_compiles_aliased(rank: Any, backend: str, case: str) -> None:
    """A call in place compiles as one graph; its outputs, and its inputs afterwards, have the reference's bits."""
    from mnnvl_ar import reference

    torch._dynamo.reset()
    torch._inductor.config.force_disable_caches = True
    torch._inductor.config.compile_threads = 1
    handle = rank.workspace().handle
    xs = [torch.randn(5, 64, generator=torch.Generator().manual_seed(source)).bfloat16() for source in range(2)]
    residual, weight = torch.linspace(-2, 2, 5 * 64).view(5, 64).bfloat16(), torch.linspace(0.5, 1.5, 64)
    x_now, residual_now = (t.to(rank.device, copy=True) for t in (xs[rank.rank], residual))
    rank.barrier()
    compiled = torch.compile(aliased, fullgraph=True, backend=backend)
    got = compiled(case, x_now, residual_now, weight.to(rank.device), handle)
    rank.barrier()
    if case == "all_reduce_out":
        total = reference.all_reduce(xs)
        want, after = (total, total + 1), (total, residual)
    elif case == "A behind an operation":
        norm, total = reference.all_reduce_rms_norm([x * 2 for x in xs], residual + 1, weight, 1e-6)
        want, after = (norm, total, norm + total), (xs[rank.rank], residual)
    else:
        norm, total = reference.all_reduce_rms_norm(xs, residual, weight, 1e-6)
        want, after = (norm, total, norm + total), (norm, total) if case == "A" else (total, residual)
    for g, w in zip((*got, x_now, residual_now), (*want, *after), strict=True):
        assert reference.same_bits(g, w), f"{backend}, {case}"


def check_wanted_is_traced(rank: Any) -> None:
    """The functional op inside `make_fx` leaves one node, and the workspace is a plain integer in it."""
    from torch.fx.experimental.proxy_tensor import make_fx

    from mnnvl_ar import ops

    call = Call(tokens=2, hidden=64, dtype="fp32")
    xs, residual, weight = inputs(call, rank.world_size)
    x, residual, weight = xs[rank.rank].to(rank.device), residual.to(rank.device), weight.to(rank.device)
    handle = rank.workspace().handle
    graph = make_fx(lambda *a: ops.all_reduce_rms_norm(*a, 1e-6, handle))(x, residual, weight)
    nodes = [node for node in graph.graph.nodes if node.target is ops.all_reduce_rms_norm]
    assert [node.args[-1] for node in nodes] == [handle]
    rank.barrier()
    from mnnvl_ar.reference import same_bits

    for got, want in zip(graph(x, residual, weight), wanted(call, rank.world_size), strict=True):
        assert same_bits(got, want)
