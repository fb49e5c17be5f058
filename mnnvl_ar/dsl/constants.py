"""What both implementations must have alike: offsets, words and numbers of `csrc/protocol`, by their names there.

Plain integers, so that the launcher, which has no DSL, reads them too. tests/unit/test_twin.py compiles the headers and
compares every one of the first part.
"""

# layout.h
VECTOR_BYTES = 16
STATE_OFFSET = 0
PROGRESS_OFFSET = 16
ARRIVED_AT = 12  # in State
FINISHED_AT, BROKEN_AT, CLAIMED_AT, LATER_AT = 0, 4, 8, 12  # in Progress
BOARD_OFFSET = 1024
MAX_RANKS = 72
ONE_BOARD_BYTES = 3456
CONTROL_BYTES = 16384

# ring.h
SLOTS = 3
EPOCHS = 0xFFFFFFFF
NO_EPOCH = 0xFFFFFFFF
ARRIVAL_BITS = 13
MAX_GRID = 8191
ARRIVAL_FACTOR = 0x9E3779B1  # in arrival()

# sentinel.h, numerics.h, numerics_base.h
SENTINEL = 0x80000000
GROUP = 32  # vectors that are summed by a butterfly
SUMS = 4
POISON = 0x7FFFFFFF  # a NaN
POISON_PAIR = 0x7FFF7FFF  # two of bf16

# fault.h: codes, FaultRecord, Orders
PEER_TIMEOUT, CALL_MISMATCH, PEER_FAULT, OVERLAP, TWO_AT_ONCE = 1, 2, 3, 4, 7
MARK_CODE_AT, MARK_RANK_AT = 8, 16  # in peer_mark()
RECORD = {
    "code": 0,
    "rank": 4,
    "epoch": 8,
    "tokens": 12,
    "description": 16,
    "numbers.eps": 20,
    "numbers.weight_bias": 24,
    "peer": 28,
    "peer_tokens": 32,
    "peer_description": 36,
    "peer_numbers.eps": 40,
    "peer_numbers.weight_bias": 44,
    "began_ns": 48,
    "ended_ns": 56,
    "last_epoch": 64,
}
ORDERS = {"deadline_ns": 0, "hold_ns": 8, "answered": 16}

# signature.h
STRATEGY_AT = 6  # in a description; 0 is one-shot

# kernels/fault.cuh
FAST_POLLS = 1024

# Of this kernel alone: how a row lies on the threads of its CTA.
COLUMNS = 2  # vectors of a row that a thread holds, a group apart
MOST_THREADS = 512  # leaves each 128 registers
MOST_GROUPS = MOST_THREADS // 32 * COLUMNS  # of a row
# What the threads of a CTA share, in words from the start of its shared memory.
ENTRY = 0  # epoch, dirty, broken, launched: as the first warp found them
GAVE_UP, GAVE_UP_SINCE = 4, 6  # code of the first wait that was given up, and when it began, in two words
FOUND, FOUND_FAULT = 5, 8  # code of another fault; and peer, peer_tokens, peer_description, eps, weight_bias
POISONED = 13  # non-zero: outputs must be NaN
GROUP_SUMS = 16  # two sets that take turns
SHARED_WORDS = GROUP_SUMS + 2 * MOST_GROUPS

# What there is.
DSL = "4.8.1"  # the version that the extra pins: others have no rounding, or other bits
WORLD_SIZES = (2, 4, 8)
ARCHITECTURES = {(9, 0): "sm_90a", (10, 0): "sm_100a"}  # by compute capability
MOST_HIDDEN = MOST_GROUPS * GROUP * 8


def threads_for(vectors: int) -> int:
    """Of a CTA, for rows of so many vectors: whole warps, each of COLUMNS groups."""
    return -(-vectors // (GROUP * COLUMNS)) * 32
