"""One-shot in CuTe DSL: every rank sends its rows to all others, each rank sums, adds the residual and normalises.

The twin of csrc/kernels/one_shot.cuh, on the same blocks, with the same words on the wire and the same bits: rank by
rank and call by call one may stand for the other (docs/protocol.md). What is simpler here:

  * A CTA holds a row, and takes rows c, c + CTAs, ... in rising order. A thread holds COLUMNS vectors of each.
  * There are no entry and exit warps: the first warp reads the state and compares signatures, its first thread counts
    in and out, and the CTA waits together where they hand on to the others.
  * No prefetch, no pace, no overlap of one row's sending with another's arrival.

All of this costs time, and no bits (docs/twin.md). Nothing here depends on a cluster: CTAs share nothing but the block.
"""

from collections.abc import Callable

import cutlass
from cutlass import Boolean, Constexpr, Float32, Int64, Uint32, Uint64, cute, range_constexpr

from mnnvl_ar.dsl import constants as c
from mnnvl_ar.dsl import numerics, ptx
from mnnvl_ar.dsl.constants import COLUMNS, MOST_GROUPS, MOST_THREADS

# What the threads of a CTA share, in words.
ENTRY = 0  # epoch, dirty, broken, launched: as the first warp found them
GAVE_UP = 4  # code of the first wait that was given up, and from 6 on when it began
FOUND = 5  # code of another fault, and from 8 on peer, peer_tokens, peer_description, eps, weight_bias
GAVE_UP_SINCE = 6
FOUND_PEER = 8
POISONED = 13  # non-zero: outputs must be NaN
SUMS = 16  # of groups: two sets that take turns
SHARED_WORDS = SUMS + 2 * MOST_GROUPS

Epilogue = Callable[[list[Float32]], ptx.Vector]


def rms_norm(norm: list[Float32]) -> ptx.Vector:
    """The epilogue of `all_reduce_rms_norm`: what is stored of a vector, given its eight elements of the norm in fp32.
    Of a NaN it has to make a NaN: that is all that tells a failed call."""
    return numerics.pack(norm)


def bits(condition: Boolean, word: Uint32, other: Uint32) -> Uint32:
    """`word` where the condition holds, else `other`: without a branch."""
    return Uint32(cutlass.select_(condition, word, other))


def pick(condition: Boolean, v: ptx.Vector, other: ptx.Vector) -> ptx.Vector:
    return tuple(bits(condition, a, b) for a, b in zip(v, other, strict=True))  # type: ignore[return-value]


def sanitize(v: ptx.Vector) -> ptx.Vector:
    """Rule R1: the sentinel is sent as 0."""
    sentinel = Uint32(c.SENTINEL)
    return tuple(bits(word == sentinel, Uint32(0), word) for word in v)  # type: ignore[return-value]


def has_arrived(v: ptx.Vector) -> Boolean:
    """Rule R2: every word is looked at, as an integer."""
    sentinel = Uint32(c.SENTINEL)
    there = v[0] != sentinel
    for word in v[1:]:
        there = there & (word != sentinel)
    return there


# ---- Waiting is bounded


@cute.jit
def must_give_up(block: Uint64, orders: Uint64, shared: Uint32, code: Constexpr, began: Uint64):  # type: ignore[no-untyped-def]
    """One look at clock and mark during a long wait; `began` starts as 0. Returns whether to give up, and `began`. The
    first wait that is given up, or another fault that was found, ends all others of this CTA."""
    now = ptx.global_timer_ns()
    if began == Uint64(0):
        began = now
    ended = (ptx.load_shared(shared + GAVE_UP * 4) != Uint32(0)) | (ptx.load_shared(shared + FOUND * 4) != Uint32(0))
    is_marked = ptx.load_relaxed_sys_u32(block + c.PROGRESS_OFFSET + c.BROKEN_AT) != Uint32(0)
    deadline = ptx.load_relaxed_sys_u64(orders + c.ORDERS["deadline_ns"])
    # Signed, since the timer is the device's, and nobody promises that it never steps back.
    waited = Int64(now - began)
    if cutlass.const_expr(code == c.OVERLAP):  # a call before us that waits for a peer is to say so first
        waited = waited >> 1
    is_late = (deadline != Uint64(0)) & (waited >= Int64(deadline))
    if (is_marked | is_late) & ~ended:
        mine = bits(is_marked, Uint32(c.PEER_FAULT), Uint32(code))
        if ptx.atomic_cas_shared(shared + GAVE_UP * 4, Uint32(0), mine) == Uint32(0):
            ptx.store_shared(shared + GAVE_UP_SINCE * 4, Uint32(began))
            ptx.store_shared(shared + (GAVE_UP_SINCE + 1) * 4, Uint32(began >> 32))
    return ended | is_marked | is_late, began


