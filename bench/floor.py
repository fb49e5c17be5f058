"""The floor of a cell: a time that no all-reduce over unicast NVLink can beat, as far as we know the machine.

    floor = launch + read + min(one-shot, two-shot) + reduction (fused only) + write
    one-shot = 1 hop  + (R - 1)     x bytes / link
    two-shot = 2 hops + (R - 1) 2/R x bytes / link

launch:    one empty kernel in a chain of a graph, with programmatic dependent launch
read:      a call's input is what the kernel before it wrote, so reading it starts when that one has ended: one load
           that others wait for, from L2, or from memory where the cell says "cold"
hop:       from a store to a peer until a load that spins there has seen it; that load is part of the hop
link:      what one GPU can send and, at the same time, receive
reduction: one sum over a row
write:     for a kernel that waits for this one, this one has ended when L2 has acknowledged its stores

The figures, and where each is from, are in mnnvl_ar/tuning/machines.json; a class of machine that is not there has no
floor. Reading and writing residual and norm, and all arithmetic, are left out, as they can overlap with the wire. So
the floor is low on purpose: it contains nothing that a better implementation could save.
"""

from __future__ import annotations

from bench.cells import Cell
from mnnvl_ar.tuning import machines
from mnnvl_ar.tuning.machines import Machine

H200 = machines.machine_of("NVIDIA H200")


def machine_of(name: str) -> Machine | None:
    """The figures of a machine as results name it ("8 x NVIDIA H200"); None for a class that nobody has figures of, and
    for a machine of two kinds."""
    return machines.known(name.partition(" x ")[2])


def floor_us(cell: Cell, machine: Machine) -> float:
    """The floor of `cell`, in us a call. The same on all ranks."""
    read = machine.read_l2_us if cell.l2 == "warm" else machine.read_dram_us
    peers = cell.tp - 1
    one_shot = machine.hop_us + peers * cell.nbytes / machine.bytes_per_us
    two_shot = 2 * machine.hop_us + peers * 2 / cell.tp * cell.nbytes / machine.bytes_per_us
    wire = min(one_shot, two_shot) if peers else 0.0
    reduction = machine.reduction_us if cell.op != "plain" else 0.0
    return machine.launch_us + read + wire + reduction + machine.write_us
