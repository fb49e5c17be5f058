"""Where a test's ranks are: processes of the host, virtual ranks on the first GPU, or one GPU a rank.

    @pytest.mark.parametrize(("ranks", "absent"), [host(2, 0), host(3, 2), gpus(2, 1)], indirect=["ranks"])
    def test_...(ranks, absent):
        ranks.run(check, absent)

A test that takes `ranks` (tests/ranks/conftest.py) is given the pool of that place, kept for the session.
"""

from __future__ import annotations

from typing import Any

import pytest

from common.gpu_ranks import ranks_of
from common.ranks import rank_pool


def host(size: int, *values: Any) -> Any:
    return pytest.param(("host", size), *values, id=_id("host", size, values))


def virtual(size: int, *values: Any) -> Any:
    return pytest.param(("virtual", size), *values, id=_id("virtual", size, values), marks=pytest.mark.gpu(1))


def gpus(size: int, *values: Any) -> Any:
    return pytest.param(("real", size), *values, id=_id("real", size, values), marks=pytest.mark.gpu(size))


def once_on_a_gpu(*values: Any) -> Any:
    """One rank on one GPU: alike on every machine, so it runs where there is one GPU, and is skipped where there are
    more."""
    import torch

    marks = [
        pytest.mark.gpu(1),
        pytest.mark.skipif(torch.cuda.device_count() > 1, reason="runs where there is one GPU"),
    ]
    return pytest.param(("real", 1), *values, id=_id("real", 1, values), marks=marks)


def pool_of(place: tuple[str, int]) -> Any:
    kind, size = place
    return rank_pool(size) if kind == "host" else ranks_of(kind, size)


def _id(kind: str, size: int, values: tuple[Any, ...]) -> str:
    return "-".join([f"{kind}-{size}", *map(str, values)])
