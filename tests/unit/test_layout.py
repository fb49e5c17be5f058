"""Layout: what is placed does not overlap, is dense, and fits just when the function that sizes the slot says so."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

protocol = pytest.importorskip("_protocol", reason="tests/_protocol is not built: `make test-build`")

MOST = 400_000  # positions listed at once
ROWS = [16, 90, 360, 512, 896, 1024, 2048]  # vectors a row: hidden 2880, 4096, 7168, 8192 in bf16, and the longest

ranks = st.integers(1, protocol.MAX_RANKS)
tokens = st.one_of(st.integers(1, 40), st.sampled_from([64, 256, 512]))
vectors = st.one_of(st.integers(1, protocol.MAX_ROW_VECTORS), st.integers(1, 100), st.sampled_from(ROWS))
shapes = st.tuples(ranks, tokens, vectors)
huge = st.tuples(ranks, st.integers(1, 2**20), st.integers(1, protocol.MAX_ROW_VECTORS))


def is_dense(positions: np.ndarray, first: int, count: int) -> bool:
    """Whether `positions` are first, ..., first + count - 1, each once."""
    return positions.size == count and np.array_equal(np.sort(positions, axis=None), np.arange(first, first + count))


def owner_columns(shape: tuple[int, int, int]) -> list[int]:
    return [protocol.columns_of(*shape, owner) for owner in range(shape[0])]


@given(st.integers(0, 1), ranks, st.integers(1, 2**31 - 1), vectors, st.integers(1, 2**28 - 1))
@example(0, 2, 2**27, 1, 2**28 - 1)
@example(1, 2, 2**27, 1, 2**28 - 1)
@example(0, 1, 2**31 - 1, 1, 1)
def test_counts_of_a_piece_fit_32_bits(strategy: int, world: int, rows: int, row: int, slot: int) -> None:
    """Pieces cover the call, and its threads, a warp a row at least, can be counted with room for a grid besides."""
    of_piece, count = protocol.pieces_of(strategy, world, rows, row, slot)
    assert (count - 1) * of_piece < rows <= count * of_piece or of_piece == 0
    assert of_piece * max(row, 32) < 2**28


@settings(max_examples=60)
@given(shapes, st.booleans())
@example((8, 3, 360), False)
@example((72, 2, 2048), True)
@example((1, 1, 1), True)
@example((1, 1, 1), False)
def test_one_shot_positions_are_what_the_call_dirties(shape: tuple[int, int, int], own_too: bool) -> None:
    """At each receiver, where a multicast brings its own rows too, and where it does not get them."""
    world, rows, row = shape
    count = protocol.one_shot_vectors(*shape, own_too)
    assert count == (world if own_too else world - 1) * rows * row <= protocol.one_shot_vectors(*shape)
    assume(count <= MOST)
    for receiver in {0, world // 2, world - 1}:
        positions = protocol.one_shot_positions(*shape, receiver, own_too)
        assert np.array_equal(positions.ravel(), np.arange(count)), "dense, and in rank order"


@settings(max_examples=60)
@given(shapes)
@example((8, 3, 360))
@example((7, 5, 360))
@example((72, 4, 16))
@example((72, 1, 73))
def test_two_shot_positions_are_what_the_call_dirties(shape: tuple[int, int, int]) -> None:
    world, rows, row = shape
    scattered, total = protocol.scatter_vectors(*shape), protocol.two_shot_vectors(*shape)
    assert total == scattered + rows * row
    assume(total <= MOST)
    assert is_dense(protocol.gather_positions(*shape), scattered, rows * row)
    width = protocol.owned_columns(*shape)
    for owner in {0, 1 % world, world // 2, world - 1}:  # stage 1 lies in the owner's own slot
        columns = protocol.columns_of(*shape, owner)
        positions = protocol.scatter_positions(*shape, owner)
        assert positions.size == world * rows * columns
        assert np.unique(positions).size == positions.size
        assert positions.size == 0 or positions.max() < scattered
        if columns == width:
            assert is_dense(positions, 0, scattered)


@given(huge)
@example((72, 2**20, 2048))
@example((8, 1, 360))
@example((72, 1, 71))
@example((72, 1, 1))
def test_columns_partition_the_row(shape: tuple[int, int, int]) -> None:
    columns, width = owner_columns(shape), protocol.owned_columns(*shape)
    assert sum(columns) == shape[2]
    assert all(0 <= c <= width for c in columns)
    first = [owner * width for owner in range(shape[0])]
    own = [column for start, count in zip(first, columns, strict=True) for column in range(start, start + count)]
    assert own == list(range(shape[2])), "owner o starts at o * width, and none is left out or owned twice"


@given(huge, st.data())
def test_positions_of_any_size_are_bounded_and_do_not_overflow(
    shape: tuple[int, int, int], data: st.DataObject
) -> None:
    """Sampled where all positions are too many to list; Python's integers have no width to overflow."""
    world, rows, row = shape
    source, token, vector = (data.draw(st.integers(0, n - 1)) for n in shape)
    owner, column = divmod(vector, protocol.owned_columns(*shape))
    one = protocol.one_shot_position(shape, source, token, vector)
    assert one == (source * rows + token) * row + vector < protocol.one_shot_vectors(*shape) == world * rows * row
    assert column < protocol.columns_of(*shape, owner)
    width = -(-row // world)
    scatter = protocol.scatter_position(shape, source, token, column)
    assert (
        scatter == (source * rows + token) * width + column < protocol.scatter_vectors(*shape) == world * rows * width
    )
    gather = protocol.gather_position(shape, token, vector)
    assert protocol.scatter_vectors(*shape) <= gather == world * rows * width + token * row + vector
    assert gather < protocol.two_shot_vectors(*shape)


@given(huge)
def test_a_larger_call_needs_no_smaller_slot(shape: tuple[int, int, int]) -> None:
    """So a workspace that fits its largest call fits them all."""
    world, rows, row = shape
    for count in (protocol.one_shot_vectors, protocol.two_shot_vectors):
        assert count(world, rows, row) < count(world, rows + 1, row)
        assert count(world, rows, row) < count(world, rows, row + 1)


@given(st.integers(1, 2**40))
def test_the_block_holds_its_parts_side_by_side(slot_vectors: int) -> None:
    slot_bytes = slot_vectors * protocol.VECTOR_BYTES
    board = [
        offset(slot, source)
        for offset in (protocol.board_offset, protocol.numbers_offset)
        for slot in range(protocol.SLOTS)
        for source in range(protocol.MAX_RANKS)
    ]
    slots = [protocol.slot_offset(slot, slot_bytes) for slot in range(protocol.SLOTS)]
    parts = [(protocol.STATE_OFFSET, 16), (protocol.PROGRESS_OFFSET, 16)]
    parts += [(offset, 16) for offset in board]
    parts += [(protocol.PROBE_OFFSET, 16 * protocol.MAX_RANKS)]
    parts += [(offset, slot_bytes) for offset in slots]
    for (offset, size), (following, _) in itertools.pairwise(parts):
        assert offset + size <= following
    assert all(offset % protocol.VECTOR_BYTES == 0 for offset, _ in parts), "16-byte loads and stores"
    assert slots[0] == protocol.CONTROL_BYTES
    assert slots[-1] + slot_bytes == protocol.block_bytes(slot_bytes)
