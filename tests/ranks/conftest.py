"""What holds on the host and on GPUs alike: each test says on which ranks it runs (tests/common/places.py)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

# Virtual ranks wait for each other; with the default of 8 hardware queues two of their streams may share one.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

from common.gpu_ranks import close_virtual
from common.places import pool_of
from common.ranks import close_pools


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Any:
    return pool_of(request.param)


@pytest.fixture(scope="session", autouse=True)
def _ranks_end() -> Iterator[None]:
    yield
    close_virtual()
    close_pools()
