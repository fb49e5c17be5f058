"""What keeps a group from working, a line each, with what to do."""

from __future__ import annotations

from typing import Any

from mnnvl_ar.doctor.outlook import NONE

IMEX = "/dev/nvidia-caps-imex-channels"


def problems(found: dict[str, Any]) -> list[str]:
    """Of a report with hosts, outlook and self_test."""
    lines = [line for host in found["hosts"] for line in _of_host(host)]
    plan = found["outlook"]
    if plan["transport"] == NONE:
        lines.append(f"a group of these ranks cannot be made: {plan['why']}")
    if len(found["hosts"]) > 1:
        for host in found["hosts"]:
            if host["gpus"] and not host["imex"]["channels"]:
                lines.append(
                    f"{host['host']}: no IMEX channel, without which GPUs of several hosts cannot share memory; make "
                    f"{IMEX}/channel0 visible here (in the container, too), and run nvidia-imex on all hosts"
                )
    return lines + [f"self-test, {error}" for error in found["self_test"].get("errors", [])]


def _of_host(host: dict[str, Any]) -> list[str]:
    name, gpus, codes = host["host"], host["gpus"], host["library"]["architectures"]
    lines: list[str] = []
    if gpus and not codes:
        lines.append(f"{name}: this build has no GPU code; build it where there is an nvcc")
    for gpu in gpus:
        major = int(gpu["capability"].split(".")[0])
        runs = any(c.startswith(f"sm_{major}") or (c == "compute_90" and major >= 9) for c in codes)
        if codes and not runs:
            lines.append(f"{name}: GPU {gpu['index']} is {gpu['capability']}, this build has {', '.join(codes)}")
    if gpus and host["torch"]["cuda"] is None:
        lines.append(f"{name}: PyTorch {host['torch']['version']} is a build without CUDA")
    for a, row in enumerate(host["p2p"]):
        for b, reaches in enumerate(row):
            if reaches is False and a < b:
                lines.append(f"{name}: GPUs {a} and {b} cannot reach each other's memory (P2P); keep them apart")
    return lines
