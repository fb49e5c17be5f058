"""Ranks of the GPU tests: virtual ones on the first GPU, or real ones, one a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from common.gpu_ranks import REAL, VIRTUAL, close_virtual, ranks_of
from common.ranks import close_pools


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `ranks` runs on every kind and world size."""
    if "ranks" in metafunc.fixturenames:
        every = [pytest.param(("virtual", n), id=f"virtual-{n}", marks=pytest.mark.gpu(1)) for n in VIRTUAL]
        every += [pytest.param(("real", n), id=f"real-{n}", marks=pytest.mark.gpu(n)) for n in REAL]
        metafunc.parametrize("ranks", every, indirect=True)


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Any:
    return ranks_of(*request.param)


@pytest.fixture(scope="session", autouse=True)
def _ranks_end() -> Iterator[None]:
    yield
    close_virtual()
    close_pools()
