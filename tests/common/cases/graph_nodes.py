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

from tools.driver import ask, kernel_of

OURS = "mnnvl_ar7kernels"  # in a mangled name: a kernel of namespace mnnvl_ar::kernels


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

    def __init__(self, node: Any, name: str) -> None:
        from cuda.bindings import driver

        self.node, self.name, self.about = node, name, ask(driver.cuGraphKernelNodeGetParams(node))

    def read(self) -> bytes:
        """What it is given: the graph's own copy."""
        from cuda.bindings import driver

        size = ask(driver.cuFuncGetParamInfo(self.about.func, 0))[1]
        place = ctypes.c_void_p.from_address(int(self.about.kernelParams)).value
        assert place is not None
        return ctypes.string_at(place, size)

    def write(self, content: bytes) -> None:
        from cuda.bindings import driver

        kept = ctypes.create_string_buffer(content, len(content))
        places = (ctypes.c_void_p * 1)(ctypes.addressof(kept))
        self.about.kernelParams = ctypes.addressof(places)
        ask(driver.cuGraphKernelNodeSetParams(self.node, self.about))
        self.about = ask(driver.cuGraphKernelNodeGetParams(self.node))
        assert self.read() == content, "the driver has taken other parameters"

    def widen(self, clusters: int) -> None:
        """By so many clusters more than it was captured with."""
        from cuda.bindings import driver

        self.about.gridDimY += clusters
        ask(driver.cuGraphKernelNodeSetParams(self.node, self.about))


def kernels_of(graph: torch.cuda.CUDAGraph) -> Iterator[Node]:
    """This library's kernels."""
    from cuda.bindings import driver

    raw = driver.CUgraph(init_value=graph.raw_cuda_graph())
    count = ask(driver.cuGraphGetNodes(raw, 0))[1]
    nodes = ask(driver.cuGraphGetNodes(raw, count))[0]
    for node in nodes:
        name = kernel_of(node)
        if name is not None and OURS in name:
            yield Node(node, name)
