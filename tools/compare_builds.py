"""Times two builds of the library against each other on one GPU, in one run: is a change slower, and by how much?

    python tools/compare_builds.py --old FOLDER [--new FOLDER]... [--apart] [--turns 12] [--pairs 4] [--cells small]
                                   [--out FILE] [--seconds 540]

A build is a folder with `mnnvl_ar/` (its `_C.so` in it) and `tests/common/`: a checkout, or what
`git archive REVISION mnnvl_ar tests/common | tar x -C FOLDER` leaves, with a library built from it. Each runs in a
process of its own; they measure each cell by turns, each in each place equally often. What a process is given (where
its memory lies, above all) moves a cell by a tenth of a microsecond, so every turn starts all anew, in another order.
Several `--new` are changes that build on each other: all are measured in one run, each against the one before it;
`--apart`: they are not, and each is held against `--old`.

Cells: a world of one rank between two GEMMs, as a workspace does it by default, and in a chain of its own calls, early;
virtual ranks (several streams of one GPU) in a chain, early. `--cells many`: 12, 16, 24 and 72 virtual ranks, whose
calls are graphs of kernels without edges, a CTA a rank. Their time is mostly that of starting so many kernels, but the
last one to start finds all rows there, and what it takes from then on is in line: so is the difference of two builds
that wait for sources in different ways.

`--cells chains`: of a world of one in a chain, 1 to 256 rows, where one call's CTAs wait beside the one's before.

A build that answers wrong, or whose calls have met a fault, is told and ends the run: a broken ring is quick.

Printed are the medians of both and, of the differences new - old (each turn's mean over its pairs), the mean over turns
with its 95 % interval (Student's t). A cell is slower when the whole interval is above 0. With 50 cells, one or two are
by chance: `--new` and `--old` alike show how many.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LEAST_PAIRS = 20
# Student's t, 95 %, by degrees of freedom.
T95 = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 11: 2.201, 15: 2.131
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """context: "gemm" (world of one, between two GEMMs), "chain" or "once" (all ranks in one graph without edges); op:
    "plain" or "fused"; strategy: as the op has it."""

    context: str
    ranks: int
    op: str
    tokens: int
    hidden: int
    strategy: int = -1


def cells(which: str) -> Iterator[Cell]:
    if which == "many":
        for ranks, strategy, tokens in itertools.product((12, 16, 24, 72), (0, 1), (1, 8)):
            yield Cell("once", ranks, "fused", tokens, 2880, strategy)
            if ranks <= 24:  # a stream each, of 32 hardware queues
                yield Cell("chain", ranks, "fused", tokens, 2880, strategy)
        return
    if which == "chains":
        for tokens, op in itertools.product((1, 8, 16, 32, 64, 96, 128, 256), ("fused", "plain")):
            yield Cell("chain", 1, op, tokens, 4096)
        return
    few = which == "small"
    for hidden, tokens, op in itertools.product((2880, 4096, 7168), (1, 8, 64), ("fused", "plain")):
        if not few or hidden == 4096:
            yield Cell("gemm", 1, op, tokens, hidden)
            yield Cell("chain", 1, op, tokens, hidden)
    for ranks, strategy, tokens in itertools.product((2, 4, 8), (0, 1), (1, 32, 512)):
        if not few or (ranks == 2 and tokens != 512) or (ranks == 8 and tokens == 1):
            yield Cell("chain", ranks, "fused", tokens, 4096, strategy)


# ---- a build's process


def serve() -> None:
    """Measures each cell that comes in, in microseconds a call."""
    import torch

    torch.cuda.set_device(0)
    measures: dict[Cell, Any] = {}
    for line in sys.stdin:
        cell = Cell(**json.loads(line))
        if cell not in measures:
            measures[cell] = {"gemm": gemm, "chain": chain, "once": once}[cell.context](cell)
        print(json.dumps(measures[cell]()), flush=True)


class Call:
    """Of one rank, on buffers of its own: small whole numbers, alike on all ranks, so that any order of adding them
    gives the same bits."""

    def __init__(self, cell: Cell, group: Any, rank: int) -> None:
        import torch

        torch.manual_seed(0)
        self.cell, self.handle = cell, group.handles[rank]
        self.group = group  # whose memory this is
        shape, device = (cell.tokens, cell.hidden), group.device
        self.x, self.residual = (torch.randint(-3, 4, shape, device=device).bfloat16() for _ in range(2))
        self.norm, self.out = torch.empty_like(self.x), torch.empty_like(self.x)
        self.weight = torch.ones(cell.hidden, device=device, dtype=torch.bfloat16)

    def __call__(self, x: Any = None) -> Any:
        import mnnvl_ar

        x, handle, strategy = self.x if x is None else x, self.handle, self.cell.strategy
        if self.cell.op == "fused":
            mnnvl_ar.ops.all_reduce_rms_norm_out(
                x, self.residual, self.weight, 1e-6, self.norm, self.out, handle, strategy=strategy
            )
            return self.norm
        mnnvl_ar.ops.all_reduce_out(x, self.out, handle, strategy=strategy)
        return self.out

    def check(self) -> None:
        """Raises if the latest call, of its own x, was not answered right, or one before it has met a fault."""
        import torch

        if torch.ops.mnnvl_ar._workspace_has_fault(self.handle):
            raise RuntimeError(f"{self.cell}: a fault was met")
        wanted = self.x.float() * self.cell.ranks
        if self.cell.op == "fused":
            wanted += self.residual.float()
            norm = torch.nn.functional.rms_norm(wanted, [self.cell.hidden], None, 1e-6)
            torch.testing.assert_close(self.norm.float(), norm, rtol=2**-7, atol=0.0)
        if not torch.equal(self.out.float(), wanted):
            raise RuntimeError(f"{self.cell}: wrong bits")


def timed(replay: Any, count: int, streams: list[Any]) -> float:
    """Of one replay on all streams, a call."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for stream in streams:
        stream.wait_event(begin)
    replay()
    for stream in streams:
        torch.cuda.current_stream().wait_stream(stream)
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) * 1e3 / count


