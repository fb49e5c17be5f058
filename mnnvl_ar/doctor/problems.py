"""What keeps a group from working, a line each, with what to do."""

from __future__ import annotations

import statistics
from typing import Any

from mnnvl_ar.doctor.outlook import NONE
from mnnvl_ar.doctor.selftest import ranks as ranks_text

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
    return lines + [f"self-test, {error}" for error in found["self_test"].get("errors", [])] + _of_pairs(found)


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
                refusal = host["p2p_refusals"][a][b]
                why = f" (P2P): {refusal}" if refusal else " (P2P)"
                lines.append(f"{name}: GPUs {a} and {b} cannot reach each other's memory{why}; keep them apart")
    return lines + _links_down(name, gpus)


def _links_down(host: str, gpus: list[dict[str, Any]]) -> list[str]:
    lines = []
    for gpu in gpus:
        most = max(other["nvlinks"] or 0 for other in gpus if other["name"] == gpu["name"])
        if gpu["nvlinks"] is not None and gpu["nvlinks"] < most:
            lines.append(
                f"{host}: GPU {gpu['index']} has {gpu['nvlinks']} NVLinks up, others of its kind {most}; look at "
                "nvidia-smi nvlink -s"
            )
    return lines


def _of_pairs(found: dict[str, Any]) -> list[str]:
    """Of what was measured pair by pair: what failed, and what is far slower than other pairs that are linked alike."""
    links = {
        frozenset((a["uuid"], b["uuid"])): host["links"][i][j]
        for host in found["hosts"]
        for i, a in enumerate(host["gpus"])
        for j, b in enumerate(host["gpus"])
    }
    pairs = found["self_test"].get("pairs", [])
    lines = [
        f"{ranks_text(pair['ranks'])} by themselves (ranks 0 and 1 there): {pair['error']}"
        for pair in pairs
        if pair["error"]
    ]
    alike: dict[str, list[dict[str, Any]]] = {}
    for pair in pairs:
        link = links.get(frozenset(pair["gpus"]))
        if link is not None and not pair["error"]:
            alike.setdefault(link, []).append(pair)
    for link, group in alike.items():
        usual = statistics.median(pair["bandwidth_gb_s"] for pair in group)
        lines += [
            f"{ranks_text(pair['ranks'])} by themselves: {pair['bandwidth_gb_s']:.1f} GB/s, where pairs linked alike "
            f"({link}) reach {usual:.1f}; look for what else runs on their GPUs, then at nvidia-smi nvlink -e"
            for pair in group
            if pair["bandwidth_gb_s"] < usual / 2
        ]
    return lines
