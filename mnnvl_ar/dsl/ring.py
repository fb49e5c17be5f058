"""A call's place in the ring: state, arrival, signatures (csrc/kernels/entry_warp.cuh)."""

from cutlass import Boolean, Uint32, Uint64, cute

from mnnvl_ar.dsl import constants as c
from mnnvl_ar.dsl import ptx
from mnnvl_ar.dsl.fault import must_give_up, note_fault


def is_quiescent(state: ptx.Vector, progress: ptx.Vector) -> Boolean:
    """Whether every CTA of earlier calls has finished; CTAs of this call may have, too."""
    return progress[0] - state[1] < Uint32(0x80000000)


@cute.jit
def await_quiescence(block: Uint64, orders: Uint64, shared: Uint32) -> Boolean:
    gave_up, quiescent, began = Boolean(False), Boolean(False), Uint64(0)
    while ~(gave_up | quiescent):
        state = ptx.load_relaxed_gpu(block + c.STATE_OFFSET)
        progress = ptx.load_relaxed_gpu(block + c.PROGRESS_OFFSET)
        quiescent = is_quiescent(state, progress)
        if ~quiescent:
            gave_up, began = must_give_up(block, orders, shared, c.OVERLAP, began)
    return quiescent


@cute.jit
def count_in(block: Uint64, epoch: Uint32, launched: Uint32, ctas: Uint32, dirty: Uint32, number: Uint32) -> Boolean:
    """Counts this CTA in; the last one advances the state. False: CTAs of another call counted themselves in, too."""
    mine = Uint32(1) + ((number * Uint32(c.ARRIVAL_FACTOR) + epoch) << c.ARRIVAL_BITS)
    before = ptx.atomic_add_relaxed_gpu(block + c.STATE_OFFSET + c.ARRIVED_AT, mine)
    count = before & Uint32(c.MAX_GRID)
    alone = (before == count * mine) & (count < ctas)
    if alone & (count + Uint32(1) == ctas):
        following = ptx.select(epoch + Uint32(1) == Uint32(c.EPOCHS), Uint32(0), epoch + Uint32(1))
        was = ptx.exchange_relaxed_gpu(block + c.STATE_OFFSET, (following, launched + ctas, dirty, Uint32(0)))
        # Using what was there makes what follows wait until the state has been advanced.
        alone = (was[0] == epoch) & (was[1] == launched)
    return alone


@cute.jit
def peer_agrees(
    block: Uint64,
    orders: Uint64,
    shared: Uint32,
    slot: Uint32,
    source: Uint32,
    epoch: Uint32,
    signed: ptx.Vector,
    numbers: ptx.Vector,
) -> Boolean:
    """Waits for the signatures of one rank. False: one differs, or did not come; that has been noted."""
    place = block + c.BOARD_OFFSET + Uint64(slot * Uint32(c.MAX_RANKS) + source) * Uint64(c.VECTOR_BYTES)
    tries, began = Uint32(0), Uint64(0)
    differs, agrees, gave_up, are_there = Boolean(False), Boolean(False), Boolean(False), Boolean(False)
    seen, second = signed, numbers
    while ~(differs | agrees | gave_up):
        seen = ptx.load_halves_relaxed_sys(place)
        second = ptx.load_halves_relaxed_sys(place + c.ONE_BOARD_BYTES)
        is_there = (seen[0] == epoch) & (seen[2] == epoch)
        are_there = is_there & (second[0] == epoch) & (second[2] == epoch)
        differs = is_there & ((seen[1] != signed[1]) | (seen[3] != signed[3]))
        differs = differs | (are_there & ((second[1] != numbers[1]) | (second[3] != numbers[3])))
        agrees = are_there & ~differs
        if ~(differs | agrees) & (tries >= Uint32(c.FAST_POLLS)):
            gave_up, began = must_give_up(block, orders, shared, c.PEER_TIMEOUT, began)
        tries = tries + Uint32(1)
    if differs:
        note_fault(
            shared,
            c.CALL_MISMATCH,
            source,
            seen[1],
            seen[3],
            ptx.select(are_there, second[1], numbers[1]),
            ptx.select(are_there, second[3], numbers[3]),
        )
    return agrees
