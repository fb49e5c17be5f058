"""The floor of a cell: a time that no all-reduce over unicast NVLink can beat, as far as we know the machine.

    floor = gap + read + min(one-shot, two-shot) + reduction (not of a plain sum)
    one-shot = 1 hop  + (R - 1)     x bytes / rate
    two-shot = 2 hops + (R - 1) 2/R x bytes / rate          neither in a world of one, which sends nothing

gap:       what a kernel that does nothing adds where the call stands: in a chain, from one kernel to the next that PDL
           lets start early; between two GEMMs, which let nothing start early, what a trivial kernel takes there
           (yardstick/trivial has it for the machine and the day). It holds a kernel's launch and its end
read:      a call's input is what the kernel before it wrote, so reading it starts when that one has ended: one load
           that others wait for, from L2, or from memory where the cell says "cold"
hop:       from a store to a peer until a load that spins there has seen it; that load is part of the hop
rate:      what a kernel's stores to peers reach, one GPU sending and receiving; no kernel has reached the datasheet's
reduction: one sum over a row

Times of hop, reads and reduction are those of mnnvl_ar/tuning/machines.json. Gaps and rates, which nothing but the
floor goes by, are here, and where each is from. A class of machine that is not in both has no floor. Reading and
writing residual and norm, and all arithmetic, are left out, as they can overlap with the wire. So the floor is low on
purpose: it contains nothing that a better implementation could save.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.cells import Cell
from mnnvl_ar.tuning import machines
from mnnvl_ar.tuning.machines import Machine


@dataclass(frozen=True)
class Reach:
    """What a kernel gets of a machine: gaps in us by context, the rate in bytes a us."""

    chain_gap_us: float
    gemm_gap_us: float
    bytes_per_us: float

    def gap_us(self, context: str) -> float:
        return {"chain": self.chain_gap_us, "gemm": self.gemm_gap_us}[context]


# Measured on H200: the gap in a chain by stamps of successive calls (docs/log/2026-11-22-where-a-calls-time-goes.md), a
# trivial kernel between GEMMs (1.15 to 1.52 us), 357 to 365 GB/s by any kind of store (docs/log/2026-11-22-link.md).
_H200 = Reach(0.45, 1.3, 365e3)
# Not measured here: gaps as H200's. 669 GB/s by TMA on a B200 are published, and NCCL's own constant comes to 722.
_BLACKWELL = Reach(0.45, 1.3, 690e3)
REACH = {"h200": _H200, "b200": _BLACKWELL, "b300": _BLACKWELL, "gb200": _BLACKWELL, "gb300": _BLACKWELL}


@dataclass(frozen=True)
class Figures:
    """All that the floor of a machine is made of."""

    machine: Machine
    reach: Reach


def machine_of(name: str) -> Figures | None:
    """The figures of a machine as results name it ("8 x NVIDIA H200"); None for a class that nobody has figures of, and
    for a machine of two kinds."""
    kind = name.partition(" x ")[2]
    machine, reach = machines.known(kind), REACH.get(machines.machine_class(kind))
    return None if machine is None or reach is None else Figures(machine, reach)


H200 = Figures(machines.machine_of("NVIDIA H200"), _H200)


def floor_us(cell: Cell, figures: Figures) -> float:
    """The floor of `cell`, in us a call. The same on all ranks. A skew of the ranks is no part of it, as it is none of
    a call's time."""
    machine, reach = figures.machine, figures.reach
    read = machine.read_l2_us if cell.l2 == "warm" else machine.read_dram_us
    peers = cell.tp - 1
    one_shot = machine.hop_us + peers * cell.nbytes / reach.bytes_per_us
    two_shot = 2 * machine.hop_us + peers * 2 / cell.tp * cell.nbytes / reach.bytes_per_us
    wire = min(one_shot, two_shot) if peers else 0.0
    reduction = machine.reduction_us if cell.op != "plain" else 0.0
    return reach.gap_us(cell.context) + read + wire + reduction
