"""A soak: fused calls in replayed graphs of 1,000, back to back, the last of each graph checked bit for bit.

    python -m tools.replay.soak --ranks 8                     1,000,000 calls of 1 to 8 tokens, hidden size 4096
    python -m tools.replay.soak --ranks 2 --device cpu --calls 20000 --hidden 64

Prints its progress and a line of JSON; `--record` adds the figures to a GPU record. Exits 1 if a row was wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

A_GRAPH = 1000  # calls
TOKENS = 8  # at most


def soak(rank: Any, calls: int, hidden: int, seed: int) -> dict[str, Any]:
    """Runs on every rank.

    Each graph holds calls of 1 to 8 tokens, one-shot and two-shot, in turn on all sets of inputs. The checked call
    takes a set that differs from replay to replay, by an index on the device.
    """
    import torch

    from common.rows import DTYPES
    from mnnvl_ar import ops
    from tools.replay.script import SETS
    from tools.replay.tables import DISTINCT, EPS, make_tables

    device, dtype = rank.device, DTYPES["bf16"]
    tables = make_tables(rank.rank, rank.world_size, hidden, "bf16", seed, device, TOKENS)
    workspace = rank.new_workspace(max_tokens=4 * TOKENS, hidden=hidden, dtype=dtype, deadline=30.0)
    handle = workspace.handle
    turn = torch.zeros(1, dtype=torch.int64, device=device)
    token = torch.arange(TOKENS, device=device)
    wrong = torch.zeros(1, dtype=torch.int64, device=device)
    outputs = [[torch.empty(TOKENS, hidden, dtype=dtype, device=device) for _ in range(2)] for _ in range(2)]
    xs = [
        [table[s * DISTINCT : s * DISTINCT + TOKENS].clone().view(dtype) for s in range(SETS)]
        for table in (tables.x, tables.residual)
    ]

    def call(x: torch.Tensor, residual: torch.Tensor, to: list[torch.Tensor], tokens: int, strategy: int) -> None:
        norm, z = (out[:tokens] for out in to)
        ops.all_reduce_rms_norm_out(x, residual, tables.weight, EPS, norm, z, handle, strategy=strategy)

    def graph(number: int) -> None:
        draw = random.Random(1000 * seed + number)
        picks = [
            (draw.randint(1, TOKENS), draw.choice((-1, -1, -1, 0, 1)), draw.randrange(SETS)) for _ in range(A_GRAPH)
        ]
        checked = picks[-1][0]
        rows = (turn % SETS) * DISTINCT + token[:checked]
        last = [table.index_select(0, rows).view(dtype) for table in (tables.x, tables.residual)]
        for at, (tokens, strategy, which) in enumerate(picks[:-1]):
            call(xs[0][which][:tokens], xs[1][which][:tokens], outputs[at % 2], tokens, strategy)
        call(last[0], last[1], outputs[1], checked, picks[-1][1])
        for got, table in zip(outputs[1], tables.answers["fused"], strict=True):
            wrong.add_(torch.ne(got[:checked].view(torch.int32), table.index_select(0, rows)).any(-1).sum())
        turn.add_(1)

    graphs: list[Any] = []
    for number in range(8):
        if device.type == "cuda":
            graph(number)  # warms up
            rank.barrier()
            graphs.append(rank.capture(lambda number=number: graph(number)).replay)
        else:
            graphs.append(lambda number=number: graph(number))
    rank.barrier()
    began, replays = time.monotonic(), max(1, calls // A_GRAPH)
    for number in range(replays):
        graphs[number % len(graphs)]()
        if number % max(1, replays // 10) == 0:
            rank.synchronize()
            if rank.rank == 0:
                seconds = time.monotonic() - began
                print(f"{number * A_GRAPH:,} calls, {seconds:.1f} s, wrong rows {wrong.item()}", flush=True)
    rank.synchronize()
    seconds = time.monotonic() - began
    workspace.check()
    rank.barrier()
    workspace.close()
    made = replays * A_GRAPH
    return {"calls": made, "checked": replays, "wrong_rows": int(wrong.item()), "seconds": round(seconds, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--record", type=Path, help="add the figures to this GPU record (tools/gpu_record.py)")
    options = parser.parse_args()

    from common.ranks import RankPool
    from tools.replay import soak as module  # by its name, so that ranks can import it

    pool = RankPool(options.ranks, options.device)
    figures = pool.run(module.soak, options.calls, options.hidden, options.seed, timeout=600)
    pool.close()
    result = {
        "ranks": options.ranks,
        "device": options.device,
        "hidden": options.hidden,
        "tokens": f"1 to {TOKENS}",
        "seed": options.seed,
        **figures[0],
        "wrong_rows": sum(each["wrong_rows"] for each in figures),
        "microseconds_a_call": round(figures[0]["seconds"] / figures[0]["calls"] * 1e6, 2),
    }
    print(json.dumps(result))
    if options.record:
        from tools import gpu_record

        good = result["wrong_rows"] == 0
        gpu_record.merge("replays", f"soak, {options.ranks} ranks", result, options.record, good=good)
    sys.exit(result["wrong_rows"] > 0)


if __name__ == "__main__":
    main()
