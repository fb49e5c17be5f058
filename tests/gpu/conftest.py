"""Ranks of the GPU tests: virtual ones on the first GPU, or real ones, one a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# Virtual ranks wait for each other; with the default of 8 hardware queues two of their streams may share one.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

from common.gpu_ranks import REAL, VIRTUAL, close_virtual, ranks_of
from common.ranks import close_pools


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `ranks` runs on every kind and world size. Device time is scarce: where there are real ranks
    of a size, virtual ones are left out.
    """
    if "ranks" in metafunc.fixturenames:
        every = []
        for n in VIRTUAL:
            doubled = n in REAL and torch.cuda.device_count() >= n
            leave_out = pytest.mark.skipif(doubled, reason=f"{n} real ranks do the same here")
            every.append(pytest.param(("virtual", n), id=f"virtual-{n}", marks=[pytest.mark.gpu(1), leave_out]))
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
