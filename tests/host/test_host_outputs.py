"""The contract of an epilogue, on the host transport: tests/common/cases/outputs.py."""

import pytest

from common.cases import outputs
from common.ranks import TEST_LIBRARY, rank_pool

pytestmark = pytest.mark.skipif(not TEST_LIBRARY.exists(), reason="needs the test build: make test-build")


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("check", list(outputs.CHECKS))
def test_outputs_that_are_not_like_x(check: str, world_size: int) -> None:
    rank_pool(world_size, library=TEST_LIBRARY).run(outputs.CHECKS[check])


def test_inputs_can_tell_right_from_wrong() -> None:
    outputs.check_inputs_are_hostile()
