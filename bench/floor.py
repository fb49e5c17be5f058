"""The floor of a cell: a time that no all-reduce over unicast NVLink can beat, as far as we know the machine.

    floor = launch + read + min(one-shot, two-shot) + reduction (fused only) + write
    one-shot = 1 hop  + (R - 1)     x bytes / link
    two-shot = 2 hops + (R - 1) 2/R x bytes / link

launch:    one empty kernel in a graph chain, with programmatic dependent launch
read:      a call's input is what its predecessor wrote, so reading it starts when that has ended: one dependent load
hop:       store at a peer -> seen by a load that spins there; the load that finds it is part of it
link:      what one GPU can send (and, at the same time, receive), by its datasheet
reduction: one sum over a row: shuffles, a trip through shared memory and a barrier, shuffles
write:     a kernel has ended, for the one that waits for it, when L2 has acknowledged its stores

Left out, as they can overlap with the wire: reading and writing residual and norm, and all arithmetic. So the floor is
low on purpose; nothing that is a matter of skill is in it. A class of machine that is not in MACHINES has no floor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bench.cells import Cell
from mnnvl_ar.tuning.files import machine_class


@dataclass(frozen=True)
class Machine:
    """Times in us, rate in bytes a us. The figures of a class of machine, here once and nowhere else."""

    launch: float
    hop: float
    read_l2: float
    read_dram: float
    reduction: float
    write: float
    link: float


# launch, hop: measured on eight H200 (docs/performance.md). read, reduction: cycles of a dependent load that hits L2
# (270) or misses it (650), and of the row sum (200), at 1.98 GHz; `python -m bench.probe` measures the first. link:
# NV18, datasheet.
H200 = Machine(launch=0.40, hop=0.61, read_l2=0.14, read_dram=0.33, reduction=0.10, write=0.14, link=450e3)
# NVLink 5 by its datasheet: 900 GB/s each way and GPU. All else is what H200 measured, as nothing better is known here.
BLACKWELL = replace(H200, link=900e3)

MACHINES = {"h200": H200, "b200": BLACKWELL, "b300": BLACKWELL, "gb200": BLACKWELL, "gb300": BLACKWELL}


def machine_of(name: str) -> Machine | None:
    """The figures of a machine as results name it ("8 x NVIDIA H200"); None for a class that nobody put in MACHINES, so
    also for a machine of two kinds."""
    return MACHINES.get(machine_class(name.partition(" x ")[2]))


def floor_us(cell: Cell, machine: Machine) -> float:
    """The floor of `cell`, in us a call. The same on all ranks."""
    read = machine.read_l2 if cell.l2 == "warm" else machine.read_dram
    peers = cell.tp - 1
    one_shot = machine.hop + peers * cell.nbytes / machine.link
    two_shot = 2 * machine.hop + peers * 2 / cell.tp * cell.nbytes / machine.link
    wire = min(one_shot, two_shot) if peers else 0.0
    return machine.launch + read + wire + (machine.reduction if cell.op == "fused" else 0.0) + machine.write
