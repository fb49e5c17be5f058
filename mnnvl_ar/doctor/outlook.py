"""What a group would get on what was found, and why."""

from __future__ import annotations

from typing import Any

from mnnvl_ar.memory.hosts import kernel_of
from mnnvl_ar.memory.multicast import obstacle
from mnnvl_ar.tuning import table_of

NONE = "none"


def of(members: list[dict[str, Any]]) -> dict[str, Any]:
    """{ranks, transport, why, strategy} of a group of `merge.members`, as `Workspace` would choose them; transport
    "none" if it would fail. Multicast is not tried out, so what is said of it holds if bring-up's own proof succeeds.
    """
    transport, why = _transport(members)
    gpu = next((member["gpu"] for member in members if member["gpu"]), None)
    table = table_of(gpu["name"] if gpu else "host", len(members)) if members else ""
    return {"ranks": len(members), "transport": transport, "why": why, "strategy": str(table)}


def _transport(members: list[dict[str, Any]]) -> tuple[str, str]:
    several = len({kernel_of(member["host"]) for member in members}) > 1  # as bring-up goes by it
    without = [rank for rank, member in enumerate(members) if not member["gpu"]]
    if not members:
        return NONE, "no rank was heard of"
    if len(without) == len(members):
        if several:
            return NONE, "no GPU can be used, and the host transport joins processes of one host only"
        return "host", "no GPU can be used"
    if without:
        return NONE, f"rank {without[0]} can use no GPU, others can"
    limited = [rank for rank, member in enumerate(members) if not member["gpu"]["fabric_handles"]]
    if several and limited:
        return NONE, f"several hosts need fabric handles, which the GPU of rank {limited[0]} does not have"
    if several:
        handle = "fabric handles only, as file descriptors do not cross hosts"
    elif limited:
        handle = "file descriptors"
    else:
        handle = "fabric handles first, else file descriptors"
    traits = [
        {**{key: m["gpu"][key] for key in ("name", "multicast")}, "uid": m["gpu"]["uuid"], "refusal": m["refusal"]}
        for m in members
    ]
    _, why_not = obstacle(traits)  # what bring-up asks
    if why_not:
        return "unicast", f"{why_not}; {handle}"
    if any(member["confidential"] for member in members):
        handle += "; confidential computing is on, under which drivers are known to refuse multicast"
    return "multicast if its bring-up succeeds, else unicast", f"all GPUs have multicast; {handle}"
