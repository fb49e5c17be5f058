"""What one node has, and what is wrong with all of them together. Reads only."""

from __future__ import annotations

import hashlib
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from bench import results

PROBES = {
    "GPUs": ("nvidia-smi",),
    "topology": ("nvidia-smi", "topo", "-m"),
    "IMEX": ("nvidia-imex-ctl", "-N"),
    "IMEX channels": ("ls", "-l", "/dev/nvidia-caps-imex-channels"),
}
MOST_TEXT = 20_000  # characters of a probe that are kept
SHOULD_BE = {"State": "Completed", "Status": "Success"}
SAME = ("ClusterUUID", "CliqueId")
# What all nodes must have alike, and how a person calls it.
ALIKE = {
    "nodes": "how many nodes there are",
    "options": "options",
    "sources": "sources",
    "library": "mnnvl_ar/_C.so",
    "torch": "PyTorch",
    "multicast_refusal": "what forbids multicast",
}


def look(device: str | None, nodes: int, options: Sequence[str]) -> dict[str, Any]:
    """This node: plain values. `gpus`: how many a process here sees, 0 with device "cpu"."""
    import torch

    from mnnvl_ar import _library
    from mnnvl_ar.memory import multicast_refusal

    return {
        "host": socket.gethostname(),
        "nodes": nodes,
        "options": list(options),
        "gpus": 0 if device == "cpu" else torch.cuda.device_count(),
        "sources": results.source_digest(),
        "library": hashlib.sha256(_library.PATH.read_bytes()).hexdigest()[:16],
        "torch": torch.__version__,
        "multicast_refusal": multicast_refusal(),
        "fabric": fabric(_output("nvidia-smi", "-q")),
        "probes": {name: _output(*command)[:MOST_TEXT] for name, command in PROBES.items()},
    }


def fabric(text: str) -> list[dict[str, str]]:
    """Of `nvidia-smi -q`: what stands under "Fabric", by GPU."""
    found: list[dict[str, str]] = []
    depth = None
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if re.fullmatch(r"\s+Fabric\s*", line):
            found.append({})
            depth = indent
        elif depth is not None and line.strip():
            if indent <= depth:
                depth = None
            elif ":" in line:
                name, _, value = line.partition(":")
                found[-1][name.strip()] = value.strip()
    return found


def problems(nodes: Mapping[int, Mapping[str, Any]], gpus_per_node: int | None) -> list[str]:
    """What keeps these nodes, by number, from being one machine; a line each, with the node's name."""
    first = nodes[0]
    lines = []
    for number, node in sorted(nodes.items()):
        name = f"node {number} ({node['host']})"
        wanted = first["gpus"] if gpus_per_node is None else gpus_per_node
        if node["gpus"] != wanted:
            lines.append(f"{name} has {node['gpus']} GPUs, wanted {wanted}")
        for key, what in ALIKE.items():
            if node[key] != first[key]:
                lines.append(f"{name}: {what}: {node[key]!r}; on node 0 {first[key]!r}")
        for index, gpu in enumerate(node["fabric"]):
            lines += [
                f"{name}, GPU {index}: fabric {key} is {gpu[key]}, wanted {value}"
                for key, value in SHOULD_BE.items()
                if gpu.get(key, value) not in (value, "N/A")
            ]
            start = first["fabric"][0] if first["fabric"] else {}
            lines += [
                f"{name}, GPU {index}: fabric {key} {gpu.get(key)}, on node 0 {start.get(key)}: another NVLink domain"
                for key in SAME
                if gpu.get(key) != start.get(key)
            ]
    return lines


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{' '.join(command)}: {error}"
    return done.stdout + done.stderr
