"""Host ranks end with the session; a test's environment is its own."""

import os
from collections.abc import Iterator

import pytest

from common.ranks import close_pools
from mnnvl_ar.compat import policy

SETTINGS = tuple(
    f"MNNVL_AR_{name}"
    for name in ("BACKENDS", "FALLBACK", "TIMEOUT", "ON_FAULT", "HOLD", "STARTUP_", "DEADLINE", "THROUGH", "CALLS")
)


@pytest.fixture(scope="session", autouse=True)
def _ranks_end() -> Iterator[None]:
    yield
    close_pools()


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [each for each in os.environ if each == "MNNVL_AR" or each.startswith(SETTINGS)]:
        monkeypatch.delenv(name)
    for name, value in {
        "_server": "",
        "_serving": False,
        "_told": False,
        "_lines_told": set(),
    }.items():  # plugins are active in processes
        monkeypatch.setattr(policy, name, value)
