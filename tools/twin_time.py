"""Times the twin (mnnvl_ar/dsl) beside the library's one-shot: microseconds a call, on virtual ranks of one GPU.

    python -m tools.twin_time [--ranks 2] [--hidden 7168] [--tokens 1,8,32] [--record FILE]

Both are captured in graphs of 100 calls, and replayed in turn; a figure is the median over replays, of rank 0. Virtual
ranks share one GPU, and what they send stays on it: the figures compare the two, and say nothing of a link.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # two ranks' streams must not share a hardware queue

import torch

CALLS, REPLAYS = 100, 30


def timed(rank: Any, sizes: list[tuple[int, int]]) -> dict[str, float]:
    """By "TxH, who": the time of a call on this rank. Run by all virtual ranks."""
    from common.cases.calls import Prepared
    from common.cases.twin import WORKSPACE, normed
    from mnnvl_ar import dsl, ops

    handle = rank.workspace(**WORKSPACE).handle
    found: dict[str, float] = {}
    for tokens, hidden in sizes:
        call = Prepared(rank, normed(tokens=tokens, hidden=hidden, out="E"))
        outs = call.norm_out, call.residual_out

        def library(c: Any = call, outs: Any = outs) -> None:
            ops.all_reduce_rms_norm_out(c.x, c.residual, c.weight, 1e-6, outs[0], outs[1], handle, strategy=0)

        def twin(c: Any = call, outs: Any = outs) -> None:
            dsl.all_reduce_rms_norm(c.x, c.residual, c.weight, 1e-6, handle, strategy=0, out=outs)

        ways = {"library": library, "twin": twin}
        graphs = {name: rank.capture(lambda make=make: [make() for _ in range(CALLS)]) for name, make in ways.items()}
        times: dict[str, list[float]] = {name: [] for name in graphs}
        for number in range(REPLAYS + 3):
            for name, graph in graphs.items():
                began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                rank.barrier()
                graph.replay()  # so that ranks are together, and the queue is filled behind it
                began.record()
                graph.replay()
                ended.record()
                rank.barrier()
                if number >= 3:
                    times[name].append(began.elapsed_time(ended) * 1000 / CALLS)
        found |= {f"{tokens}x{hidden}, {name}": round(statistics.median(all_), 2) for name, all_ in times.items()}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--tokens", default="1,8,32")
    parser.add_argument("--record", type=Path, help="add the figures to this GPU record (tools/gpu_record.py)")
    options = parser.parse_args()
    from common.virtual_ranks import VirtualRanks
    from mnnvl_ar import dsl
    from mnnvl_ar.dsl.launch import TwinUnavailable

    try:
        dsl.load("cuda:0", options.ranks)
    except TwinUnavailable as why:
        print(f"not timed: {why}")
        return 0
    sizes = [(int(tokens), options.hidden) for tokens in options.tokens.split(",")]
    figures = VirtualRanks(options.ranks).run(timed, sizes, timeout=100)[0]
    for name, us in figures.items():
        print(f"{name}: {us} us a call")
    if options.record:
        from tools import gpu_record

        key = f"twin beside the library, {options.ranks} virtual ranks"
        gpu_record.merge("twin", key, {"us_a_call": figures}, options.record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
