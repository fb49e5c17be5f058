"""Replays on CUDA: real graphs, captured on a side stream into one pool of memory, replayed on the current stream.

Each rank needs a process and a GPU of its own. If two shared a GPU, CUDA could run a branch of one rank's graph behind
a call of the other that waits for it, and neither would ever end.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch

from tools.driver import ask
from tools.replay.kernels import kernels
from tools.replay.script import Script
from tools.replay.server import Server, Work


class CudaGraph:
    """A captured graph. One of kind "update" is launched through an executable graph of ours, whose parameters can be
    replaced: PyTorch gives no access to its own."""

    def __init__(self, updatable: bool) -> None:
        self.graph = torch.cuda.CUDAGraph(keep_graph=True) if updatable else torch.cuda.CUDAGraph()
        self.executable: Any = None
        self.clusters: list[int] = []  # of the executable's kernels

    def instantiate(self, source: CudaGraph) -> None:
        from cuda.bindings import runtime

        self.executable = ask(runtime.cudaGraphInstantiate(source.raw, 0))
        self.clusters = clusters_of(source.raw)

    @property
    def raw(self) -> Any:
        from cuda.bindings import runtime

        return runtime.cudaGraph_t(init_value=self.graph.raw_cuda_graph())

    def replay(self) -> None:
        if self.executable is None:
            self.graph.replay()
            return
        from cuda.bindings import runtime

        stream = runtime.cudaStream_t(init_value=torch.cuda.current_stream().cuda_stream)
        ask(runtime.cudaGraphLaunch(self.executable, stream))


def clusters_of(raw: Any) -> list[int]:
    """CTAs in a cluster, of each kernel of a graph."""
    from cuda.bindings import runtime

    count = ask(runtime.cudaGraphGetNodes(raw, 0))[1]
    nodes = ask(runtime.cudaGraphGetNodes(raw, count))[0]
    kernel = runtime.cudaGraphNodeType.cudaGraphNodeTypeKernel
    attribute = runtime.cudaLaunchAttributeID.cudaLaunchAttributeClusterDimension
    return [
        ask(runtime.cudaGraphKernelNodeGetAttribute(node, attribute)).clusterDim.x
        for node in nodes
        if ask(runtime.cudaGraphNodeGetType(node)) == kernel
    ]


class CudaMachine:
    def __init__(self, rank: Any, deadline: float, impatient: bool, **options: Any) -> None:
        self.rank, self.deadline, self.options = rank, deadline, options
        self.stream, self.side = torch.cuda.Stream(rank.device), torch.cuda.Stream(rank.device)
        self.pool = torch.cuda.graph_pool_handle()
        self.forked = False
        self.refused = 0  # updates that CUDA refuses or gets wrong; the graph was instantiated anew instead
        self.kernels = kernels(rank.device) if impatient else None

    def workspace(self, **options: Any) -> Any:
        return self.rank.new_workspace(deadline=self.deadline, **self.options, **options)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.rank.device)

    def eager(self, work: Work) -> None:
        work(self.take)

    def capture(self, work: Work, kind: str, keep: bool) -> CudaGraph:
        """ "full" and "piecewise" as vLLM does it, by `torch.cuda.graph`; the others by capture_begin and capture_end.
        A graph that is not kept has a pool of its own."""
        made = CudaGraph(kind == "update")
        pool = self.pool if keep else torch.cuda.graph_pool_handle()
        if kind in ("full", "piecewise"):
            with torch.cuda.graph(made.graph, pool=pool, stream=self.stream):
                work(self.take)
        else:
            current = torch.cuda.current_stream(self.rank.device)
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                made.graph.capture_begin(pool=pool)
                try:
                    work(self.take)
                finally:
                    made.graph.capture_end()
            current.wait_stream(self.stream)
        if kind == "update":
            made.instantiate(made)
        return made

    def update(self, into: CudaGraph, source: CudaGraph) -> None:
        from cuda.bindings import runtime

        # Where the cluster sizes differ, CUDA accepts the update but keeps the old cluster size, and the library then
        # refuses the call (tests/gpu/test_updates.py).
        if clusters_of(source.raw) == into.clusters:
            code, _ = runtime.cudaGraphExecUpdate(into.executable, source.raw)
            if int(code) == 0:
                return
            runtime.cudaGetLastError()
        self.refused += 1
        into.instantiate(source)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """On the side stream, ordered behind all launches so far. Tensors made in here stay on that stream."""
        self.side.wait_stream(torch.cuda.current_stream(self.rank.device))
        self.forked = True
        with torch.cuda.stream(self.side):
            yield

    def join(self) -> None:
        if self.forked:
            torch.cuda.current_stream(self.rank.device).wait_stream(self.side)
        self.forked = False

    def impatient(self) -> None:
        if self.kernels is not None:
            self.kernels.impatient()


def serve(
    rank: Any, script: Script, off: str = "", *, delay_ns: int = 0, hog: bool = False, deadline: float = 30.0
) -> dict[str, Any]:
    """Runs on every rank; returns the figures. off, delay_ns: in a test build, rules to switch off, and the longest
    random delay inside kernels. hog: kernels on another stream keep occupying SMs.
    """
    from common.cases.rules import break_rule

    def sabotage(handle: int) -> None:
        if off or delay_ns:
            break_rule(handle, off, frozen_dirty=1, delay_ns=delay_ns)

    machine = CudaMachine(rank, deadline, script.profile.impatient)
    server = Server(rank, machine, script, sabotage)
    rank.barrier()
    began = time.monotonic()
    server.run(script.captures)
    with hogging(rank.device) if hog else contextlib.nullcontext():
        figures = server.run(script.traffic)
    figures["refused_updates"] = machine.refused
    figures["updates"] -= machine.refused
    figures["seconds"] = round(time.monotonic() - began, 1)
    server.close()
    return figures


@contextlib.contextmanager
def hogging(device: torch.device) -> Iterator[None]:
    """Kernels occupy up to all SMs of the device for up to a millisecond, again and again. Not for use while graphs are
    captured: CUDA then forbids other threads most calls.
    """
    import random

    made, stream, enough = kernels(device), torch.cuda.Stream(device), threading.Event()
    processors = torch.cuda.get_device_properties(device).multi_processor_count

    def work() -> None:
        draw = random.Random(7)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            torch.zeros(1, device=device)  # makes the context this thread's
            while not enough.is_set():
                made.hog(draw.randint(1, 2 * processors), draw.randint(1_000, 1_000_000))
                stream.synchronize()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        enough.set()
        thread.join()
