"""CPU time of one eager fused call: ours, functional, and FlashInfer's. `python bench/cpu_cost.py [--json FILE]`

Method: a long sleep kernel keeps the GPU busy, a few hundred calls are queued behind it (fewer than the launch queue
holds, so none waits), and the time of queueing them is divided by their number; median over repeats, then the slowest
rank. The GPU's part is not in it. Both sides allocate their outputs, as a server's compiled graph or eager layer does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import launch, options

CALLS, REPEATS = 300, 15
SLEEP_CYCLES = 60_000_000  # 30 ms


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="(bench/results/cpu_cost/<machine>.json on GPUs)")
    parser.add_argument("--peers", default="flashinfer", help="'' for none")
    for ignored in ("--scratch", "--without"):
        parser.add_argument(ignored, help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    options.settle_multicast(allow=False)
    if "RANK" not in os.environ:
        command = [str(Path(__file__)), *sys.argv[1:]]
        return launch.run(command, args.processes, deadline=time.monotonic() + 600)
    return work(args)


def work(args: argparse.Namespace) -> int:
    import torch
    import torch.distributed as dist

    from bench import progress, results
    from bench.buffers import EPS, make_inputs
    from bench.cells import Cell
    from bench.team import join_world, make_team
    from bench.variant import Limits
    from bench.worker import COMPILE_LIMIT, attempt, machine_name
    from mnnvl_ar import Workspace, ops

    rank, size, device = join_world(args.device)
    team = make_team(size, device)
    assert team is not None
    cell = Cell("fused", size, args.tokens, args.hidden, "bfloat16", "eager")
    inputs = make_inputs(cell, rank, CALLS, device)
    x, residual, weight = inputs.xs[0], inputs.residuals[0], inputs.weight
    variants: dict[str, Callable[[], object]] = {}

    workspace = Workspace(team.control, args.tokens, args.hidden, torch.bfloat16, device=device)
    handle = workspace.handle
    variants["mnnvl_ar"] = lambda: ops.all_reduce_rms_norm(x, residual, weight, EPS, handle)

    if args.peers and device.type == "cuda":
        from bench.peers.flashinfer_trtllm import FlashInferTrtllm

        progress.report("setting up flashinfer", "flashinfer", COMPILE_LIMIT)
        peer, failure = attempt(lambda: FlashInferTrtllm(team, Limits(args.tokens, args.hidden, (torch.bfloat16,))))
        if (why := team.vote(failure)) is None and peer is not None:
            variants["flashinfer"] = peer.functional(cell, inputs)
        elif rank == 0:
            print(f"skipped flashinfer: {why}")

    machine = machine_name(device, size)
    rows = []
    for name, call in variants.items():
        progress.report(f"timing {name}", None if name == "mnnvl_ar" else name)
        us = max(team.gather(cpu_us(call, device)))
        rows.append({"variant": name, "cpu_us": round(us, 3)})
        if rank == 0:
            print(f"{name:<16}{us:8.2f} us of CPU a call (T={args.tokens}, H={args.hidden}, {machine})")
    if rank == 0:
        file = args.json or results.FOLDER / "cpu_cost" / f"{results.machine_slug(machine)}.json"
        if args.json or device.type == "cuda":
            file.parent.mkdir(parents=True, exist_ok=True)
            record = {"machine": machine, "source_digest": results.source_digest(), "rows": rows}
            file.write_text(json.dumps(record, indent=1) + "\n")
    team.barrier()
    workspace.close()
    dist.destroy_process_group()
    return 0


def cpu_us(call: Callable[[], object], device: object) -> float:
    """Median CPU time of `call`, in us, with the GPU out of the way."""
    import torch
    import torch.distributed as dist

    on_gpu = torch.device(str(device)).type == "cuda"
    calls = CALLS if on_gpu else 20
    samples = []
    for _ in range(REPEATS):
        dist.barrier()
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda._sleep(SLEEP_CYCLES)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter() - start) * 1e6 / calls)
        if on_gpu:
            torch.cuda.synchronize()
    return sorted(samples)[len(samples) // 2]


if __name__ == "__main__":
    sys.exit(main())
