"""Long and mixed traffic over the host transport: several workspaces, groups, and the wrap of the epoch."""

import pytest

from common.cases.calls import Call
from common.cases.traffic import check_epochs, check_groups, check_traffic
from common.ranks import rank_pool

WORKSPACES = [{"max_tokens": 64}, {"max_tokens": 64, "strategy": "two_shot"}, {"max_tokens": 64, "hidden": 4096}]
EPOCHS = 2**32 - 1


@pytest.mark.parametrize(("ranks", "calls"), [(2, 2000), (4, 1200), (5, 600)])
def test_thousands_of_calls(ranks: int, calls: int) -> None:
    sizes = {"hiddens": (8, 64, 264, 2880), "most_tokens": 16}
    assert rank_pool(ranks).run(check_traffic, calls, WORKSPACES, ranks, timeout=150, **sizes) == [calls] * ranks


def test_groups_of_some_ranks() -> None:
    calls = [Call(tokens=t, hidden=264, strategy=s, seed=t) for t in (1, 5) for s in (0, 1)]
    rank_pool(4).run(check_groups, calls, timeout=120)


@pytest.mark.parametrize("before", [3, 6, 9])
def test_epoch_wraps(before: int) -> None:
    rank_pool(3).run(check_epochs, EPOCHS - before, 20, {"max_tokens": 16, "hidden": 2880})


def test_epoch_passes_half() -> None:
    """2^31 is where signed comparison would turn over."""
    rank_pool(3).run(check_epochs, 2**31 - 2**31 % 3 - 3, 20, {"max_tokens": 16, "hidden": 2880})
