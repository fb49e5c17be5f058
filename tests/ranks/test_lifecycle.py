"""Sleep, recover, close: on GPUs with captured graphs."""

from typing import Any

import pytest

from common.cases.lifecycle import check_closed_with_graphs, check_recover, check_rounds, check_sleep
from common.places import gpus, host


@pytest.mark.parametrize("ranks", [host(3), gpus(2)], indirect=True)
def test_sleep_keeps_addresses(ranks: Any) -> None:
    ranks.run(check_sleep)


@pytest.mark.parametrize("ranks", [host(2), host(3), gpus(2)], indirect=True)
def test_recover_keeps_addresses(ranks: Any) -> None:
    ranks.run(check_recover)


@pytest.mark.parametrize("ranks", [host(2), gpus(2)], indirect=True)
def test_close(ranks: Any) -> None:
    ranks.run(check_closed_with_graphs)


@pytest.mark.parametrize(("ranks", "timeout"), [host(2, 60), gpus(2, 240)], indirect=["ranks"])
def test_rounds_leave_nothing(ranks: Any, timeout: int) -> None:
    ranks.run(check_rounds, timeout=timeout)
