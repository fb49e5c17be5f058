"""What a group would get on what was found, and why; and what stands in its way."""

from __future__ import annotations

from typing import Any

from mnnvl_ar.strategy import table_of


def of(hosts: list[dict[str, Any]], group_size: int) -> dict[str, Any]:
    """Transport and strategy of a group of `group_size` ranks (0: one a GPU, or 2 without any), as `Workspace` would
    choose them. Multicast is not tried out, so what is said of it holds if bring-up's own proof succeeds."""
    gpus = [gpu for host in hosts for gpu in host["gpus"]]
    size = group_size or len(gpus) or 2
    if not gpus:
        why = hosts[0]["driver_error"] or "no GPU is visible"
        return {
            "ranks": size,
            "transport": "host",
            "why": f"{why}; device='cpu' works on one host",
            "strategy": str(table_of("host", size)),
        }
    handle = "fabric handles" if all(gpu["fabric_handles"] for gpu in gpus) else "file descriptors"
    if len(hosts) > 1:
        handle = "fabric handles (file descriptors do not cross hosts)"
    transport, why = "multicast if its bring-up succeeds, else unicast", f"all GPUs have multicast; {handle} first"
    refusals = [(h["host"], h["multicast_refusal"]) for h in hosts if h["multicast_refusal"]]
    without = [gpu["name"] for gpu in gpus if not gpu["multicast"]]
    if refusals:
        transport, why = "unicast", f"multicast is switched off on {refusals[0][0]} by {refusals[0][1]}; {handle} first"
    elif without:
        transport, why = "unicast", f"{without[0]} has no multicast; {handle} first"
    elif size < 2:
        transport, why = "unicast", "multicast needs more than one rank"
    return {"ranks": size, "transport": transport, "why": why, "strategy": str(table_of(gpus[0]["name"], size))}


def problems(found: dict[str, Any]) -> list[str]:
    """What keeps a group from working, a line each, with what to do."""
    lines: list[str] = []
    for host in found["hosts"]:
        name, gpus, codes = host["host"], host["gpus"], host["library"]["architectures"]
        if gpus and not codes:
            lines.append(f"{name}: this build has no CUDA code; build it where there is an nvcc")
        for gpu in gpus:
            major = int(gpu["capability"].split(".")[0])
            runs = any(c.startswith(f"sm_{major}") or (c == "compute_90" and major >= 9) for c in codes)
            if codes and not runs:
                lines.append(f"{name}: GPU {gpu['index']} is {gpu['capability']}, this build has {', '.join(codes)}")
        if gpus and host["torch"]["cuda"] is None:
            lines.append(f"{name}: PyTorch {host['torch']['version']} is a build without CUDA")
        for a, row in enumerate(host["p2p"]):
            for b, reaches in enumerate(row):
                if not reaches and a < b:
                    lines.append(f"{name}: GPUs {a} and {b} cannot reach each other's memory (P2P); keep them apart")
    if len(found["hosts"]) > 1 and not all(gpu["fabric_handles"] for h in found["hosts"] for gpu in h["gpus"]):
        lines.append("several hosts need fabric handles, which not all GPUs have (MNNVL domain, IMEX service)")
    test = found["self_test"]
    if not test.get("ok", True):
        lines.append(f"self-test: {test['error']}")
    return lines
