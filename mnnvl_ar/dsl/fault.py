"""Waiting is bounded: what happens when something does not come, or peers differ (csrc/kernels/fault.cuh).

Contract
  * The first thread of a rank to report a fault fills the host's record, then marks its own block and every peer's
    broken: whoever sees the mark that this rank set finds the record.
  * A thread that gives up waiting, or finds a fault, only notes it for its CTA, whose other waits end then. The thread
    that counts the CTA out reports it.
  * A broken workspace computes nothing: later calls store NaN and return; calls that wait give up.
"""

import cutlass
from cutlass import Boolean, Constexpr, Int64, Uint32, Uint64, cute, range_constexpr

from mnnvl_ar.dsl import constants as c
from mnnvl_ar.dsl import ptx

# Words of the host's record.
OF_CALL = ("rank", "epoch", "tokens", "description", "numbers.eps", "numbers.weight_bias")
OF_PEER = ("peer", "peer_tokens", "peer_description", "peer_numbers.eps", "peer_numbers.weight_bias")


@cute.jit
def must_give_up(
    block: Uint64, orders: Uint64, shared: Uint32, code: Constexpr, began: Uint64
) -> tuple[Boolean, Uint64]:
    """One look at clock and mark during a long wait; `began` starts as 0. Returns whether to give up, and `began`. The
    first wait that is given up, or another fault that was found, ends all others of this CTA."""
    now = ptx.global_timer_ns()
    if began == Uint64(0):
        began = now
    ended = (ptx.load_shared(shared + c.GAVE_UP * 4) != Uint32(0)) | (
        ptx.load_shared(shared + c.FOUND * 4) != Uint32(0)
    )
    is_marked = ptx.load_relaxed_sys_u32(block + c.PROGRESS_OFFSET + c.BROKEN_AT) != Uint32(0)
    deadline = ptx.load_relaxed_sys_u64(orders + c.ORDERS["deadline_ns"])
    # Signed, since the timer is the device's, and nobody promises that it never steps back.
    waited = Int64(now - began)
    if cutlass.const_expr(code == c.OVERLAP):  # a call before us that waits for a peer is to say so first
        waited = waited >> 1
    is_late = (deadline != Uint64(0)) & (waited >= Int64(deadline))
    if (is_marked | is_late) & ~ended:
        mine = ptx.select(is_marked, Uint32(c.PEER_FAULT), Uint32(code))
        if ptx.atomic_cas_shared(shared + c.GAVE_UP * 4, Uint32(0), mine) == Uint32(0):
            ptx.store_shared(shared + c.GAVE_UP_SINCE * 4, Uint32(began))
            ptx.store_shared(shared + (c.GAVE_UP_SINCE + 1) * 4, Uint32(began >> 32))
    return ended | is_marked | is_late, began


@cute.jit
def note_fault(
    shared: Uint32, code: Constexpr, peer: Uint32, tokens: Uint32, description: Uint32, eps: Uint32, bias: Uint32
) -> None:
    """For the first thread to report when it counts the CTA out; that is soon, since all waits of the CTA end now."""
    if ptx.atomic_cas_shared(shared + c.FOUND * 4, Uint32(0), Uint32(code)) == Uint32(0):
        for i, word in enumerate((peer, tokens, description, eps, bias)):
            ptx.store_shared(shared + (c.FOUND_FAULT + i) * 4, word)


@cute.jit
def report_fault(
    block: Uint64,
    peers: list[Uint64],
    record: Uint64,
    orders: Uint64,
    call: list[Uint32],
    code: Uint32,
    fault: list[Uint32],
    began: Uint64,
) -> None:
    """call: rank, epoch, tokens of the whole call, description, eps, weight bias. fault: peer (MAX_RANKS: to be found
    out, as the first rank whose newest call is an earlier one), and of its call tokens, description, eps, weight bias.

    Ends when the host has answered, or its stream has been held for as long as that was ordered."""
    ranks = len(peers) + 1
    rank, epoch = call[0], call[1]
    progress = block + c.PROGRESS_OFFSET
    if ptx.atomic_cas_relaxed_sys(progress + c.CLAIMED_AT, Uint32(0), Uint32(1)) == Uint32(0):
        peer = fault[0]
        for source in range_constexpr(ranks):
            newest = Uint32(c.NO_EPOCH)
            for slot in range_constexpr(c.SLOTS):
                place = c.BOARD_OFFSET + (slot * c.MAX_RANKS + source) * c.VECTOR_BYTES
                signed = ptx.load_relaxed_sys_u32(block + place)
                if (signed != Uint32(c.NO_EPOCH)) & ((newest == Uint32(c.NO_EPOCH)) | is_later(newest, signed)):
                    newest = signed
            ptx.store_relaxed_sys_u32(record + c.RECORD["last_epoch"] + source * 4, newest)
            is_behind = (newest == Uint32(c.NO_EPOCH)) | is_later(newest, epoch)
            if (peer >= Uint32(ranks)) & (rank != Uint32(source)) & is_behind:
                peer = Uint32(source)
        for name, word in zip(OF_CALL, call, strict=True):
            ptx.store_relaxed_sys_u32(record + c.RECORD[name], word)
        for name, word in zip(OF_PEER, [peer, *fault[1:]], strict=True):
            ptx.store_relaxed_sys_u32(record + c.RECORD[name], word)
        ptx.store_relaxed_sys_u64(record + c.RECORD["began_ns"], began)
        ptx.store_relaxed_sys_u64(record + c.RECORD["ended_ns"], ptx.global_timer_ns())
        ptx.fence_acq_rel_sys()
        ptx.store_relaxed_sys_u32(record + c.RECORD["code"], code)
        ptx.fence_acq_rel_sys()
        ptx.atomic_cas_relaxed_sys(progress + c.BROKEN_AT, Uint32(0), code)
        mark = Uint32(c.PEER_FAULT) | code << c.MARK_CODE_AT | rank << c.MARK_RANK_AT
        for other in peers:
            broken = other + c.PROGRESS_OFFSET + c.BROKEN_AT
            if code == Uint32(c.PEER_FAULT):  # who found it may have marked that peer already, and knows more
                ptx.atomic_cas_relaxed_sys(broken, Uint32(0), mark)
            else:
                ptx.store_relaxed_sys_u32(broken, mark)
        ptx.fence_acq_rel_sys()  # who finds this CTA finished finds the mark
        since = ptx.global_timer_ns()
        hold = ptx.load_relaxed_sys_u64(orders + c.ORDERS["hold_ns"])
        is_held = Boolean(True)
        while is_held:
            answered = ptx.load_relaxed_sys_u32(orders + c.ORDERS["answered"])
            waited = Int64(ptx.global_timer_ns() - since)  # signed: as in `must_give_up`
            is_held = (answered == Uint32(0)) & (waited < Int64(hold))
            if is_held:
                ptx.sleep_ns(Uint32(1000))


def is_later(from_: Uint32, to: Uint32) -> Boolean:
    """epoch_distance(from, to) > 0: not the same, and less than half of all epochs ahead. Epochs are modulo 2^32 - 1,
    so from a `to` that has wrapped one is taken off."""
    ahead = ptx.select(to >= from_, to - from_, to - from_ - Uint32(1))
    return (ahead != Uint32(0)) & (ahead <= Uint32(c.EPOCHS // 2))
