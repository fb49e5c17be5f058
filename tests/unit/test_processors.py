"""What a part of a device holds at once, from what all of it does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

protocol = pytest.importorskip("_protocol", reason="tests/_protocol is not built: `make test-build`")


@given(st.integers(0, 2000), st.integers(1, 200), st.integers(1, 200))
def test_no_more_than_its_part(resident: int, here: int, of_device: int) -> None:
    room = protocol.resident_on(resident, here, of_device)
    assert room == (resident if here >= of_device else resident * here // of_device)


def test_by_example() -> None:
    assert protocol.resident_on(264, 0, 132) == 264, "nothing was agreed on: all of the device"
    assert protocol.resident_on(264, 132, 132) == 264
    assert protocol.resident_on(264, 66, 132) == 132
    assert protocol.resident_on(16, 8, 132) == 0, "not even one: a narrower cluster may have room"
