"""What is refused over the host transport, and that nothing is broken by it."""

from common.cases.bad_input import check_bad_input, check_bad_workspaces
from common.ranks import rank_pool


def test_calls_are_refused() -> None:
    names = rank_pool(3).run(check_bad_input, timeout=120)[0]
    assert len(names) >= 30


def test_workspaces_are_refused() -> None:
    rank_pool(3).run(check_bad_workspaces)
