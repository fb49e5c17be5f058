"""Which kernels a step launches, and how each follows the one before: read from a captured graph.

A profiler would say the names as well, but stays in the way of what is timed after it, and does not say the edges.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tools.driver import ask, kernel_of

FULL, PROGRAMMATIC = "full", "programmatic"  # after the end of the kernel before; by PDL


def kernels(step: Callable[[int], None]) -> list[tuple[str, str]]:
    """(name, edge before it) of the kernels that `step(1)` launches behind `step(0)`, in their order. They have run
    before, so that nothing is loaded during the capture."""
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for i in range(2):
            step(i)
    found = _chain(graph.raw_cuda_graph())
    graph.reset()
    return found[len(found) // 2 :]


def _chain(raw: int) -> list[tuple[str, str]]:
    from cuda.bindings import driver

    graph = driver.CUgraph(raw)
    (node,), _ = ask(driver.cuGraphGetRootNodes(graph, 1))
    *_, count = ask(driver.cuGraphGetEdges(graph))
    sources, targets, edges, _ = ask(driver.cuGraphGetEdges(graph, count))
    after = {int(a): (b, edge.type) for a, b, edge in zip(sources, targets, edges, strict=True)}
    found, edge = [], FULL
    while True:
        found.append((kernel_of(node) or ask(driver.cuGraphNodeGetType(node)).name, edge))
        if int(node) not in after:
            return found
        node, kind = after[int(node)]
        edge = PROGRAMMATIC if kind == driver.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC else FULL
