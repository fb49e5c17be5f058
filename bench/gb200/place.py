"""Which node of how many this process is, and where the first one listens: told by options, or by what started it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# What tells a task its number and how many there are, one task a node.
STARTERS = {
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS"),
    "Kubernetes": ("JOB_COMPLETION_INDEX", "NODES"),  # NODES: two_nodes.yaml
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "MPI": ("PMI_RANK", "PMI_SIZE"),
}


@dataclass(frozen=True)
class Place:
    """node: from 0. head, port: of the first node. by: who told."""

    node: int
    nodes: int
    head: str
    port: int
    by: str

    @property
    def leads(self) -> bool:
        return self.node == 0


def find(environment: Mapping[str, str], *, node: int | None, nodes: int | None, head: str | None, port: int) -> Place:
    """The place of this process. `node`, `nodes` and `head`, where they are given, go before the environment. Raises
    `ValueError` where what is known makes no sense."""
    by, own, count = "options", node, nodes
    if own is None and count is None:
        by, own, count = _told(environment)
    if own is None or count is None:
        raise ValueError("--node and --nodes go together")
    if not 0 <= own < count:
        raise ValueError(f"node {own} of {count} by {by}: nodes are counted from 0")
    if by == "Slurm" and (hosts := environment.get("SLURM_NNODES", str(count))) != str(count):
        raise ValueError(f"{count} tasks on {hosts} nodes: start one task a node (--ntasks-per-node=1)")
    if head is None and count > 1:
        raise ValueError("--head is missing: the name of the first node, which the others can reach")
    return Place(own, count, head or "127.0.0.1", port, by)


def _told(environment: Mapping[str, str]) -> tuple[str, int, int]:
    for by, names in STARTERS.items():
        values = [environment[name] for name in names if name in environment]
        if len(values) == len(names):
            if not all(value.isdecimal() for value in values):
                raise ValueError(f"{by}: {' and '.join(names)} are {' and '.join(map(repr, values))}")
            return by, int(values[0]), int(values[1])
    return "nobody, so alone", 0, 1
