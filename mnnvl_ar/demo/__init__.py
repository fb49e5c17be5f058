"""`python -m mnnvl_ar demo`: real ranks, the traffic of a server, and every bit of every output held against the
reference.

One process a GPU where there are two or more, else 4 ranks on the host. Exit status: 0, all bits right; 1, a wrong
bit; 2, a rank failed, died or hung.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from mnnvl_ar.demo import show
from mnnvl_ar.demo.rank import Task, serve
from mnnvl_ar.demo.traffic import CAPTURED

HOST_RANKS = 4
MOST_TOKENS = {"cpu": 16, "cuda": 512}
SILENCE = 90.0  # seconds without a word from any rank after which they are taken for hung


class RankError(Exception):
    """A rank failed, died or hung; the text says which and why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=40.0, help="how long to call, after setting up (default 40)")
    length.add_argument(
        "--calls", type=int, default=0, help="how many calls to make instead, rounded up to whole passes"
    )
    parser.add_argument("--ranks", type=int, default=0, help="how many ranks (default: one a GPU, or 4 on the host)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--deadline", type=float, default=20.0, help="seconds that a call waits for its peers (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs and of the order of calls")
    parser.add_argument(
        "--broken-rules", type=int, default=0, help=argparse.SUPPRESS
    )  # negative control; test builds only


def run(args: argparse.Namespace) -> int:
    gpus = torch.cuda.device_count()
    device = args.device if args.device != "auto" else "cuda" if gpus >= 2 else "cpu"
    ranks = args.ranks or (gpus if device == "cuda" else HOST_RANKS)
    if device == "cuda" and not 1 <= ranks <= gpus:
        print(f"mnnvl_ar demo: --ranks: is {ranks}, wanted 1 to {gpus}, the GPUs here", file=sys.stderr)
        return 2
    most = MOST_TOKENS[device]
    where = f"one a GPU ({torch.cuda.get_device_name(0)})" if device == "cuda" else "on the host"
    print(f"mnnvl_ar demo: {ranks} ranks, {where}")
    if device == "cpu":
        why = f"there are {gpus} GPUs, and two are needed" if args.device == "auto" else "asked for"
        left_out = sum(tokens > most for tokens in CAPTURED)
        print(f"Host transport: {why}. Left out: CUDA graphs, and the {left_out} captured sizes above {most} tokens.")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mnnvl_ar-demo-") as meeting:
        task = Task(meeting, ranks, device, args.seed, most, args.seconds, args.calls, args.deadline, args.broken_rules)
        try:
            results = _run_ranks(task)
        except RankError as error:
            print(f"mnnvl_ar demo: FAILED: {error}", file=sys.stderr)
            return 2
    wrong = show.table(results)
    print(f"{time.monotonic() - began:.0f} s, set-up included.")
    return 1 if wrong else 0


def _run_ranks(task: Task) -> list[tuple[Any, ...]]:
    """Each rank's result. Raises `RankError`; no process outlives this."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mnnvl_ar.demo.rank"])  # PyTorch is imported once, not once a rank
    pipes: dict[Connection, int] = {}
    processes = []
    bar = show.Bar()
    try:
        for rank in range(task.world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=serve, args=(theirs, task, rank), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes[ours] = rank
        return _listen(pipes, bar)
    finally:
        bar.close()
        for process in processes:
            process.join(0.0 if sys.exc_info()[0] else 10.0)
            if process.is_alive():
                process.kill()
            process.join()


def _listen(pipes: dict[Connection, int], bar: show.Bar) -> list[tuple[Any, ...]]:
    results: dict[int, tuple[Any, ...]] = {}
    ranks = len(pipes)
    while pipes:
        ready = wait(list(pipes), SILENCE)
        if not ready:
            raise RankError(f"ranks {sorted(pipes.values())} have been silent for {SILENCE:.0f} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                kind, *content = pipe.recv()
            except EOFError:
                raise RankError(f"rank {pipes[pipe]} died") from None
            if kind == "error":
                raise RankError(f"rank {pipes[pipe]}:\n{content[0]}")
            if kind == "progress" and pipes[pipe] == 0:
                bar.show(*content)
            elif kind == "result":
                results[pipes.pop(pipe)] = tuple(content)
    return [results[rank] for rank in range(ranks)]
