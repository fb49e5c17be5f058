"""How many polling loads are under way before the first of them is waited for, by the machine code of a kernel.

A load sets a scoreboard, one of six, and whoever uses what it loads waits for that scoreboard; both stand in the
encoding of each instruction, where ptxas has put them. A wave is what is loaded up to such a wait. So a world of R
ranks waits for one latency a wave, and not for one a load.

Contract
  * `waves(kernel)`: for each poll loop, the largest number of its polling loads that are under way at once.
  * It takes a loop's instructions in the order of their addresses, as they run where every load is made.
"""

from __future__ import annotations

import re

from common import sass

NO_BARRIER = 7
APART = 80  # instructions between two looks
SHIFT = (
    41  # of the control bits, in the upper half of the encoding: stall (4), yield (1), barriers set (3 + 3), waits (6)
)


def sets_scoreboard(one: sass.Instruction) -> int | None:
    """The scoreboard that tells when what the instruction writes is there."""
    number = _control(one) >> 5 & 7
    return None if number == NO_BARRIER else number


def waits_for(one: sass.Instruction) -> set[int]:
    mask = _control(one) >> 11 & 0x3F
    return {number for number in range(6) if mask >> number & 1}


def waves(kernel: sass.Kernel) -> list[int]:
    return [largest_wave([kernel.code[i] for i in sorted(loop)]) for loop in sass.poll_loops(kernel)]


def first_looks(kernel: sass.Kernel) -> list[tuple[int, int]]:
    """Of the looks that ptxas has taken out of the loops: polling loads that belong together, and how many waves they
    are. Those that stand alone are left out."""
    inside: set[int] = set().union(*sass.poll_loops(kernel))
    looks: list[list[int]] = []
    for i, one in enumerate(kernel.code):
        if one.is_poll and i not in inside:
            if not looks or i - looks[-1][-1] > APART:
                looks.append([])
            looks[-1].append(i)
    return [(len(look), _waves_of(kernel.code[look[0] : look[-1] + 1])) for look in looks if len(look) > 1]


def _waves_of(instructions: list[sass.Instruction]) -> int:
    count, pending = 1, set[int | None]()
    for one in instructions:
        if pending & waits_for(one):
            count, pending = count + 1, set()
        if one.is_poll:
            pending.add(sets_scoreboard(one))
    return count


def state_is_awaited_late(kernel: sass.Kernel) -> bool:
    """Whether the entry warp sets its mbarrier up before it waits for the ring's state, which it asked for first."""
    first = next(i for i, one in enumerate(kernel.code) if one.opcode.startswith("LDG.E.128.STRONG.GPU"))
    second = next(i for i, one in enumerate(kernel.code) if i > first and ".STRONG.GPU" in one.opcode)
    set_up = next(i for i, one in enumerate(kernel.code) if i > first and one.opcode.startswith("SYNCS.EXCH"))
    wanted = {sets_scoreboard(kernel.code[first]), sets_scoreboard(kernel.code[second])}
    on_the_way = sass.that_reach(set_up, sass.body(kernel))  # not where a call is refused, which may stand in between
    between = (kernel.code[i] for i in on_the_way if first < i < set_up and i != second)
    return not any(wanted & waits_for(one) for one in between)


def largest_wave(instructions: list[sass.Instruction]) -> int:
    most = 0
    pending: dict[str, int | None] = {}  # what is being loaded -> its scoreboard
    count = 0
    for one in instructions:
        if any(number in waits_for(one) for number in pending.values()) or pending.keys() & _read(one):
            pending, count = {}, 0
        if one.is_poll:
            first = re.match(r"R(\d+)", one.operands)
            if first is None:
                raise ValueError(f"{one}: loads into no register")
            pending |= {f"R{int(first[1]) + i}": sets_scoreboard(one) for i in range(4)}
            count += 1
            most = max(most, count)
    return most


def _control(one: sass.Instruction) -> int:
    if one.control is None:
        raise ValueError(f"{one}: its encoding was not read")
    return one.control >> SHIFT


def _read(one: sass.Instruction) -> set[str]:
    """Registers read, but for those that a load's first operand is."""
    operands = one.operands.split(",", 1)[1] if one.is_poll else one.operands
    return set(re.findall(r"\bR\d+\b", operands))
