"""What a call costs where nobody measured: launch, hops, and bytes over the link. It yields the crossover.

Seconds are not its business, only which strategy is the quicker one: launch and the work on the rows are the same for
both and cancel. What two-shot pays for a shorter message is one more hop and one more wait; what it saves is egress.

Multicast changes neither: it relieves egress, but all that the peers send still has to come in, and that is
(R - 1) messages by one-shot and 2 (R - 1) / R by two-shot, as is egress over unicast.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """Times in microseconds; egress and ingress in bytes a microsecond, of one GPU."""

    launch: float
    hop: float
    stage: float
    egress: float
    ingress: float


H200 = Machine(
    launch=0.40,  # an empty kernel in a graph chain with PDL, measured
    hop=0.61,  # a store over NVLink until the peer sees it, half of a ping-pong, measured
    stage=0.30,  # one more wait: a poll period as in docs/performance.md, "What bounds it"
    egress=450e3,  # NV18 by its datasheet, each direction
    ingress=450e3,
)
# Fifth-generation NVLink by its datasheet; nothing of it was measured here, and latency counts as H200's.
BLACKWELL = Machine(launch=H200.launch, hop=H200.hop, stage=H200.stage, egress=900e3, ingress=900e3)

MACHINES = {"b200": BLACKWELL, "b300": BLACKWELL, "gb200": BLACKWELL, "gb300": BLACKWELL}

# Two ranks send as many bytes either way, and one rank alone sends none: two-shot has nothing to save there.
ANY_BYTES = 1 << 30


def one_shot_us(machine: Machine, world_size: int, nbytes: float) -> float:
    """Of a message of `nbytes` a rank: one hop, and all of it to every peer."""
    return machine.launch + machine.hop + _wire_us(machine, (world_size - 1) * nbytes)


def two_shot_us(machine: Machine, world_size: int, nbytes: float) -> float:
    """Two hops: a share to its owner, and its sum to every peer."""
    wire = _wire_us(machine, 2 * (world_size - 1) / world_size * nbytes)
    return machine.launch + 2 * machine.hop + machine.stage + wire


def one_shot_bytes(machine: Machine, world_size: int) -> int:
    """The largest message for which one-shot is the quicker one."""
    if world_size <= 2:
        return ANY_BYTES
    saved = _wire_us(machine, (world_size - 1) * (1 - 2 / world_size))  # by two-shot, a byte
    paid = machine.hop + machine.stage
    return int(paid / saved)


def _wire_us(machine: Machine, nbytes: float) -> float:
    """Links carry both directions at once."""
    return nbytes / min(machine.egress, machine.ingress)
