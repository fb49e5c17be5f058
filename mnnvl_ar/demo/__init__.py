"""`python -m mnnvl_ar demo`: real ranks, the traffic of a server, and every bit of every output held against the
reference.

One process a GPU where there are two or more, else 4 ranks on the host. Exit status: 0, all bits right; 1, a wrong
bit; 2, a rank failed, died or hung, or an argument is wrong; 130 and 143, stopped by Ctrl-C and by SIGTERM.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from mnnvl_ar._library import named
from mnnvl_ar._library import ops as library
from mnnvl_ar.demo import show
from mnnvl_ar.demo.rank import Task, serve
from mnnvl_ar.demo.traffic import CAPTURED
from mnnvl_ar.ranks import RankPool, RanksFailed

HOST_RANKS = 4
MOST_RANKS: int = named(library._block_layout, 0)["max_ranks"]
MOST_TOKENS = {"cpu": 16, "cuda": 512}
SILENCE = 90.0  # seconds without a word from any rank after which they are taken for hung


def add_arguments(parser: argparse.ArgumentParser) -> None:
    length = parser.add_mutually_exclusive_group()
    seconds = _number(float, 0.001, 1_000_000)
    length.add_argument("--seconds", type=seconds, default=40.0, help="how long to call, after setting up (default 40)")
    length.add_argument(
        "--calls",
        type=_number(int, 1, 10**12),
        default=0,
        help="how many calls to make instead, rounded up to whole passes",
    )
    parser.add_argument(
        "--ranks",
        type=_number(int, 1, MOST_RANKS),
        default=0,
        help="how many ranks (default: one a GPU, or 4 on the host)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where the ranks are: on GPUs, on the host, or (auto) on GPUs if there are two or more",
    )
    parser.add_argument(
        "--deadline", type=seconds, default=20.0, help="seconds that a call waits for its peers (default 20)"
    )
    parser.add_argument(
        "--seed", type=_number(int, 0, 2**32 - 1), default=0, help="of the inputs and of the order of calls (default 0)"
    )
    parser.add_argument(
        "--broken-rules", type=int, default=0, help=argparse.SUPPRESS
    )  # negative control; test builds only


def _number(kind: type[int] | type[float], least: float, most: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:  # NaN is not
            raise argparse.ArgumentTypeError(f"is {text}, wanted a number from {least} to {most}")
        return value

    return parse


def run(args: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # an end that cleans up
    try:
        return _run(args)
    except RanksFailed as error:
        rank, why = next(iter(error.problems.items()))  # the others mostly say that they waited for it
        print(f"mnnvl_ar demo: FAILED: rank {rank}: {why}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mnnvl_ar demo: stopped", file=sys.stderr)
        return 128 + signal.SIGINT


def _run(args: argparse.Namespace) -> int:
    gpus = torch.cuda.device_count()
    device = args.device if args.device != "auto" else "cuda" if gpus >= 2 else "cpu"
    ranks = args.ranks or (gpus if device == "cuda" else HOST_RANKS)
    if device == "cuda" and not 1 <= ranks <= gpus:
        wanted = f"{ranks} GPUs are wanted" if ranks else "a GPU is wanted"
        print(f"mnnvl_ar demo: {wanted}, there are {gpus}. --device cpu runs on the host.", file=sys.stderr)
        return 2
    most = MOST_TOKENS[device]
    where = f"one a GPU ({torch.cuda.get_device_name(0)})" if device == "cuda" else "on the host"
    print(f"mnnvl_ar demo: {ranks} ranks, {where}", flush=True)
    if device == "cpu":
        why = f"there are {gpus} GPUs, and two are needed" if args.device == "auto" else "asked for"
        left_out = sum(tokens > most for tokens in CAPTURED)
        text = f"Host transport: {why}. Left out: CUDA graphs, and the {left_out} captured sizes above {most} tokens."
        print(text, flush=True)
    began = time.monotonic()
    task = Task(args.seed, most, args.seconds, args.calls, args.deadline, args.broken_rules)
    wrong = show.table(_run_ranks(ranks, device, task))
    print(f"{time.monotonic() - began:.0f} s, set-up included.")
    return 1 if wrong else 0


def _run_ranks(ranks: int, device: str, task: Task) -> list[tuple[Any, ...]]:
    """Each rank's result, of `serve`."""
    bar = show.Bar()

    def heard(rank: int, progress: tuple[float, int]) -> None:
        if rank == 0:
            bar.show(*progress)

    try:
        with RankPool(ranks, device) as pool:
            return pool.start(serve, task).results(SILENCE, grace=0.0, heard=heard)
    finally:
        bar.close()
