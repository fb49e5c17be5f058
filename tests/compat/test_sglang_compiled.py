"""SGLang's layer call and gate with our hooks under torch.compile(fullgraph=True), as its piecewise prefill graph has
them; on the host transport."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo.repro.after_dynamo  # not while `sys.modules` is patched, which would take it away again
import torch._inductor.lowering

from common.ranks import Rank, RankPool
from compat.front import HIDDEN, rows
from compat.sglang_wheel import Texts, server
from mnnvl_ar import reference
from mnnvl_ar.compat import sglang_layer

EPS = 1e-5
OP = "mnnvl_ar::_sglang_layer"
PATIENCE = 180.0  # seconds: each rank compiles
NORM = SimpleNamespace(variance_epsilon=EPS)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Ranks of its own: in others, Inductor may have been imported while `sys.modules` was patched, and is lost."""
    with RankPool(2) as made:
        yield made


class Graphs:
    """A backend of torch.compile that runs graphs as they were traced. ops: the names of theirs, a list a graph."""

    def __init__(self) -> None:
        self.ops: list[list[str]] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: Any) -> Any:
        self.ops.append([getattr(node.target, "_name", "") for node in module.graph.nodes])
        return module.forward


def compiled(rank: Rank, texts: Texts, dynamic: bool) -> None:
    xs = [rows(each, 5) for each in range(rank.world_size)]
    residual, weight = rows(77, 5), 1 + rows(9, 1)[0]
    wanted = reference.all_reduce_rms_norm(xs, residual, weight, EPS)
    torch._dynamo.reset()
    with server(texts, rank.group) as there:
        there.hook()

        def layer(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
            return there.layer(NORM, x, residual, None, weight, False) if there.gate(x.shape[0]) else None

        graphs = Graphs()
        run = torch.compile(layer, fullgraph=True, backend=graphs)
        for count in (5, 3, 4) if dynamic else (5, 5):
            x, r = xs[rank.rank][:count].clone(), residual[:count].clone()
            if dynamic:
                torch._dynamo.mark_dynamic(x, 0)
                torch._dynamo.mark_dynamic(r, 0)
            got = run(x, r, weight)
            assert all(map(reference.same_bits, got, (each[:count] for each in wanted)))
            assert reference.same_bits(x, xs[rank.rank][:count])
            assert reference.same_bits(r, residual[:count])
        assert [ops.count(OP) for ops in graphs.ops] == [1]  # one graph, although the first run brought us up
        assert there.group.sums == 0
        got = there.layer(NORM, xs[rank.rank], residual, None, weight, False)
        assert all(map(reference.same_bits, got, wanted))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("version", ["0.5.11", "0.5.13"])
def test_one_graph(version: str, dynamic: bool, pool: RankPool) -> None:
    pool.run(compiled, Texts.of(version), dynamic, timeout=PATIENCE)


def declined(rank: Rank, texts: Texts) -> None:
    """No workspace is to be had, and rows come in another layout: what was traced is what comes."""
    xs = [rows(each, HIDDEN, 60).t() for each in range(rank.world_size)]  # 64 rows of 60, no whole 16 bytes
    residual, weight = rows(77, HIDDEN, 60).t(), 1 + rows(9, 1, HIDDEN)[0]
    total = sum(x.float() for x in xs)
    torch._dynamo.reset()
    with server(texts, rank.group) as there:
        there.hook()

        def layer(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
            return there.layer(NORM, x, residual, None, weight, False)

        given = xs[rank.rank].t().contiguous().t(), residual, weight
        traced = sglang_layer._like_rows(*given, EPS, False)
        got = torch.compile(layer, fullgraph=True, backend="aot_eager")(*given)
        for mine, fake in zip(got, traced, strict=True):
            assert (mine.shape, mine.stride(), mine.dtype) == (fake.shape, fake.stride(), fake.dtype)
        assert torch.allclose(got[1].float(), total.to(residual.dtype).float() + residual.float(), atol=0.1)


def test_what_is_not_for_us_is_as_it_was_traced(pool: RankPool) -> None:
    pool.run(declined, Texts.of("0.5.11"), timeout=PATIENCE)


def shut(rank: Rank, texts: Texts) -> None:
    """Where the gate says no, the graph has none of ours."""
    torch._dynamo.reset()
    with server(texts, rank.group, a2a="deepep") as there:
        there.hook()
        gated = torch.compile(lambda x: x + 1 if there.gate(x.shape[0]) else x * 1, fullgraph=True, backend="eager")
        assert torch.equal(gated(torch.ones(4)), torch.ones(4))


def test_a_gate_that_is_shut(pool: RankPool) -> None:
    pool.run(shut, Texts.of("0.5.13"), timeout=PATIENCE)
