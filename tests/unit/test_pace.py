"""One-shot's pace: rows of a small call leave at once, those of a large one as the link takes them.

No look is made before its data can be there.
"""

from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnnvl_ar.tuning import link_of

protocol = pytest.importorskip("_protocol", reason="tests/_protocol is not built: `make test-build`")

H200 = link_of("NVIDIA H200")
LINK = 450e9 / 1.98e9  # bytes that H200's links take in a clock, by their datasheet: no call is quicker
HOP = 900  # clocks

ranks, others = st.integers(1, protocol.MAX_RANKS), st.integers(2, protocol.MAX_RANKS)
vectors = st.integers(1, protocol.MAX_ROW_VECTORS)


def sent(world: int, tokens: int, row: int) -> int:
    """Bytes, by each rank."""
    return (world - 1) * tokens * row * protocol.VECTOR_BYTES


def pace(world: int, tokens: int, row: int) -> tuple[int, int]:
    """Clocks between two rows, and before the first look."""
    row_clocks, first_look = protocol.pace(world, tokens, row, astuple(H200))
    return row_clocks, first_look


@given(others, st.integers(1, 4096), vectors)
def test_rows_take_turns_from_a_size_on(world: int, tokens: int, row: int) -> None:
    row_clocks, first_look = pace(world, tokens, row)
    if sent(world, tokens, row) < H200.paced_from_bytes:
        assert row_clocks == 0
        assert HOP <= first_look < HOP + H200.paced_from_bytes / LINK * 1.3
    else:
        assert row_clocks == pytest.approx(sent(world, 1, row) / LINK * 1.24, rel=0.02, abs=1)
        assert first_look == 2 * HOP


@given(others, vectors)
def test_the_first_look_waits_for_what_all_peers_send(world: int, row: int) -> None:
    looks = [
        pace(world, tokens, row)[1] for tokens in range(1, 200) if sent(world, tokens, row) < H200.paced_from_bytes
    ]
    assert looks == sorted(looks)
    for tokens, look in enumerate(looks, 1):
        assert look - HOP >= sent(world, tokens, row) / LINK - 1


def test_a_world_of_one_waits_for_nothing() -> None:
    assert pace(1, 1, 1) == pace(1, 4096, 512) == (0, 0)


@given(ranks, st.integers(1, 2**20), vectors)
def test_clocks_fit_their_word(world: int, tokens: int, row: int) -> None:
    """Of any call that fits a slot, with room to spare: the kernel multiplies in 32 bits."""
    if sent(world, tokens, row) < 2**32:
        assert pace(world, tokens, row)[0] * tokens < 2**25
