"""Machines that are not here, as `mnnvl_ar.doctor.machine.examine` would find them, and what the doctor reports."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from common.simulated_nvml import UUIDS
from mnnvl_ar.doctor import machine, merge, outlook
from mnnvl_ar.doctor.problems import problems

MACHINE = {**machine.examine(), "driver_error": "", "multicast_refusal": "", "environment": {}}


def gpu(n: int, **more: Any) -> dict[str, Any]:
    traits = {"multicast": True, "fabric_handles": True, "fd_handles": True}
    traits |= {"nvlinks": 18, "fabric": None, "mig": False}
    return {"index": 0, "name": "G", "uuid": UUIDS[n], "capability": "9.0", "memory": 141 << 30, **traits, **more}


def between(count: int, *, link: str = "NV18", unreached: Collection[tuple[int, int]] = ()) -> dict[str, Any]:
    """The matrices of so many GPUs: all linked alike, and all but `unreached` pairs with peer access and atomics."""
    reaches = [[(min(a, b), max(a, b)) not in unreached for b in range(count)] for a in range(count)]
    links = [[None if a == b else link for b in range(count)] for a in range(count)]
    refusals = [[""] * count for _ in range(count)]
    return {"p2p": reaches, "p2p_atomics": reaches, "links": links, "p2p_refusals": refusals}


def here(*gpus: dict[str, Any], host: str = "a", uses: int | None = 0, **more: Any) -> dict[str, Any]:
    about = {"host": host, "identity": f"{host}/boot-{host}/1", "gpus": list(gpus), "uses": uses if gpus else None}
    about |= {"imex": {"channels": ["channel0"], "config": True}, **between(len(gpus))}
    about |= {"torch": {"version": "2", "cuda": "13.0", "python": "3.11"}}
    about |= {"library": {"path": "_C.so", "architectures": ["sm_90"]}}
    return {**MACHINE, **about, **more}


def report(
    machines: dict[int, dict[str, Any]], size: int = 0, self_test: dict[str, Any] | None = None
) -> dict[str, Any]:
    size = size or len(machines)
    found = {
        "hosts": merge.hosts(machines),
        "self_test": self_test or {"ran": False},
        "world_size": size,
        "missing": [],
        "servers": [],
    }
    found["outlook"] = outlook.of(merge.members(machines, size))
    found["problems"] = problems(found)
    json.dumps(found)
    return found
