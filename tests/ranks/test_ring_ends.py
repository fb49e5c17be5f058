"""The ring's ends: calls of no tokens, the wrap of the epoch, groups of some ranks."""

from typing import Any

import pytest

from common.cases.calls import Call
from common.cases.mixed import check_empty_calls
from common.cases.traffic import check_epochs, check_groups
from common.gpu_ranks import REAL, VIRTUAL
from common.places import gpus, host, virtual

WORKSPACE = {"max_tokens": 64, "hidden": 8192}
ON_GPUS = [*map(virtual, VIRTUAL), *map(gpus, REAL)]
EPOCHS = 2**32 - 1


@pytest.mark.parametrize("ranks", [host(4), *ON_GPUS], indirect=True)
def test_no_tokens_is_no_call(ranks: Any) -> None:
    """Nothing advances: ranks may even disagree on how many such calls they make."""
    ranks.run(check_empty_calls, WORKSPACE)


@pytest.mark.parametrize("ranks", [host(3), *ON_GPUS], indirect=True)
@pytest.mark.parametrize("before", [3, 6, 9])
def test_epoch_wraps(ranks: Any, before: int) -> None:
    ranks.run(check_epochs, EPOCHS - before, 20, {"max_tokens": 16, "hidden": 2880, "deadline": 5.0})


@pytest.mark.parametrize("ranks", [host(3), virtual(3)], indirect=True)
def test_epoch_passes_half(ranks: Any) -> None:
    """2^31 is where signed comparison would turn over."""
    ranks.run(check_epochs, 2**31 - 2**31 % 3 - 3, 20, {"max_tokens": 16, "hidden": 2880})


@pytest.mark.parametrize("ranks", [host(4), gpus(4)], indirect=True)
def test_groups_of_some_ranks(ranks: Any) -> None:
    calls = [Call(tokens=t, hidden=264, strategy=s, seed=t) for t in (1, 5) for s in (0, 1)]
    ranks.run(check_groups, calls, timeout=120)
