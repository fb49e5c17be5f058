"""Every two ranks by themselves: one link that is slow or broken shows, which a group's figures would hide.

Rounds of a tournament, so that each rank is in one pair at a time and all pairs of a round run side by side, as they do
in a call. Each pair is a group of its own, with a workspace of its own.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

import mnnvl_ar

MOST_RANKS = 16  # of more, the tournament would take longer than a doctor should
HIDDEN, LARGE = 8192, {"cpu": 16, "cuda": 1024}  # rows of 16 KiB; so many of them are the large call
_SMALL = 8  # elements: 16 bytes, one vector
_LEAST = 0.5  # seconds that must be left for a pair
_NO_TIME = {"error": "no time was left for it"}
_CALLS, _REPEATS = {"cpu": 3, "cuda": 50}, 5


def rounds(size: int) -> list[list[tuple[int, int]]]:
    """The pairs of each round: every two of `size` ranks meet once, and each rank is in at most one pair a round."""
    seats = [*range(size), *([-1] if size % 2 else [])]
    table = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        met = zip(seats[:half], reversed(seats[half:]), strict=True)
        table.append([(min(pair), max(pair)) for pair in met if -1 not in pair])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return table


def have_one_gpu(group: dist.ProcessGroup, device: torch.device, patience: float) -> bool:
    """Collective: whether several ranks share a GPU. They run by turns of milliseconds, and between them is no link."""
    seats = PrefixStore("mnnvl_ar-doctor-gpus", group.get_group_store())
    seats.set(str(group.rank()), _uuid(device))
    names = [str(rank) for rank in range(group.size())]
    try:
        seats.wait(names, timedelta(seconds=patience))
    except RuntimeError as error:
        gone = [name for name in names if not seats.check([name])]
        raise RuntimeError(f"ranks that do not say which GPU they have: {', '.join(gone)}") from error
    found = [seats.get(name).decode() for name in names]
    return all(found) and len(set(found)) < len(found)


def measure(group: dist.ProcessGroup, device: torch.device, patience: float, seconds: float) -> list[dict[str, Any]]:
    """Collective. Of each pair that this rank is in: {ranks, gpu, error} and, if error is "", {latency_us,
    bandwidth_gb_s, small_bytes, large_bytes}. gpu: this rank's UUID, "" without one. In a pair nothing waits longer
    than `patience` seconds, but for the other rank to come: three times as long in the first round, and in each round
    that much longer than in the one before, in which the other may have waited in vain. Over within `seconds`: the less
    of them is left, the less anything waits."""
    until = time.monotonic() + seconds
    rank, store = group.rank(), group.get_group_store()
    found = []
    for number, round_ in enumerate(rounds(group.size()), 1):
        for pair in round_:
            if rank in pair:
                left = until - time.monotonic()
                waits, to_come = min(patience, left / 4), min(3 * patience * number, left / 2)
                tried = _tried(store, pair, rank, device, waits, to_come) if left > _LEAST else _NO_TIME
                found.append({"ranks": list(pair), "gpu": _uuid(device), **tried})
    return found


def merge(by_rank: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What both ranks of each pair found, in the order of the pairs: {ranks, gpus, error, latency_us, bandwidth_gb_s,
    ...}, of figures the worse one."""
    sides: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for found in by_rank:
        for side in found:
            sides.setdefault((side["ranks"][0], side["ranks"][1]), []).append(side)
    return [_merged(list(pair), both) for pair, both in sorted(sides.items())]


def _merged(ranks: list[int], sides: list[dict[str, Any]]) -> dict[str, Any]:
    pair = {"ranks": ranks, "gpus": [side["gpu"] for side in sides]}
    errors = [side["error"] for side in sides if side["error"]]
    if errors:
        return {**pair, "error": errors[0]}
    latency, bandwidth = ([side[name] for side in sides] for name in ("latency_us", "bandwidth_gb_s"))
    return {**sides[0], **pair, "latency_us": max(latency), "bandwidth_gb_s": min(bandwidth)}


class _Two:
    """A `mnnvl_ar.Group` of two ranks of a larger group, which meet in its store."""

    def __init__(self, store: Store, pair: tuple[int, int], rank: int, patience: float) -> None:
        self.rank, self.size, self._patience = pair.index(rank), 2, timedelta(seconds=patience)
        self._store = PrefixStore(f"mnnvl_ar-doctor-{pair[0]}-{pair[1]}", store)

    def all_gather(self, text: str) -> list[str]:
        self._store.set(str(self.rank), text)
        self._store.wait(["0", "1"], self._patience)
        return [self._store.get(str(rank)).decode() for rank in range(self.size)]


def _tried(
    store: Store, pair: tuple[int, int], rank: int, device: torch.device, patience: float, to_come: float
) -> dict[str, Any]:
    try:
        with mnnvl_ar.Workspace(
            _Two(store, pair, rank, to_come),
            LARGE[device.type],
            HIDDEN,
            torch.bfloat16,
            device=device,
            transport="unicast" if device.type == "cuda" else "auto",  # it is the links that are asked for
            deadline=patience,
            timeout=patience,
            monitor=False,
        ) as ws:
            try:
                return {"error": "", **_measured(ws)}
            except RuntimeError:
                ws.check()  # says more plainly than an op what became of a call
                raise
    except Exception as error:  # this pair's finding; the next one is another
        return {"error": str(error).split("\n")[0] or type(error).__name__}


def _measured(ws: mnnvl_ar.Workspace) -> dict[str, Any]:
    xs = [torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(7 + rank)).bfloat16() for rank in (0, 1)]
    got = mnnvl_ar.ops.all_reduce(xs[ws.rank].to(ws.device), ws.handle)
    ws.check()
    if not mnnvl_ar.reference.same_bits(got, mnnvl_ar.reference.all_reduce(xs)):
        raise RuntimeError("the sum differs from the reference")
    small, large = torch.ones(1, _SMALL).bfloat16(), torch.ones(LARGE[ws.device.type], HIDDEN).bfloat16()
    latency, took = (_seconds(ws, x.to(ws.device)) for x in (small, large))
    ws.check()
    return {
        "latency_us": 1e6 * latency,
        "bandwidth_gb_s": large.nbytes / took / 1e9,
        "small_bytes": small.nbytes,
        "large_bytes": large.nbytes,
    }


def _seconds(ws: mnnvl_ar.Workspace, x: torch.Tensor) -> float:
    """Median seconds of a call among calls alone: on a GPU of replays of a CUDA graph of them, by its events."""
    calls, out = _CALLS[x.device.type], torch.empty_like(x)
    clock = _replay_seconds if x.is_cuda else _host_seconds

    def batch() -> None:
        for _ in range(calls):
            mnnvl_ar.ops.all_reduce_out(x, out, ws.handle)

    batch()
    return statistics.median(clock(batch)) / calls


def _host_seconds(batch: Callable[[], None]) -> list[float]:
    def once() -> float:
        began = time.perf_counter()
        batch()
        return time.perf_counter() - began

    return [once() for _ in range(_REPEATS)]


def _replay_seconds(batch: Callable[[], None]) -> list[float]:
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        batch()
    stamps = [torch.cuda.Event(enable_timing=True) for _ in range(_REPEATS + 1)]
    graph.replay()  # both ranks come out of it together, so that none waits in those that are timed
    for stamp in stamps[:-1]:
        stamp.record()
        graph.replay()
    stamps[-1].record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(stamps)]


def _uuid(device: torch.device) -> str:
    """As the driver has it, in hex digits."""
    return str(torch.cuda.get_device_properties(device).uuid).replace("-", "") if device.type == "cuda" else ""
