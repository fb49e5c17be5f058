"""Measures what of the floor's constants (bench/floor.py) one GPU can tell: `python -m bench.probe`, seconds.

launch: an empty kernel in a graph chain, without PDL (the floor takes the one with, 0.1 us less). read: a chain of
loads, each of which needs the one before, through a buffer that fits L2 and through one that does not.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,unused-ignore]

STEPS = 4096
LINE = 32  # int32 words between two loads: another 128-byte line each


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _empty(x):  # type: ignore[no-untyped-def]
    pass


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _chase(links, end, steps):  # type: ignore[no-untyped-def]
    at = tl.load(links)
    for _ in range(steps):
        at = tl.load(links + at, cache_modifier=".cg")
    tl.store(end, at)


def launch_us(calls: int = 200) -> float:
    x = torch.zeros(1, device="cuda")
    _empty[(1,)](x, num_warps=1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            _empty[(1,)](x, num_warps=1)
    return _best_us(graph.replay) / calls


def read_us(nbytes: int) -> float:
    lines = nbytes // (4 * LINE)
    order = torch.randperm(lines, device="cuda", dtype=torch.int32) * LINE
    links = torch.zeros(nbytes // 4, device="cuda", dtype=torch.int32)
    links[order.long()] = order.roll(-1)
    end = torch.zeros(1, device="cuda", dtype=torch.int32)
    steps = min(STEPS, lines - 1)
    return _best_us(lambda: _chase[(1,)](links, end, steps, num_warps=1)) / steps


def _best_us(action) -> float:  # type: ignore[no-untyped-def]
    times: list[float] = []
    for _ in range(7):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(200_000)
        start.record()
        action()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return min(times[2:])


if __name__ == "__main__":
    print(f"{torch.cuda.get_device_name()}")
    print(f"launch, graph chain, no PDL: {launch_us():.3f} us")
    print(f"dependent load, 8 MiB (L2):  {read_us(8 << 20):.3f} us")
    print(f"dependent load, 2 GiB:       {read_us(2 << 30):.3f} us")
