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

from cutlass import Boolean, Constexpr, Float32, Uint32, Uint64, cute, range_constexpr, select_

from mnnvl_ar.dsl import constants as c
from mnnvl_ar.dsl import numerics, ptx
from mnnvl_ar.dsl.constants import COLUMNS, MOST_GROUPS, MOST_THREADS
from mnnvl_ar.dsl.fault import must_give_up, note_fault, report_fault
from mnnvl_ar.dsl.ring import await_quiescence, count_in, is_quiescent, peer_agrees

Epilogue = Callable[[list[Float32]], ptx.Vector]


def rms_norm(norm: list[Float32]) -> ptx.Vector:
    """The epilogue of `all_reduce_rms_norm`: what is stored of a vector, given its eight elements of the norm in fp32.
    Of a NaN it has to make a NaN: that is all that tells a failed call."""
    return numerics.pack(norm)


def pick(condition: Boolean, v: ptx.Vector, other: ptx.Vector) -> ptx.Vector:
    return tuple(ptx.select(condition, a, b) for a, b in zip(v, other, strict=True))


def sanitize(v: ptx.Vector) -> ptx.Vector:
    """Rule R1: the sentinel is sent as 0."""
    sentinel = Uint32(c.SENTINEL)
    return tuple(ptx.select(word == sentinel, Uint32(0), word) for word in v)


def has_arrived(v: ptx.Vector) -> Boolean:
    """Rule R2: every word is looked at, as an integer."""
    sentinel = Uint32(c.SENTINEL)
    there = v[0] != sentinel
    for word in v[1:]:
        there = there & (word != sentinel)
    return there


# ---- Waiting for data


@cute.jit
def receive(
    block: Uint64, orders: Uint64, shared: Uint32, first: Uint64, stride: Uint64, others: Constexpr
) -> tuple[Boolean, list[ptx.Vector]]:
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


