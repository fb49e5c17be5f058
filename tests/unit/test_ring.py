"""The ring's arithmetic: rule R3 of docs/protocol.md, also where epochs wrap."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

protocol = pytest.importorskip("_protocol", reason="tests/_protocol is not built: `make test-build`")

EPOCHS, SLOTS, NO_EPOCH = protocol.EPOCHS, protocol.SLOTS, protocol.NO_EPOCH
NEAR = 5000  # epochs looked at one by one on either side of the wrap

epochs = st.one_of(
    st.integers(0, EPOCHS - 1),
    st.integers(0, 10),
    st.integers(EPOCHS - 10, EPOCHS - 1),
    st.integers(2**31 - 9, 2**31 + 9),
)


def later(epoch: int, calls: int) -> int:
    """The epoch `calls` calls after `epoch`; as the contract of ring.h has it, in numbers that do not overflow."""
    return (epoch + calls) % int(EPOCHS)


def test_constants() -> None:
    assert SLOTS == 3
    assert EPOCHS % SLOTS == 0, "or slot 0 would be used twice in a row at the wrap"
    assert NO_EPOCH not in range(EPOCHS)


@given(epochs)
@example(EPOCHS - 1)
def test_next_epoch_counts_and_wraps(epoch: int) -> None:
    assert protocol.next_epoch(epoch) == later(epoch, 1)
    assert protocol.next_epoch(epoch) != NO_EPOCH


@given(epochs)
@example(EPOCHS - 1)
@example(EPOCHS - 2)
def test_three_successive_epochs_use_three_slots(epoch: int) -> None:
    following = protocol.next_epoch(epoch)
    assert sorted(map(protocol.slot_of, (epoch, following, protocol.next_epoch(following)))) == [0, 1, 2]


@given(epochs)
@example(EPOCHS - 1)
@example(EPOCHS - 2)
def test_each_call_clears_the_slot_of_the_call_before(epoch: int) -> None:
    assert protocol.slot_to_clear(protocol.next_epoch(epoch)) == protocol.slot_of(epoch)


def test_every_epoch_near_the_wrap() -> None:
    epoch = EPOCHS - NEAR
    used = []
    for _ in range(2 * NEAR):
        used.append(protocol.slot_of(epoch))
        epoch = protocol.next_epoch(epoch)
    assert epoch == NEAR
    assert all(set(used[i : i + 3]) == {0, 1, 2} for i in range(len(used) - 2))
    assert all(used[i] == used[i + 3] for i in range(len(used) - 3)), "a slot is used again by the third call after"


def test_a_wrap_at_a_power_of_two_would_repeat_a_slot() -> None:
    """Why kEpochs is what it is: the control for the tests above."""
    assert protocol.slot_of(2**32 - 1) == protocol.slot_of(0)


@given(epochs, epochs)
@example(EPOCHS - 1, 0)
@example(0, EPOCHS // 2)
@example(0, EPOCHS // 2 + 1)
def test_epoch_distance_is_antisymmetric(a: int, b: int) -> None:
    assert protocol.epoch_distance(a, b) == -protocol.epoch_distance(b, a)


@given(epochs, st.integers(-(EPOCHS // 2), EPOCHS // 2))
def test_epoch_distance_undoes_counting(epoch: int, calls: int) -> None:
    assert protocol.epoch_distance(epoch, later(epoch, calls)) == calls


@given(st.integers(-50, 50), st.integers(-50, 50))
def test_epoch_distance_near_the_wrap(a: int, b: int) -> None:
    assert protocol.epoch_distance(a % EPOCHS, b % EPOCHS) == b - a


@given(epochs)
@example(EPOCHS - 1)
@example(EPOCHS - 2)
def test_no_call_writes_what_a_rank_one_call_behind_clears(epoch: int) -> None:
    """R3: data keeps ranks within one call of each other, and no peer in call n or n + 1 writes what call n clears."""
    cleared = protocol.slot_to_clear(epoch)
    assert cleared not in (protocol.slot_of(epoch), protocol.slot_of(later(epoch, 1)))
    assert cleared == protocol.slot_of(later(epoch, 2)), "the next to use it is call n + 2"


def test_two_slots_would_not_do() -> None:
    """The control for the test above: with two, the writer of call n + 1 meets the clearer of call n."""
    assert all((n + 1) % 2 == (n - 1) % 2 for n in range(1, 10))


launches = st.integers(0, 2**32 - 1)


@given(epochs, launches, st.integers(0, protocol.MAX_GRID))
def test_arrivals_of_one_call_are_counted(epoch: int, launch: int, ctas: int) -> None:
    mine = protocol.arrival(epoch, launch)
    arrived = ctas * mine % 2**32
    assert protocol.arrivals(arrived) == ctas
    assert protocol.is_one_call(arrived, mine)


@given(epochs, launches, st.integers(1, protocol.MAX_GRID // 2), st.integers(1, protocol.MAX_GRID // 2))
@example(7, 7, 4096 - 1, 1)
def test_the_next_launch_or_epoch_among_them_is_noticed(epoch: int, launch: int, first: int, more: int) -> None:
    """By the CTA that comes first after the others, whatever the number of those; and by those that follow it."""
    mine = protocol.arrival(epoch, launch)
    for other in (
        protocol.arrival(epoch, (launch + 1) % 2**32),
        protocol.arrival(protocol.next_epoch(epoch), launch),
    ):
        assert not protocol.is_one_call(first * other % 2**32, mine)
        assert not protocol.is_one_call((first * other + more * mine) % 2**32, mine)
