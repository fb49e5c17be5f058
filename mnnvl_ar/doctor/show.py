"""What was found, as text for people."""

from __future__ import annotations

from typing import Any


def text(found: dict[str, Any]) -> str:
    lines: list[str] = []
    for host in found["hosts"]:
        lines += [*_host(host), ""]
    plan, test = found["outlook"], found["self_test"]
    lines.append(f"A group of {plan['ranks']} would get transport {plan['transport']}: {plan['why']}.")
    lines.append(f"  strategy auto: {plan['strategy']}")
    if not test.get("ran"):
        lines.append("Self-test: not run.")
    elif test["ok"]:
        where = "GPU" if test["device"] == "cuda" else "host"
        lines.append(f"Self-test of {test['ranks']} {where} ranks: all bits right ({test['transport_reason']}).")
        size = f"{test['message_bytes'] / 1e6:.2f} MB"
        speed = f"{test['bandwidth_gb_s']:.2f} GB/s of {size} messages"
        lines.append(f"  {test['latency_us']:.1f} us a call of one row, {speed}")
    lines += [f"PROBLEM: {line}" for line in found["problems"]] or ["No problem found."]
    return "\n".join(lines)


def _host(host: dict[str, Any]) -> list[str]:
    torch, library, box = host["torch"], host["library"], host["container"]
    codes = ", ".join(library["architectures"]) or "none: host transport only"
    driver = host["driver"] or "not loaded"
    api = f", CUDA {host['driver_api'] // 1000}.{host['driver_api'] % 1000 // 10}" if "driver_api" in host else ""
    marks = ", ".join(box["marks"]) or "no sign of one"
    imex = f"{len(host['imex']['channels'])} channels" if host["imex"]["channels"] else "no channel visible"
    refusal = host["multicast_refusal"]
    lines = [
        f"Host {host['host']}: PyTorch {torch['version']} (CUDA {torch['cuda'] or 'none'}), Python {torch['python']}",
        f"  library    GPU code: {codes}",
        f"  driver     {driver}{api}",
        f"  IMEX       {imex}",
        f"  multicast  {f'switched off by {refusal}' if refusal else 'allowed by the environment'}",
        f"  container  {marks}; /dev/shm {box['shm_bytes'] >> 20} MiB, {box['cpus']} CPUs",
    ]
    lines += [f"  variable   {name}={value}" for name, value in host["environment"].items()]
    if host["driver_error"]:
        lines.append(f"  GPUs       none ({host['driver_error']})")
    for gpu in host["gpus"]:
        about = [f"capability {gpu['capability']}", f"{gpu['memory'] >> 30} GiB"]
        about.append("multicast" if gpu["multicast"] else "no multicast")
        about.append("fabric handles" if gpu["fabric_handles"] else "no fabric handles")
        links = gpu.get("nvlinks")
        about.append("NVLinks unknown (no nvidia-ml-py)" if links is None else f"{links} NVLinks")
        if gpu.get("fabric"):
            about.append(f"fabric state {gpu['fabric']['state']}, status {gpu['fabric']['status']}")
        lines.append(f"  GPU {gpu['index']}      {gpu['name']}: {', '.join(about)}")
    if len(host["p2p"]) > 1:
        lines.append(
            "  P2P        " + " ".join("".join("x" if reaches else "." for reaches in row) for row in host["p2p"])
        )
    return lines