def measured(replay: Any, count: int, streams: list[Any], calls: list[Call], *, of_others: bool = False) -> float:
    """`timed`, and answered right. of_others: a replay has other rows than the calls, whose own are asked for then."""
    took = timed(replay, count, streams)
    for call in calls:
        if of_others:
            call()
        call.check()
    return took


def usual_pdl() -> Any:
    """The PDL mode of a workspace whose maker did not choose one: by measurements, and before there were any, early."""
    from mnnvl_ar.ops import Pdl

    return getattr(Pdl, "AUTO", Pdl.EARLY)


def shape_of(cell: Cell) -> dict[str, Any]:
    """A world of one has the device to itself, and goes by its build's table. Virtual ranks share it: a table made for
    whole devices would give the few CTAs of each to few rows, so both builds take the same, a CTA a row if there are
    many."""
    if cell.ranks == 1:
        return {"max_ctas": 0}
    return {"cluster": 4 if cell.tokens == 1 else 1}


def gemm(cell: Cell, count: int = 60, most_bytes: int = 1 << 30) -> Any:
    """x -> GEMM -> call -> GEMM -> ..., weights rotated so that L2 holds none of them."""
    import torch

    from common.virtual import VirtualGroup

    group = VirtualGroup(
        cell.ranks, cell.tokens, cell.hidden, torch.bfloat16, "cuda:0", pdl=usual_pdl(), **shape_of(cell)
    )
    call = Call(cell, group, 0)
    sets = max(2, min(count, most_bytes // (cell.hidden * cell.hidden * 2)))
    weights = [torch.randn(cell.hidden, cell.hidden, device="cuda").bfloat16() / cell.hidden for _ in range(sets)]
    linear = torch.nn.functional.linear  # as layers have it: cuBLAS takes another kernel where a weight lies otherwise
    x = torch.randn(cell.tokens, cell.hidden, device="cuda").bfloat16()

    def work() -> None:
        y = x
        for i in range(count):
            y = call(linear(y, weights[i % sets]))

    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for _ in range(5):
        graph.replay()
    return lambda: measured(graph.replay, count, [], [call], of_others=True)


def chain(cell: Cell, count: int = 400) -> Any:
    """A graph of `count` calls a rank, each on the stream of its rank."""
    import torch

    from common.virtual import VirtualGroup

    count = max(20, min(count, 20_000 // cell.tokens))
    group = VirtualGroup(
        cell.ranks, cell.tokens, cell.hidden, torch.bfloat16, "cuda:0", strategy=cell.strategy, **shape_of(cell)
    )
    calls = [Call(cell, group, rank) for rank in range(cell.ranks)]
    streams = [torch.cuda.Stream() for _ in calls]

    def replay_with(works: list[Any]) -> Any:
        def replay() -> None:
            for stream, work in zip(streams, works, strict=True):
                with torch.cuda.stream(stream):
                    work()

        return replay

    replay_with(calls)()
    torch.cuda.synchronize()
    graphs = []
    for stream, call in zip(streams, calls, strict=True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(count):
                call()
        graphs.append(graph)
    replay = replay_with([graph.replay for graph in graphs])
    for _ in range(3):
        replay()
        torch.cuda.synchronize()
    return lambda: measured(replay, count, streams, calls)


def once(cell: Cell, count: int = 50) -> Any:
    """A graph in which every rank makes one call; replayed so many times."""
    import torch

    from common.virtual import VirtualGroup

    group = VirtualGroup(
        cell.ranks,
        cell.tokens,
        cell.hidden,
        torch.bfloat16,
        "cuda:0",
        strategy=cell.strategy,
        pdl=0,
        max_ctas=1,
        cluster=1,
    )
    streams = runpy.run_path(str(ROOT / "tests/common/streams.py"))  # of today's: an old build's folder may have none
    group.streams = streams["own_streams"](cell.ranks, "cuda:0")
    calls = [Call(cell, group, rank) for rank in range(cell.ranks)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        group.each(lambda rank: calls[rank]())

    def replay() -> None:
        for _ in range(count):
            graph.replay()

    replay()
    return lambda: measured(replay, count, [], calls)


# ---- the comparison


class Build:
    def __init__(self, folder: Path) -> None:
        paths = [str(folder), str(folder / "tests")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
        code = f"import runpy; runpy.run_path({str(Path(__file__).resolve())!r})['serve']()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=folder,  # which comes first on its path
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def measure(self, cell: Cell) -> float:
        into, out = self.process.stdin, self.process.stdout
        assert into is not None
        assert out is not None
        into.write(json.dumps(asdict(cell)) + "\n")
        into.flush()
        line = out.readline()
        if not line:
            raise RuntimeError("a build's process ended; its error is above")
        return float(line)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


Pair = tuple[float, float]  # us of the old and of the new build
Times = tuple[float, ...]  # us of every build, in their order


def order(builds: int, turn: int, pair: int = 0) -> list[int]:
    """Who comes first, second, ... Each build has each place equally often, over the turns and over a turn's pairs."""
    first = (turn + pair) % builds
    forth = [*range(first, builds), *range(first)]
    return forth[::-1] if turn // builds % 2 else forth


def run_turn(folders: list[Path], wanted: list[Cell], pairs: int, turn: int) -> dict[Cell, list[Times]]:
    """All builds in fresh processes, through all cells. Which of them starts first, second or third, and makes each
    cell ready then, moves it by up to 0.2 us (kernels that were alike, 2026-12-01), so they take turns in that, too."""
    builds: dict[int, Build] = {}
    found: dict[Cell, list[Times]] = {}
    for cell in wanted:
        for which in order(len(folders), turn):
            if which not in builds:
                builds[which] = Build(folders[which])
            builds[which].measure(cell)  # makes it ready
        found[cell] = []
        for pair in range(pairs):
            times = {which: builds[which].measure(cell) for which in order(len(folders), turn, pair)}
            found[cell].append(tuple(times[which] for which in sorted(times)))
    for build in builds.values():
        build.end()
    return found


def compare(
    wanted: list[Cell], turns: list[dict[Cell, list[Times]]], names: list[str], old: int, new: int
) -> list[dict[str, Any]]:
    """Build `new` against build `old`: a row a cell, printed too."""
    rows = []
    print(f"{names[new]} against {names[old]}:")
    for cell in wanted:
        row = summary(cell, [[(times[old], times[new]) for times in turn[cell]] for turn in turns])
        rows.append({"build": names[new], "against": names[old], **row})
        low, high = row["interval_us"]
        print(
            f"{row['context']:5} R={row['ranks']} {row['op']:5} T={row['tokens']:<4} H={row['hidden']} "
            f"strategy={row['strategy']:2}: old {row['old_us']:8.3f} new {row['new_us']:8.3f} us, "
            f"new - old {row['difference_us']:+.4f} [{low:+.4f}, {high:+.4f}]{' SLOWER' if row['slower'] else ''}"
        )
    return rows


def summary(cell: Cell, turns: list[list[Pair]]) -> dict[str, Any]:
    """Of one cell, over all turns."""
    every = [pair for turn in turns for pair in turn]
    means = [statistics.mean(new - old for old, new in turn) for turn in turns]
    mean = statistics.mean(means)
    half = T95[max(n for n in T95 if n <= len(turns) - 1)] * statistics.stdev(means) / math.sqrt(len(turns))
    return {
        **asdict(cell),
        "pairs": len(every),
        "old_us": round(statistics.median(old for old, _ in every), 3),
        "new_us": round(statistics.median(new for _, new in every), 3),
        "difference_us": round(mean, 4),
        "interval_us": [round(mean - half, 4), round(mean + half, 4)],
        "slower": mean - half > 0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True)
    parser.add_argument("--new", type=Path, action="append", help="this checkout, if none is named")
    parser.add_argument("--apart", action="store_true", help="hold each --new against --old")
    parser.add_argument("--turns", type=int, default=12, help="6 or more, even, a multiple of the number of builds")
    parser.add_argument("--pairs", type=int, default=4, help=f"of each turn; {LEAST_PAIRS} in all at least")
    parser.add_argument("--cells", choices=("small", "all", "many", "chains"), default="all")
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--seconds", type=float, default=3600.0, help="no turn begins that is not expected to end by then"
    )
    options = parser.parse_args()
    folders = [folder.resolve() for folder in (options.old, *(options.new or [ROOT]))]
    round_of = math.lcm(2, len(folders))
    if options.turns < 6 or options.turns % round_of or options.turns * options.pairs < LEAST_PAIRS:
        given = f"--turns {options.turns} --pairs {options.pairs}, {len(folders)} builds"
        parser.error(f"{given}: wanted 6 turns or more, a multiple of {round_of}, and {LEAST_PAIRS} pairs in all")
    wanted = list(cells(options.cells))
    turns: list[dict[Cell, list[Times]]] = []
    began, took = time.monotonic(), 0.0
    while len(turns) < options.turns and took * (1 + 1 / max(1, len(turns))) < options.seconds:
        turns.append(run_turn(folders, wanted, options.pairs, len(turns)))
        took = time.monotonic() - began
    if len(turns) < round_of:
        print(f"no time for {round_of} turns, of which each build has each place: {len(turns)} in {took:.0f} s")
        return 2
    turns = turns[: len(turns) // round_of * round_of]
    rows: list[dict[str, Any]] = []
    for new in range(1, len(folders)):
        rows += compare(wanted, turns, [folder.name for folder in folders], 0 if options.apart else new - 1, new)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    slower, pairs = sum(row["slower"] for row in rows), len(turns) * options.pairs
    print(f"{len(rows)} cells of {len(turns)} x {options.pairs} pairs: {slower} slower beyond the interval")
    if pairs < LEAST_PAIRS:
        print(f"{pairs} pairs say little, {LEAST_PAIRS} were wanted: no time for more turns")
        return 2
    return int(slower > 0)


if __name__ == "__main__":
    sys.exit(main())