# fmt: off
@cute.kernel
def one_shot(
    # Addresses: of this launch's first row, of the weight, of the group's memory; blocks of peers in rotated order.
    x: Uint64, residual: Uint64, norm_out: Uint64, residual_out: Uint64, weight: Uint64,
    block: Uint64, record: Uint64, orders: Uint64, slot_bytes: Uint64,
    peer_1: Uint64, peer_2: Uint64, peer_3: Uint64, peer_4: Uint64, peer_5: Uint64, peer_6: Uint64, peer_7: Uint64,
    # Numbers: eps and weight_bias as bits of fp32.
    rank: Uint32, tokens: Uint32, vectors: Uint32, first_token: Uint32, call_tokens: Uint32, description: Uint32,
    eps: Uint32, weight_bias: Uint32, weight_is_fp32: Uint32, number: Uint32, trigger_early: Uint32,
    # Of the kernel.
    ranks: Constexpr, epilogue: Constexpr,
) -> None:
    # fmt: on
    # ---- Set-up: addresses, what the CTA shares.
    peers = [peer_1, peer_2, peer_3, peer_4, peer_5, peer_6, peer_7][: ranks - 1]
    thread, cta = Uint32(cute.arch.thread_idx()[0]), Uint32(cute.arch.block_idx()[0])
    threads, ctas = Uint32(cute.arch.block_dim()[0]), Uint32(cute.arch.grid_dim()[0])
    warp, lane = thread >> 5, thread & Uint32(31)
    shared = Uint32(cute.arch.alloc_smem(Uint32, c.SHARED_WORDS, alignment=16).toint())
    i = thread
    while i < Uint32(c.SHARED_WORDS):
        ptx.store_shared(shared + i * Uint32(4), Uint32(0))
        i = i + threads
    row_bytes = Uint64(vectors) * Uint64(c.VECTOR_BYTES)
    source_bytes = Uint64(tokens) * row_bytes
    place = [(warp * Uint32(COLUMNS) + Uint32(column)) * Uint32(c.GROUP) + lane for column in range(COLUMNS)]
    holds = [vector < vectors for vector in place]
    dirty_next = Uint32(ranks - 1) * tokens * vectors
    ptx.sync_threads()

    # ---- Enter: the predecessor has ended. One warp reads the state, for all of the CTA (rules R4 and R6).
    ptx.wait_for_predecessor()
    if warp == Uint32(0):
        state = ptx.load_relaxed_gpu(block + c.STATE_OFFSET)
        progress = ptx.load_relaxed_gpu(block + c.PROGRESS_OFFSET)
        quiescent = is_quiescent(state, progress)
        if ~quiescent:
            quiescent = await_quiescence(block, orders, shared)
            progress = ptx.load_relaxed_gpu(block + c.PROGRESS_OFFSET)  # an earlier call may have broken it
        if lane == Uint32(0):
            broken_now = (progress[1] != Uint32(0)) | ~quiescent
            ptx.store_shared_vector(shared + c.ENTRY * 4, (state[0], state[2], Uint32(broken_now), state[1]))
    ptx.sync_threads()
    epoch, dirty, is_broken, launched = ptx.load_shared_vector(shared + c.ENTRY * 4)
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
            board = Uint64(select_(thread == Uint32(peer), peers[peer], board))
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
                    ptx.store_shared(shared + c.POISONED * 4, Uint32(1))

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
        sums_at = shared + c.GROUP_SUMS * 4 + (turn & Uint32(1)) * Uint32(MOST_GROUPS * 4)
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
        poisoned = ptx.load_shared(shared + c.POISONED * 4) != Uint32(0)

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
        found = ptx.load_shared(shared + c.FOUND * 4)
        gave_up = ptx.load_shared(shared + c.GAVE_UP * 4)
        if (found != Uint32(0)) | (gave_up != Uint32(0)) | broken:
            since = Uint64(ptx.load_shared(shared + c.GAVE_UP_SINCE * 4))
            since = since | Uint64(ptx.load_shared(shared + (c.GAVE_UP_SINCE + 1) * 4)) << Uint64(32)
            fault = [ptx.load_shared(shared + (c.FOUND_FAULT + i) * 4) for i in range(5)]
            code = found
            if found == Uint32(0):
                code = ptx.select(gave_up != Uint32(0), gave_up, Uint32(c.PEER_FAULT))  # broken before we came
                fault = [Uint32(c.MAX_RANKS), Uint32(0), Uint32(0), Uint32(0), Uint32(0)]  # whom, is to be found out
            if (found != Uint32(0)) | (gave_up == Uint32(0)):
                since = ptx.global_timer_ns()
            call = [rank, epoch, call_tokens, description, eps, weight_bias]
            report_fault(block, peers, record, orders, call, code, fault, since)
        ptx.reduce_add_relaxed_gpu(block + c.PROGRESS_OFFSET + c.FINISHED_AT, Uint32(1))


# fmt: off
@cute.jit
def launch_one_shot(
    # Addresses: of this launch's first row, of the weight, of the group's memory; blocks of peers in rotated order.
    x: Uint64, residual: Uint64, norm_out: Uint64, residual_out: Uint64, weight: Uint64,
    block: Uint64, record: Uint64, orders: Uint64, slot_bytes: Uint64,
    peer_1: Uint64, peer_2: Uint64, peer_3: Uint64, peer_4: Uint64, peer_5: Uint64, peer_6: Uint64, peer_7: Uint64,
    # Numbers: eps and weight_bias as bits of fp32.
    rank: Uint32, tokens: Uint32, vectors: Uint32, first_token: Uint32, call_tokens: Uint32, description: Uint32,
    eps: Uint32, weight_bias: Uint32, weight_is_fp32: Uint32, number: Uint32, trigger_early: Uint32,
    threads: Uint32, ctas: Uint32, ranks: Constexpr, epilogue: Constexpr,
) -> None:
    """For the DSL, which compiles a kernel where it is launched. What is used of it is the kernel (launch.py)."""
    one_shot(
        x, residual, norm_out, residual_out, weight, block, record, orders, slot_bytes,
        peer_1, peer_2, peer_3, peer_4, peer_5, peer_6, peer_7,
        rank, tokens, vectors, first_token, call_tokens, description,
        eps, weight_bias, weight_is_fp32, number, trigger_early, ranks, epilogue,
    ).launch(
        grid=(ctas, 1, 1), block=(threads, 1, 1), max_number_threads=(MOST_THREADS, 1, 1), min_blocks_per_mp=1
    )
