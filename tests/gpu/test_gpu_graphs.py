"""CUDA graphs: captured, thrown away, replayed in any order, mixed with eager calls."""

from typing import Any

import pytest

from common.cases.graphs import check_graphs

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
