"""Long and mixed traffic over the host transport, on several workspaces."""

import pytest

from common.cases.traffic import check_traffic
from common.ranks import rank_pool

WORKSPACES = [{"max_tokens": 64}, {"max_tokens": 64, "strategy": "two_shot"}, {"max_tokens": 64, "hidden": 4096}]


@pytest.mark.parametrize(("ranks", "calls"), [(2, 2000), (4, 1200), (5, 600)])
def test_thousands_of_calls(ranks: int, calls: int) -> None:
    sizes = {"hiddens": (8, 64, 264, 2880), "most_tokens": 16}
    assert rank_pool(ranks).run(check_traffic, calls, WORKSPACES, ranks, timeout=150, **sizes) == [calls] * ranks