@cute.jit
def note_fault(shared: Uint32, code: Constexpr, peer: Uint32, tokens: Uint32, description: Uint32, eps: Uint32, bias: Uint32) -> None:
    """For the first thread to report when it counts the CTA out; that is soon, since all waits of the CTA end now."""
    if ptx.atomic_cas_shared(shared + FOUND * 4, Uint32(0), Uint32(code)) == Uint32(0):
        for i, word in enumerate((peer, tokens, description, eps, bias)):
            ptx.store_shared(shared + (FOUND_PEER + i) * 4, word)


@cute.jit
def report_fault(block: Uint64, peers: list, record: Uint64, orders: Uint64, rank: Uint32, epoch: Uint32, call_tokens: Uint32, description: Uint32, eps: Uint32, bias: Uint32, code: Uint32, fault: list, began: Uint64) -> None:  # type: ignore[type-arg]
    """The first thread of a rank to find a fault fills the host's record, its code last, and then marks its own block
    and every peer's broken: whoever sees the mark finds the record. It holds its stream until the host has answered."""
    ranks = len(peers) + 1
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
        words = {
            "rank": rank,
            "epoch": epoch,
            "tokens": call_tokens,
            "description": description,
            "numbers.eps": eps,
            "numbers.weight_bias": bias,
            "peer": peer,
            "peer_tokens": fault[1],
            "peer_description": fault[2],
            "peer_numbers.eps": fault[3],
            "peer_numbers.weight_bias": fault[4],
        }
        for name, word in words.items():
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
        since = ptx.global_timer_ns()
        hold = ptx.load_relaxed_sys_u64(orders + c.ORDERS["hold_ns"])
        is_held = Boolean(True)
        while is_held:
            answered = ptx.load_relaxed_sys_u32(orders + c.ORDERS["answered"])
            is_held = (answered == Uint32(0)) & (ptx.global_timer_ns() - since < hold)
            if is_held:
                ptx.sleep_ns(Uint32(1000))


