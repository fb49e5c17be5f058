"""What a call costs on a machine where nothing was measured: launch, hops, and bytes over the link. From this follows
the crossover between the strategies.

It is not there to predict times, only to tell which strategy is the quicker one: launch and the work on the rows are
the same for both and cancel. Two-shot sends less, and pays for it with one more hop and one more wait.

Multicast changes neither: it relieves egress, but all that the peers send still has to come in, and that is
(R - 1) messages by one-shot and 2 (R - 1) / R by two-shot, as is egress over unicast.
"""

from __future__ import annotations

from .machines import Machine

# Two ranks send as many bytes either way, and one rank alone sends none: two-shot has nothing to save there.
ANY_BYTES = 1 << 30


def one_shot_us(machine: Machine, world_size: int, nbytes: float) -> float:
    """For a message of `nbytes` a rank: one hop, and all of it to every peer."""
    wire = (world_size - 1) * nbytes / machine.crossover_bytes_per_us
    return machine.launch_us + machine.hop_us + wire


def two_shot_us(machine: Machine, world_size: int, nbytes: float) -> float:
    """Two hops: a share of the message to its owner, and the share's sum to every peer."""
    wire = 2 * (world_size - 1) / world_size * nbytes / machine.crossover_bytes_per_us
    return machine.launch_us + 2 * machine.hop_us + machine.stage_us + wire


def one_shot_bytes(machine: Machine, world_size: int) -> int:
    """The largest message for which one-shot is the quicker one."""
    if world_size <= 2:
        return ANY_BYTES
    saved = (world_size - 1) * (1 - 2 / world_size) / machine.crossover_bytes_per_us  # by two-shot, for each byte
    paid = machine.hop_us + machine.stage_us
    return int(paid / saved)
