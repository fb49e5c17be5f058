"""Host ranks end with the session."""

from collections.abc import Iterator

import pytest

from common.ranks import close_pools


@pytest.fixture(scope="session", autouse=True)
def _ranks_end() -> Iterator[None]:
    yield
    close_pools()
