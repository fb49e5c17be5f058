"""What pieces cost: large calls in a workspace of the default size beside the same in one that runs them at once.

    python -m tools.piece_cost --ranks 2 [--virtual] [--tokens 8192] [--hidden 4096 7168] [--out FILE]

Graphs of some calls of each, replayed in turn, the other one first every second time. A time is the median over replays
of the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

CALLS, PAIRS = 10, 30


def times_of(rank: Any, tokens: int, hidden: int, sizes: list[int | None]) -> dict[str, Any]:
    """Of every pair, the microseconds of a call for each of `sizes`, which are max_bytes. Runs on every rank."""
    import torch

    from mnnvl_ar import ops
    from mnnvl_ar._library import named

    x, residual, norm, after = (torch.ones(tokens, hidden, dtype=torch.bfloat16, device=rank.device) for _ in range(4))
    weight = torch.ones(hidden, dtype=torch.bfloat16, device=rank.device)
    graphs, pieces, workspaces = [], [], []
    for size in sizes:
        made = rank.new_workspace(tokens, hidden, torch.bfloat16, max_bytes=size, concurrent=False)
        workspaces.append(made)
        pieces.append(named(torch.ops.mnnvl_ar._workspace_choice, made.handle, tokens, hidden * 2)["pieces"])

        def calls(handle: int = made.handle) -> None:
            for _ in range(CALLS):
                ops.all_reduce_rms_norm_out(x, residual, weight, 1e-6, norm, after, handle)

        rank.barrier()
        calls()
        rank.barrier()
        graphs.append(rank.capture(calls))
    pairs = []
    for number in range(PAIRS + 2):
        took = [0.0] * len(sizes)
        for index in range(len(sizes))[:: 1 if number % 2 else -1]:
            rank.barrier()
            began = time.perf_counter()
            graphs[index].replay()
            rank.synchronize()
            took[index] = (time.perf_counter() - began) / CALLS * 1e6
        pairs.append(took)
    rank.barrier()
    for made in workspaces:
        made.close()
    return {"pieces": pieces, "pairs": pairs[2:]}


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Of what all ranks found."""
    slowest = [
        [max(values) for values in zip(*(result["pairs"][number] for result in results), strict=True)]
        for number in range(PAIRS)
    ]
    found: dict[str, Any] = {
        "pieces": results[0]["pieces"],
        "us": [round(statistics.median(column), 2) for column in zip(*slowest, strict=True)],
    }
    for name, index in (("ratio", 0), ("control", 2)):  # to the one launch, and of that to itself
        ratios = sorted(took[index] / took[1] for took in slowest)
        found[name] = [round(ratios[PAIRS * quarter // 4], 4) for quarter in (1, 2, 3)]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--virtual", action="store_true", help="ranks of one GPU")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192])
    parser.add_argument("--hidden", type=int, nargs="+", default=[4096, 7168])
    parser.add_argument("--max-bytes", type=int, default=64 << 20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    from common.ranks import RankPool
    from common.virtual_ranks import VirtualRanks
    from tools import piece_cost as module  # by its name, so that ranks can import it

    ranks = VirtualRanks(options.ranks) if options.virtual else RankPool(options.ranks, "cuda")
    rows = []
    for hidden in options.hidden:
        for tokens in options.tokens:
            results = ranks.run(module.times_of, tokens, hidden, [options.max_bytes, None, None], timeout=120)
            rows.append({"ranks": options.ranks, "tokens": tokens, "hidden": hidden, **summary(results)})
            print(json.dumps(rows[-1]), flush=True)
    ranks.close()
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