def is_later(from_: Uint32, to: Uint32) -> Boolean:
    """epoch_distance(from, to) > 0: not the same, and less than half of all epochs ahead. Epochs are modulo 2^32 - 1, so
    from a `to` that has wrapped one is taken off."""
    ahead = bits(to >= from_, to - from_, to - from_ - Uint32(1))
    return (ahead != Uint32(0)) & (ahead <= Uint32(c.EPOCHS // 2))


# ---- A call's place in the ring


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
        following = bits(epoch + Uint32(1) == Uint32(c.EPOCHS), Uint32(0), epoch + Uint32(1))
        was = ptx.exchange_relaxed_gpu(block + c.STATE_OFFSET, (following, launched + ctas, dirty, Uint32(0)))
        # Using what was there makes what follows wait until the state has been advanced.
        alone = (was[0] == epoch) & (was[1] == launched)
    return alone


@cute.jit
def peer_agrees(block: Uint64, orders: Uint64, shared: Uint32, slot: Uint32, source: Uint32, epoch: Uint32, signed: ptx.Vector, numbers: ptx.Vector) -> Boolean:
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
        nothing = Uint32(0)
        note_fault(shared, c.CALL_MISMATCH, source, seen[1], seen[3], bits(are_there, second[1], nothing), bits(are_there, second[3], nothing))
    return agrees


# ---- Waiting for data


@cute.jit
def receive(block: Uint64, orders: Uint64, shared: Uint32, first: Uint64, stride: Uint64, others: Constexpr):  # type: ignore[no-untyped-def]
    """A vector of each other rank, `stride` bytes apart, in rank order, once all of them have arrived. Returns whether
    they have, and the vectors."""
    nothing = (Uint32(0), Uint32(0), Uint32(0), Uint32(0))
    v = [nothing] * others
    tries, began = Uint32(0), Uint64(0)
    ready, gave_up = Boolean(False), Boolean(False)
    while ~(ready | gave_up):
        v = [ptx.load_relaxed_sys(first + stride * Uint64(i)) for i in range(others)]
        ready = has_arrived(v[0])
        for i in range_constexpr(1, others):
            ready = ready & has_arrived(v[i])
        if ~ready & (tries >= Uint32(c.FAST_POLLS)):
            gave_up, began = must_give_up(block, orders, shared, c.PEER_TIMEOUT, began)
        tries = tries + Uint32(1)
    return ready, v


def sum_in_rank_order(v: list[ptx.Vector], mine: ptx.Vector, rank: Uint32) -> ptx.Vector:
    """Numerics, step 1. `v`: of the other ranks, in rank order; ours belongs at place `rank`."""
    sums = numerics.zeros()
    for i in range(len(v) + 1):
        before = v[i] if i < len(v) else mine  # of rank i, if that is lower than ours
        after = v[i - 1] if i > 0 else mine  # of rank i, if that is higher
        sums = numerics.accumulate(sums, pick(Uint32(i) < rank, before, pick(Uint32(i) == rank, mine, after)))
    return numerics.pack(sums)


@cute.kernel
def one_shot(
    x: Uint64,  # addresses of this launch's first row
    residual: Uint64,
    norm_out: Uint64,
    residual_out: Uint64,
    weight: Uint64,
    block: Uint64,
    record: Uint64,
    orders: Uint64,
    slot_bytes: Uint64,
    peer_1: Uint64,  # blocks in rotated order: rank + 1, rank + 2, ...
    peer_2: Uint64,
    peer_3: Uint64,
    peer_4: Uint64,
    peer_5: Uint64,
    peer_6: Uint64,
    peer_7: Uint64,
    rank: Uint32,
    tokens: Uint32,
    vectors: Uint32,
    first_token: Uint32,
    call_tokens: Uint32,
    description: Uint32,
    eps: Uint32,  # bits of the fp32 number, as the next one
    weight_bias: Uint32,
    weight_is_fp32: Uint32,
    number: Uint32,
    trigger_early: Uint32,
    ranks: Constexpr,
    epilogue: Constexpr,
) -> None:
    # ---- Set-up: addresses, what the CTA shares.
    peers = [peer_1, peer_2, peer_3, peer_4, peer_5, peer_6, peer_7][: ranks - 1]
    thread, cta = Uint32(cute.arch.thread_idx()[0]), Uint32(cute.arch.block_idx()[0])
    threads, ctas = Uint32(cute.arch.block_dim()[0]), Uint32(cute.arch.grid_dim()[0])
    warp, lane = thread >> 5, thread & Uint32(31)
    shared = Uint32(cute.arch.alloc_smem(Uint32, SHARED_WORDS, alignment=16).toint())
    i = thread
    while i < Uint32(SHARED_WORDS):
        ptx.store_shared(shared + i * Uint32(4), Uint32(0))
        i = i + threads
    row_bytes = Uint64(vectors) * Uint64(c.VECTOR_BYTES)
    source_bytes = Uint64(tokens) * row_bytes
    place = [(warp * Uint32(COLUMNS) + Uint32(column)) * Uint32(c.GROUP) + lane for column in range(COLUMNS)]
    holds = [vector < vectors for vector in place]
    dirty_next = Uint32(ranks - 1) * tokens * vectors
    signed = (Uint32(0), call_tokens, Uint32(0), description)
    numbers = (Uint32(0), eps, Uint32(0), weight_bias)
    ptx.sync_threads()

    # ---- Enter: the predecessor has ended. One warp reads the state, for all of the CTA (rules R4 and R6).
    ptx.wait_for_predecessor()
    if warp == Uint32(0):
        state = ptx.load_relaxed_gpu(block + c.STATE_OFFSET)
        progress = ptx.load_relaxed_gpu(block + c.PROGRESS_OFFSET)
        quiescent = is_quiescent(state, progress)
        if ~quiescent:
            quiescent = await_quiescence(block, orders, shared)
        if lane == Uint32(0):
            broken_now = (progress[1] != Uint32(0)) | ~quiescent
            ptx.store_shared_vector(shared + ENTRY * 4, (state[0], state[2], Uint32(broken_now), state[1]))
    ptx.sync_threads()
    epoch, dirty, is_broken, launched = ptx.load_shared_vector(shared + ENTRY * 4)
    broken = is_broken != Uint32(0)
    slot = epoch % Uint32(c.SLOTS)
    stale = (slot + Uint32(c.SLOTS - 1)) % Uint32(c.SLOTS)
    slot_at = Uint64(c.CONTROL_BYTES) + Uint64(slot) * slot_bytes
    stale_at = Uint64(c.CONTROL_BYTES) + Uint64(stale) * slot_bytes
    signed = (epoch, call_tokens, epoch, description)
    numbers = (epoch, eps, epoch, weight_bias)

    # ---- Sign the call in every board, our own too.
    if (cta == Uint32(0)) & (thread < Uint32(ranks)) & ~broken:
        board = block
        for peer in range_constexpr(ranks - 1):
            board = Uint64(cutlass.select_(thread == Uint32(peer), peers[peer], board))
        at = board + c.BOARD_OFFSET + Uint64(slot * Uint32(c.MAX_RANKS) + rank) * Uint64(c.VECTOR_BYTES)
        ptx.store_halves_relaxed_sys(at, signed)
        ptx.store_halves_relaxed_sys(at + c.ONE_BOARD_BYTES, numbers)

    poison = numerics.poison()
    empty = (Uint32(c.SENTINEL), Uint32(c.SENTINEL), Uint32(c.SENTINEL), Uint32(c.SENTINEL))
    hidden = Float32(vectors * Uint32(8))
    row, turn = cta, Uint32(0)
    while row < tokens:
        offset = Uint64(row) * row_bytes

        # ---- Send the row, sanitised, to every other rank. Rows leave in rising order (rule R5).
        mine = [empty] * COLUMNS
        for column in range_constexpr(COLUMNS):
            if holds[column] & ~broken:
                at = offset + Uint64(place[column]) * Uint64(c.VECTOR_BYTES)
                mine[column] = sanitize(ptx.load(x + at))
                for peer in range_constexpr(ranks - 1):
                    # A lower rank has no place for its own rows, so that ours is one further down.
                    is_lower = Uint32(peer) >= Uint32(ranks - 1) - rank
                    source = rank - Uint32(is_lower)
                    ptx.store_relaxed_sys(peers[peer] + slot_at + Uint64(source) * source_bytes + at, mine[column])

        if turn == Uint32(0):
            # ---- Arrive, and let dependents start: only now, when the state has been advanced or will be by others.
            ok = ~broken
            if (warp == Uint32(0)) & ~broken:
                if lane == Uint32(0):
                    ok = count_in(block, epoch, launched, ctas, dirty_next, number)
                    if ~ok:
                        note_fault(shared, c.TWO_AT_ONCE, rank, Uint32(0), Uint32(0), Uint32(0), Uint32(0))
                    if (first_token != Uint32(0)) & (cta == Uint32(0)):
                        ptx.reduce_inc_relaxed_gpu(block + c.PROGRESS_OFFSET + c.LATER_AT, Uint32(c.EPOCHS - 1))
                ptx.sync_warp()
                if trigger_early != Uint32(0):
                    ptx.trigger_dependents()

            # ---- Clear our share of the stale slot.
            if ~broken:
                i = cta * threads + thread
                while i < dirty:
                    ptx.store(block + stale_at + Uint64(i) * Uint64(c.VECTOR_BYTES), empty)
                    i = i + ctas * threads

            # ---- Compare what peers have signed. What this finds is shared before anything is stored.
            if warp == Uint32(0):
                if (lane < Uint32(ranks)) & ok:
                    ok = peer_agrees(block, orders, shared, slot, lane, epoch, signed, numbers)
                elif lane >= Uint32(ranks):
                    ok = Boolean(True)
                if ptx.any_in_warp(~ok) & (lane == Uint32(0)):
                    ptx.store_shared(shared + POISONED * 4, Uint32(1))

        # ---- Receive: poll own slot until the row of every peer is there, and sum in rank order.
        z = [poison] * COLUMNS
        for column in range_constexpr(COLUMNS):
            if holds[column]:
                at = offset + Uint64(place[column]) * Uint64(c.VECTOR_BYTES)
                after = ptx.load(residual + at)
                s = poison
                if ~broken:
                    ready, v = receive(block, orders, shared, block + slot_at + at, source_bytes, ranks - 1)
                    s = pick(ready, sum_in_rank_order(v, mine[column], rank), poison)
                z[column] = numerics.add_residual(s, after)

        # ---- Reduce: the row's sum of squares. Two sets of words take turns, so that one wait a row is enough.
        sums_at = shared + SUMS * 4 + (turn & Uint32(1)) * Uint32(MOST_GROUPS * 4)
        for column in range_constexpr(COLUMNS):
            q = Float32(0.0)
            if holds[column]:
                q = numerics.square_sum(z[column])
            q = numerics.reduce_group(q)
            if lane == Uint32(0):
                ptx.store_shared(sums_at + (warp * Uint32(COLUMNS) + Uint32(column)) * Uint32(4), numerics.as_bits(q))
        ptx.sync_threads()
        groups = []
        for four in range_constexpr(MOST_GROUPS // 4):
            groups += [numerics.as_float(word) for word in ptx.load_shared_vector(sums_at + four * 16)]
        rstd = numerics.reciprocal_root(numerics.total(groups), hidden, numerics.as_float(eps))
        poisoned = ptx.load_shared(shared + POISONED * 4) != Uint32(0)

        # ---- Finish: the epilogue stores the outputs.
        for column in range_constexpr(COLUMNS):
            if holds[column]:
                at = offset + Uint64(place[column]) * Uint64(c.VECTOR_BYTES)
                low, high = poison, poison
                if weight_is_fp32 != Uint32(0):
                    low = ptx.load(weight + Uint64(place[column]) * Uint64(2 * c.VECTOR_BYTES))
                    high = ptx.load(weight + Uint64(place[column]) * Uint64(2 * c.VECTOR_BYTES) + c.VECTOR_BYTES)
                else:
                    both = ptx.load(weight + Uint64(place[column]) * Uint64(c.VECTOR_BYTES))
                    words = [numerics.as_bits(value) for value in numerics.unpack(both)]
                    low = (words[0], words[1], words[2], words[3])
                    high = (words[4], words[5], words[6], words[7])
                factors = [numerics.as_float(word) for word in (*low, *high)]
                norm = numerics.normalize(z[column], rstd, factors, numerics.as_float(weight_bias))
                ptx.store(residual_out + at, pick(poisoned, poison, z[column]))
                ptx.store(norm_out + at, pick(poisoned, poison, epilogue(norm)))

        row = row + ctas
        turn = turn + Uint32(1)

    # ---- Count out: clears come before it, for whoever learns that the call has finished. First report what was found.
    ptx.sync_threads()
    if thread == Uint32(0):
        ptx.fence_acq_rel_gpu()
        found = ptx.load_shared(shared + FOUND * 4)
        gave_up = ptx.load_shared(shared + GAVE_UP * 4)
        if (found != Uint32(0)) | (gave_up != Uint32(0)) | broken:
            since = Uint64(ptx.load_shared(shared + GAVE_UP_SINCE * 4))
            since = since | Uint64(ptx.load_shared(shared + (GAVE_UP_SINCE + 1) * 4)) << Uint64(32)
            fault = [ptx.load_shared(shared + (FOUND_PEER + i) * 4) for i in range(5)]
            code = found
            if found == Uint32(0):
                code = bits(gave_up != Uint32(0), gave_up, Uint32(c.PEER_FAULT))  # broken before we came
                fault = [Uint32(c.MAX_RANKS), Uint32(0), Uint32(0), Uint32(0), Uint32(0)]  # whom, is to be found out
            if (found != Uint32(0)) | (gave_up == Uint32(0)):
                since = ptx.global_timer_ns()
            report_fault(block, peers, record, orders, rank, epoch, call_tokens, description, eps, weight_bias, code, fault, since)
        ptx.reduce_add_relaxed_gpu(block + c.PROGRESS_OFFSET + c.FINISHED_AT, Uint32(1))


@cute.jit
def launch_one_shot(
    x: Uint64,
    residual: Uint64,
    norm_out: Uint64,
    residual_out: Uint64,
    weight: Uint64,
    block: Uint64,
    record: Uint64,
    orders: Uint64,
    slot_bytes: Uint64,
    peer_1: Uint64,
    peer_2: Uint64,
    peer_3: Uint64,
    peer_4: Uint64,
    peer_5: Uint64,
    peer_6: Uint64,
    peer_7: Uint64,
    rank: Uint32,
    tokens: Uint32,
    vectors: Uint32,
    first_token: Uint32,
    call_tokens: Uint32,
    description: Uint32,
    eps: Uint32,
    weight_bias: Uint32,
    weight_is_fp32: Uint32,
    number: Uint32,
    trigger_early: Uint32,
    threads: Uint32,
    ctas: Uint32,
    ranks: Constexpr,
    epilogue: Constexpr,
) -> None:
    """For the DSL, which compiles a kernel where it is launched. What is used of it is the kernel (launch.py)."""
    one_shot(
        x, residual, norm_out, residual_out, weight, block, record, orders, slot_bytes,
        peer_1, peer_2, peer_3, peer_4, peer_5, peer_6, peer_7,
        rank, tokens, vectors, first_token, call_tokens, description, eps, weight_bias, weight_is_fp32, number,
        trigger_early, ranks, epilogue,
    ).launch(grid=(ctas, 1, 1), block=(threads, 1, 1), max_number_threads=(MOST_THREADS, 1, 1), min_blocks_per_mp=1)  # fmt: skip
