"""One entry a host, out of what each rank sees of its machine.

Ranks of one host may each be in a container of their own that shows one GPU only and has a name of its own, or have an
environment of their own.
"""

from __future__ import annotations

from typing import Any

from mnnvl_ar.doctor.selftest import ranks as ranks_text
from mnnvl_ar.memory.hosts import kernel_of

# What a machine says of each two GPUs, in the order of its own, and what is said of a pair that no rank sees.
BETWEEN = {"p2p": None, "p2p_atomics": None, "links": None, "p2p_refusals": ""}


def hosts(machines: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the machines by rank. As `machine.examine` has it, of the host's lowest rank, but with `ranks`; the GPUs of
    all its ranks, each with the `ranks` that use it; the matrices `BETWEEN` by place in `gpus`; variables that differ
    told by rank; any rank's refusal of multicast; and the IMEX channels that all ranks see."""
    by_kernel: dict[str, dict[int, dict[str, Any]]] = {}
    for rank, machine in sorted(machines.items()):
        by_kernel.setdefault(kernel_of(machine["identity"]), {})[rank] = machine
    return [_host(here) for here in by_kernel.values()]


def members(machines: dict[int, dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """The ranks of a group of `size`, as bring-up would see them: host (identity), gpu (None if there is none to use),
    refusal, confidential. If there are as many ranks as that, they are those; else all GPUs are dealt out in turn."""
    if size == len(machines):
        return [_member(machine, machine["uses"]) for _, machine in sorted(machines.items())]
    seats: dict[str, dict[str, Any]] = {}
    for _, machine in sorted(machines.items()):
        for index, gpu in enumerate(machine["gpus"] if machine["uses"] is not None else []):
            seats.setdefault(gpu["uuid"], _member(machine, index))
    dealt = list(seats.values()) or [_member(machine, None) for _, machine in sorted(machines.items())]
    return [dealt[rank % len(dealt)] for rank in range(size)] if dealt else []


def _member(machine: dict[str, Any], index: int | None) -> dict[str, Any]:
    confidential = (machine["confidential_computing"] or {}).get("on", False)
    about = {"host": machine["identity"], "refusal": machine["multicast_refusal"], "confidential": confidential}
    return {**about, "gpu": None if index is None else machine["gpus"][index]}


def _host(machines: dict[int, dict[str, Any]]) -> dict[str, Any]:
    first = next(iter(machines.values()))
    channels = [set(machine["imex"]["channels"]) for machine in machines.values()]
    gpus: dict[str, dict[str, Any]] = {}
    between: dict[str, dict[tuple[str, str], Any]] = {what: {} for what in BETWEEN}
    for rank, machine in machines.items():
        names = [gpu["uuid"] for gpu in machine["gpus"]]
        for index, gpu in enumerate(machine["gpus"]):
            entry = gpus.setdefault(gpu["uuid"], {**gpu, "index": len(gpus), "ranks": []})
            if machine["uses"] == index:
                entry["ranks"].append(rank)
        for what, pairs in between.items():
            for a, row in zip(names, machine[what], strict=True):
                pairs |= {(a, b): said for b, said in zip(names, row, strict=True)}
    return {
        **first,
        "ranks": list(machines),
        "gpus": list(gpus.values()),
        **{what: [[between[what].get((a, b), unseen) for b in gpus] for a in gpus] for what, unseen in BETWEEN.items()},
        "environment": _environment(machines),
        "multicast_refusal": next(filter(None, (m["multicast_refusal"] for m in machines.values())), ""),
        "imex": {**first["imex"], "channels": sorted(set.intersection(*channels))},
    }


def _environment(machines: dict[int, dict[str, Any]]) -> dict[str, str]:
    told: dict[str, str] = {}
    for name in dict.fromkeys(name for machine in machines.values() for name in machine["environment"]):
        where: dict[str, list[int]] = {}
        for rank, machine in machines.items():
            where.setdefault(machine["environment"].get(name, "(not set)"), []).append(rank)
        alike = len(where) == 1
        told[name] = "; ".join(value if alike else f"{value} on {ranks_text(who)}" for value, who in where.items())
    return told
