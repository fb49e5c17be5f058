"""How a call is timed: many calls in one CUDA graph, all ranks started together, all variants of a cell in turn.

One round replays every variant once. Before each replay a tiny NCCL all-reduce in the stream holds all ranks' GPUs
until the last has come; by then the replay is queued behind it, since a sleep at the head of the round gave the CPUs
time. So neither the launch cost of Python nor the skew of the processes is in the figure. (Where ranks share a GPU the
all-reduce is gloo's, both are in it, and times mean nothing.) CUDA events around the
replay, divided by its calls, give the time of a call; p50 and p99 are over rounds, and the slowest rank counts. A round
is a mean over calls: p99 says how steady rounds are, not how long single calls take; of fewer than 100 it is the
slowest. The interval around p50 is the one that holds the median of all rounds that could be, with 95 %.

What stands around the calls (bench/contexts.py) is replayed without them as well, in each round in its turn, and taken
off round by round: of the rank that took longest for it, as that is the one that the call has waited for.

In eager mode the launch cost is meant to be in the figure, of every variant alike: each starts on an idle GPU, when all
ranks have passed a barrier, with nothing queued. How far apart the ranks leave the barrier is then in it, spread over
the calls.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from bench.buffers import L2_BYTES
from bench.cells import Cell
from bench.floor import H200, floor_us
from bench.team import Team

GRAPH_US = 1500.0  # aimed-at time of one replay
FEWEST_CALLS = 20
SHARED_CALLS = 6  # twice round the ring, by ranks that have a GPU together: each takes some milliseconds
GEMM_CALLS = 40  # between GEMMs, which take longer than most calls
HEAD_START_CYCLES = 800_000  # about 0.4 ms, in which the CPU queues the first replays of a round


ROUNDS, QUICK_ROUNDS = 40, 15
MANY_ROUNDS, MANY_TOKENS = 100, 64  # a p99 that is not the slowest round, where a round is short


@dataclass(frozen=True)
class Timed:
    """Of the rank with the largest p50: p50 and the interval around it. p99: the largest of any rank. base_us: the p50
    of what was taken off."""

    p50_us: float
    p99_us: float
    low_us: float
    high_us: float
    base_us: float = 0.0


def calls_of(cell: Cell, *, shared: bool = False) -> int:
    """Calls in one replay: an even number from 20 to 200, fewer for large sizes. The same on all ranks, and on
    every machine, as H200's floor is near enough to tell small from large. shared: by ranks that have a GPU
    together."""
    if shared:
        return SHARED_CALLS
    if cell.mode == "eager":
        return FEWEST_CALLS
    if cell.context == "gemm":
        return GEMM_CALLS
    return 2 * max(FEWEST_CALLS // 2, min(100, round(GRAPH_US / (2 * floor_us(cell, H200)) / 2)))


def rounds_of(cell: Cell, *, quick: bool, hurried: bool) -> int:
    """Rounds unless told otherwise. hurried: the time may be too short for all cells."""
    if quick:
        return QUICK_ROUNDS
    return MANY_ROUNDS if cell.tokens <= MANY_TOKENS and not hurried else ROUNDS


class Replay:
    """One variant's calls, ready to be run again and again: a captured graph, or a loop in eager mode."""

    def __init__(self, call: Callable[[int], None], calls: int, cell: Cell, device: torch.device) -> None:
        self.calls = calls
        self.graph: torch.cuda.CUDAGraph | None = None
        self._call = call
        for i in range(3):  # loads kernels, opens connections
            call(i)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if cell.mode == "graph":
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                for i in range(calls):
                    call(i)

    def run(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        for i in range(self.calls):
            self._call(i)

    def release(self) -> None:
        if self.graph is not None:
            self.graph.reset()


class Clock:
    """Times replays side by side on a team."""

    def __init__(self, team: Team) -> None:
        self.team = team
        self.on_gpu = team.device.type == "cuda"
        self._token = torch.zeros(1, device=team.device)
        self._flush = torch.empty(2 * L2_BYTES, dtype=torch.int8, device=team.device) if self.on_gpu else None

    def measure(self, cell: Cell, replays: Sequence[Replay], rounds: int, base: Replay | None = None) -> list[Timed]:
        """Collective. One result a replay, the same on all ranks. base: what to take off, of as many calls."""
        every = [*replays, *([] if base is None else [base])]
        times: list[list[float]] = [[] for _ in every]
        for number in range(rounds + 1):
            order = [(number + i) % len(every) for i in range(len(every))]  # each comes first sometimes
            for index, us in zip(order, self._round(cell, [every[i] for i in order]), strict=True):
                if number > 0:  # the first round uploads graphs and warms caches
                    times[index].append(us)
        ranks: list[list[list[float]]] = self.team.gather(times)
        bases = [[0.0] * rounds] if base is None else [own[-1] for own in ranks]
        return [slowest([own[index] for own in ranks], bases) for index in range(len(replays))]

    def _round(self, cell: Cell, replays: Sequence[Replay]) -> list[float]:
        self.team.barrier()
        if not self.on_gpu:
            return [self._on_host(replay) for replay in replays]
        queued = cell.mode == "graph"
        if queued:
            torch.cuda._sleep(HEAD_START_CYCLES)
        events = []
        for replay in replays:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if cell.l2 == "cold" and self._flush is not None:
                self._flush.zero_()
            if queued:
                dist.all_reduce(self._token, group=self.team.group)
            else:
                torch.cuda.synchronize()
                self.team.barrier()
            start.record()
            replay.run()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [
            start.elapsed_time(end) * 1e3 / replay.calls for (start, end), replay in zip(events, replays, strict=True)
        ]

    def _on_host(self, replay: Replay) -> float:
        self.team.barrier()
        start = time.perf_counter()
        replay.run()
        return (time.perf_counter() - start) * 1e6 / replay.calls


def slowest(ranks: Sequence[Sequence[float]], bases: Sequence[Sequence[float]]) -> Timed:
    """Of each rank's rounds, and each rank's rounds of what is to be taken off."""
    off = [max(times) for times in zip(*bases, strict=True)]
    left = [[us - base for us, base in zip(times, off, strict=True)] for times in ranks]
    last = max(left, key=lambda samples: percentile(samples, 0.5))
    p99 = max(percentile(samples, 0.99) for samples in left)
    return Timed(percentile(last, 0.5), p99, *interval(last), percentile(off, 0.5))


def interval(samples: Sequence[float]) -> tuple[float, float]:
    """Where the median that the samples are drawn around is with at least 95 %: two of them, as far from the middle as
    the binomial distribution says, whatever their own distribution is. All there is of fewer than six."""
    ordered, count = sorted(samples), len(samples)
    at, below = 0, 1 + count  # of 2^count ways, those that leave at most `at + 1` samples below the median
    while below <= 0.025 * 2**count:
        at += 1
        below += math.comb(count, at + 1)
    return ordered[at], ordered[count - 1 - at]


def percentile(samples: Sequence[float], share: float) -> float:
    """Nearest rank: the smallest sample that at least `share` of all do not exceed."""
    return sorted(samples)[max(0, math.ceil(share * len(samples)) - 1)]
