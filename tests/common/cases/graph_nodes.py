"""The kernels of a captured graph: which they are, and what each is given. Of virtual ranks of a GPU.

Contract
  * captured(rank, work, before): as `VirtualRank.capture`, but `before` has the graph before it is instantiated, and
    may change what its kernels are given.
  * Kernels here have one parameter, a struct (`CallOf` of csrc/epilogues/epilogue.h); others are left out.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import torch

OURS = b"mnnvl_ar7kernels"  # in a mangled name: a kernel of namespace mnnvl_ar::kernels


def captured(rank: Any, work: Callable[[], Any], before: Callable[[torch.cuda.CUDAGraph], Any]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    rank.barrier()
    with rank._ranks.lock:  # with the lock, as other ranks capture, too
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work()
        before(graph)
        graph.instantiate()
    rank.barrier()
    return graph


class Node:
    """A kernel of a graph that is not instantiated yet."""

    def __init__(self, node: Any) -> None:
        from cuda.bindings import driver

        self.node, self.about = node, _ask(driver.cuGraphKernelNodeGetParams(node))
        self.name: bytes = _ask(driver.cuFuncGetName(self.about.func))

    def read(self) -> bytes:
        """What it is given: the graph's own copy."""
        from cuda.bindings import driver

        size = _ask(driver.cuFuncGetParamInfo(self.about.func, 0))[1]
        place = ctypes.c_void_p.from_address(int(self.about.kernelParams)).value
        assert place is not None
        return ctypes.string_at(place, size)

    def write(self, content: bytes) -> None:
        from cuda.bindings import driver

        kept = ctypes.create_string_buffer(content, len(content))
        places = (ctypes.c_void_p * 1)(ctypes.addressof(kept))
        self.about.kernelParams = ctypes.addressof(places)
        _ask(driver.cuGraphKernelNodeSetParams(self.node, self.about))
        self.about = _ask(driver.cuGraphKernelNodeGetParams(self.node))
        assert self.read() == content, "the driver has taken other parameters"

    def widen(self, clusters: int) -> None:
        """By so many clusters more than it was captured with."""
        from cuda.bindings import driver

        self.about.gridDimY += clusters
        _ask(driver.cuGraphKernelNodeSetParams(self.node, self.about))


def kernels_of(graph: torch.cuda.CUDAGraph) -> Iterator[Node]:
    """This library's kernels."""
    from cuda.bindings import driver

    raw = driver.CUgraph(init_value=graph.raw_cuda_graph())
    count = _ask(driver.cuGraphGetNodes(raw, 0))[1]
    nodes = _ask(driver.cuGraphGetNodes(raw, count))[0]
    for node in nodes:
        if _ask(driver.cuGraphNodeGetType(node)) == driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL:
            kernel = Node(node)
            if OURS in kernel.name:
                yield kernel


def _ask(answer: Any) -> Any:
    """The values that a call of cuda.bindings returned. Raises RuntimeError if its status is an error."""
    code, *values = answer
    if int(code) != 0:
        raise RuntimeError(f"CUDA: {code!r}")
    return values[0] if len(values) == 1 else values or None
