"""Each rule of the protocol has a test, and a control: the same test fails once the rule is switched off.

Rules that only a device can break (device_epoch, quiescence, advance_last) are in tests/gpu/test_gpu_controls.py.
"""

import pytest

from common.cases.rules import HOST_CHECKS, ONLY_HOST_CHECKS
from common.ranks import TEST_LIBRARY, RankPool, RanksFailed, rank_pool

CHECKS = {**HOST_CHECKS, **ONLY_HOST_CHECKS}
pytestmark = pytest.mark.skipif(not TEST_LIBRARY.exists(), reason="needs the test build: make test-build")


@pytest.fixture
def ranks(rule: str) -> RankPool:
    """Ranks of the test build, not used by another test after a control has harmed them."""
    return rank_pool(CHECKS[rule][1], library=TEST_LIBRARY)


@pytest.mark.parametrize("rule", list(CHECKS))
def test_holds_with(rule: str, ranks: RankPool) -> None:
    ranks.run(CHECKS[rule][0], "")


@pytest.mark.parametrize("rule", list(CHECKS))
def test_fails_without(rule: str, ranks: RankPool) -> None:
    check, _, says = CHECKS[rule]
    try:
        with pytest.raises(RanksFailed, match=says):
            # A call that hangs is cut short; any other failure gets the time that a busy machine needs to come to it.
            ranks.run(check, rule, timeout=10 if "still running" in says else 60)
    finally:
        ranks.discard()
