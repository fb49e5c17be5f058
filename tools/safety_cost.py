"""What safety costs: the library beside a build of it without any. `python -m tools.safety_cost --ranks 4`

The bare build (`MNNVL_AR_BARE=1 python setup.py build_ext --inplace` -> tests/_C_bare.so) has no deadline, signature,
call status, check of the launch shape or check for two calls at once. The two builds are timed in turn, each in
processes of its own: a graph of 2000 fused calls of one token, replayed. A time is the median over replays, of the
slowest rank, and the median over turns; a difference smaller than the spread over turns means nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from tools import ROOT, gpu_record

# Ranks leave the barrier before a replay at different times; a graph has to last long compared with that.
CALLS, REPLAYS, TURNS = 2000, 20, 5
CALLS_ON_HOST = 200


def microseconds_a_call(rank: Any, tokens: int, hidden: int) -> float:
    """Runs on every rank. On the host, where there are no graphs, the calls are made one by one."""
    import torch

    from mnnvl_ar import ops

    dtype = torch.bfloat16
    workspace = rank.new_workspace(max_tokens=tokens, hidden=hidden, dtype=dtype)
    x, residual, norm = (torch.ones(tokens, hidden, dtype=dtype, device=rank.device) for _ in range(3))
    weight = torch.ones(hidden, dtype=dtype, device=rank.device)

    count = CALLS if rank.device.type == "cuda" else CALLS_ON_HOST

    def calls() -> None:
        for _ in range(count):
            ops.all_reduce_rms_norm_out(x, residual, weight, 1e-6, norm, residual, workspace.handle)

    replay, times = calls, []
    if rank.device.type == "cuda":
        calls()
        rank.barrier()
        replay = rank.capture(calls).replay
    for _ in range(REPLAYS):
        rank.barrier()
        began = time.perf_counter()
        replay()
        rank.synchronize()
        times.append((time.perf_counter() - began) / count * 1e6)
    workspace.close()
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--record", type=Path, help="add the figures to this GPU record (tools/gpu_record.py)")
    options = parser.parse_args()

    from common.ranks import RankPool
    from tools import safety_cost as module  # by its name, so that ranks can import it

    builds = {"safe": ROOT / "mnnvl_ar/_C.so", "bare": ROOT / "tests/_C_bare.so"}
    if missing := [str(file.relative_to(ROOT)) for file in builds.values() if not file.exists()]:
        print(f"not built: {', '.join(missing)}")
        return 1
    pools = {name: RankPool(options.ranks, options.device, library=file) for name, file in builds.items()}
    took: dict[str, list[float]] = {name: [] for name in builds}
    for _ in range(TURNS):
        for name, pool in pools.items():
            took[name].append(max(pool.run(module.microseconds_a_call, options.tokens, options.hidden, timeout=120)))
    for pool in pools.values():
        pool.close()
    figures: dict[str, Any] = {"ranks": options.ranks, "tokens": options.tokens, "hidden": options.hidden}
    for name, times in took.items():
        figures[f"{name}_us"] = round(statistics.median(times), 3)
        figures[f"{name}_spread_us"] = round(max(times) - min(times), 3)
    figures["cost_us"] = round(figures["safe_us"] - figures["bare_us"], 3)
    print(json.dumps(figures))
    if options.record:
        gpu_record.merge("cost of safety", f"cost of safety, {options.ranks} ranks", figures, options.record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
