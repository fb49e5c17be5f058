"""CUDA graphs: captured, thrown away, replayed in any order, mixed with eager calls."""

from typing import Any

import pytest

from common.cases.graphs import check_graphs
from common.cases.pieces import bytes_for_rows

WORKSPACE = {"max_tokens": 64, "hidden": 8192, "deadline": 5.0}


@pytest.mark.parametrize("pdl", ["off", "late", "early"])
def test_graphs_and_eager_calls(ranks: Any, pdl: str) -> None:
    if ranks.world_size in (3, 9) and pdl != "early":
        pytest.skip("one mode of PDL is enough for odd world sizes")
    mode = ("off", "late", "early").index(pdl)
    sizes = {"hiddens": (64, 2880, 7168), "most_tokens": 32, "pdls": (mode,)}
    workspaces = [WORKSPACE, {**WORKSPACE, "strategy": "two_shot"}]
    ranks.run(check_graphs, 120, workspaces, ranks.world_size + 10 * mode, **sizes)


def test_modes_of_pdl_mixed(ranks: Any) -> None:
    sizes = {"hiddens": (64, 2880, 7168), "most_tokens": 32, "pdls": (0, 1, 2)}
    ranks.run(check_graphs, 120, [WORKSPACE], ranks.world_size, **sizes)


def test_calls_in_pieces(ranks: Any) -> None:
    """Captured, a call of several pieces is several kernels of the graph."""
    rows = {"row_bytes": 7168 * 4}  # of fp32; of the others, more fit
    bound = max(bytes_for_rows(ranks, 4, strategy, **rows) for strategy in (0, 1))
    workspace = {**WORKSPACE, "max_bytes": bound, "transport": "unicast"}
    sizes = {"hiddens": (2880, 7168), "most_tokens": 32, "pdls": (0, 1, 2)}
    ranks.run(check_graphs, 120, [workspace, {**workspace, "strategy": "two_shot"}], 70 + ranks.world_size, **sizes)
