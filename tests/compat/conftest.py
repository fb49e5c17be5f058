"""Host ranks end with the session; a test's environment is its own."""

from collections.abc import Iterator

import pytest

from common.ranks import close_pools


@pytest.fixture(scope="session", autouse=True)
def _ranks_end() -> Iterator[None]:
    yield
    close_pools()


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MNNVL_AR", "MNNVL_AR_BACKENDS", "MNNVL_AR_FALLBACK", "MNNVL_AR_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
