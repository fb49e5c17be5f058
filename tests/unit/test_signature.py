"""Signatures: a torn one is not recognised, and a peer that differs in anything is found out."""

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

protocol = pytest.importorskip("_protocol", reason="tests/_protocol is not built: `make test-build`")

Call = tuple[int, int, int, int, int, int, int, int]

word = st.integers(0, 2**32 - 1)
epoch = st.one_of(
    st.integers(0, protocol.EPOCHS - 1), st.integers(0, 5), st.integers(protocol.EPOCHS - 5, protocol.EPOCHS - 1)
)
call = st.tuples(
    st.integers(0, 15),  # op
    st.integers(0, 2),  # dtype
    st.integers(0, 1),  # strategy
    st.integers(1, protocol.MAX_ROW_VECTORS),
    st.integers(0, protocol.TAGS - 1),
    st.integers(0, protocol.SIGNED_PIECES - 1),
    st.integers(0, 15),  # variant
    st.integers(1, 2**32 - 1),  # tokens
)


def signed(epoch: int, call: Call) -> list[int]:
    vector: list[int] = protocol.signature(epoch, call[7], protocol.describe(*call[:7]))
    return vector


def agrees(vector: list[int], call: Call) -> bool:
    return bool(protocol.agrees(vector, call[7], protocol.describe(*call[:7])))


@given(epoch, call)
def test_a_signature_is_recognised_and_agrees_with_the_same_call(epoch: int, call: Call) -> None:
    assert protocol.is_signature_of(signed(epoch, call), epoch)
    assert agrees(signed(epoch, call), call)


@given(epoch, call, call)
def test_any_field_that_differs_is_seen(epoch: int, ours: Call, theirs: Call) -> None:
    """Also one field at a time: every mixture of the two calls, of which 254 differ from ours in 1 to 8 fields."""
    for chosen in itertools.product((0, 1), repeat=8):
        mixed = tuple((ours, theirs)[c][i] for i, c in enumerate(chosen))
        assert agrees(signed(epoch, mixed), ours) == (mixed == ours)


def test_every_pair_of_descriptions_differs() -> None:
    rows = range(1, protocol.MAX_ROW_VECTORS + 1)
    pieces = (0, 1, protocol.SIGNED_PIECES - 1)
    all_calls = list(itertools.product((0, 1, 15), range(3), range(2), rows, (0, 3), pieces, (0, 15)))
    assert len({protocol.describe(*one) for one in all_calls}) == len(all_calls)


@given(call)
def test_a_description_is_read_as_it_was_written(call: Call) -> None:
    assert tuple(protocol.described(protocol.describe(*call[:7]))) == call[:7]


@given(epoch, epoch, call, call)
@example(0, 1, (0, 0, 0, 1, 0, 0, 0, 1), (0, 0, 0, 1, 0, 0, 0, 1))
def test_torn_halves_are_not_recognised(new: int, old: int, call: Call, before: Call) -> None:
    """A 16-byte store that is seen half: the other half is an older call's, or the board's first filling."""
    whole = signed(new, call)
    fresh_board = [protocol.NO_EPOCH] * 4
    for stale in (signed(old, before), fresh_board):
        for torn in (whole[:2] + stale[2:], stale[:2] + whole[2:]):
            if stale[0] != new:
                assert not protocol.is_signature_of(torn, new)


@given(epoch, word, word)
def test_a_fresh_board_is_nobodys_signature(epoch: int, tokens: int, description: int) -> None:
    assert not protocol.is_signature_of([protocol.NO_EPOCH, tokens, protocol.NO_EPOCH, description], epoch)


@given(epoch, epoch, call)
def test_another_epochs_signature_is_not_ours(ours: int, theirs: int, call: Call) -> None:
    assert protocol.is_signature_of(signed(theirs, call), ours) == (theirs == ours)
