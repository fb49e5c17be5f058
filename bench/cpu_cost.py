"""CPU time of one eager fused call over that of `torch.add(out=)`. `python bench/cpu_cost.py [--json FILE]`

mnnvl_ar:         functional: outputs are allocated, as a server's compiled graph or eager layer does
mnnvl_ar/out:     the `_out` form, into tensors that are there
mnnvl_ar/bound:   the same, bound (mnnvl_ar.bind)
nothing:          an op with the arguments of the `_out` form that does nothing (bench/nothing.py): nothing is launched
flashinfer:       FlashInfer's, where it is installed, outputs allocated, as its users call it
torch.add(out=):  one kernel without allocation: what PyTorch and the driver take at least. A machine drifts by the
                  hour, so state a cost as a ratio to this one of the same run

Method: a long sleep kernel keeps the GPU busy, a few hundred calls are queued behind it (fewer than the launch queue
holds, so none waits), and the time of queueing them is divided by their number. The GPU's part is not in it. The forms
take turns in each repeat, each of them first sometimes. `cpu_us` is the median over repeats, `over_add` that of the
ratios to the same repeat's `torch.add`, each with its 95 % interval (bench/timing.py); the slowest rank counts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import launch, options

CALLS, REPEATS = 300, 20
ADD = "torch.add(out=)"
Call = Callable[[], object]
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

    from bench import nothing, progress, results
    from bench.buffers import EPS, make_inputs
    from bench.cells import Cell
    from bench.team import join_world, make_team
    from bench.variant import Limits
    from bench.worker import COMPILE_LIMIT, attempt, machine_name
    from mnnvl_ar import Workspace, bind, ops

    rank, size, device = join_world(args.device)
    team = make_team(size, device)
    assert team is not None
    cell = Cell("fused", size, args.tokens, args.hidden, "bfloat16", "eager")
    inputs = make_inputs(cell, rank, CALLS, device)
    x, residual, weight = inputs.xs[0], inputs.residuals[0], inputs.weight
    variants: dict[str, Call] = {}

    workspace = Workspace(team.control, args.tokens, args.hidden, torch.bfloat16, device=device)
    handle = workspace.handle
    norm, total, z = (torch.empty_like(x) for _ in range(3))
    variants[ADD] = lambda: torch.add(x, residual, out=total)
    variants["mnnvl_ar"] = lambda: ops.all_reduce_rms_norm(x, residual, weight, EPS, handle)
    variants["mnnvl_ar/out"] = lambda: ops.all_reduce_rms_norm_out(x, residual, weight, EPS, norm, z, handle)
    variants["mnnvl_ar/bound"] = bind(ops.all_reduce_rms_norm_out, x, residual, weight, EPS, norm, z, handle)

    progress.report("compiling an op that does nothing", limit=COMPILE_LIMIT)
    bare, failure = attempt(nothing.op)
    if (why := team.vote(failure)) is None and bare is not None:
        variants["nothing"] = lambda: bare(x, residual, weight, EPS, norm, z, handle)
    elif rank == 0:
        print(f"skipped nothing: {why}")

    if args.peers and device.type == "cuda":
        from bench.peers.flashinfer_trtllm import FlashInferTrtllm

        progress.report("setting up flashinfer", "flashinfer", COMPILE_LIMIT)
        peer, failure = attempt(lambda: FlashInferTrtllm(team, Limits(args.tokens, args.hidden, (torch.bfloat16,))))
        if (why := team.vote(failure)) is None and peer is not None:
            variants["flashinfer"] = peer.functional(cell, inputs)
        elif rank == 0:
            print(f"skipped flashinfer: {why}")

    machine = machine_name(device, size)
    for name, call in variants.items():  # alone at first, so that a peer that hangs has a name
        progress.report(f"first calls of {name}", name if name == "flashinfer" else None)
        for _ in range(3):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    progress.report("timing", limit=300.0)
    rows = figures(team.gather(cpu_us(variants, device)))
    if rank == 0:
        print(f"us of CPU a call (T={args.tokens}, H={args.hidden}, {machine}); over {ADD} of the same run")
        print("\n".join(map(line, rows)))
        file = args.json or results.FOLDER / "cpu_cost" / f"{results.machine_slug(machine)}.json"
        if args.json or device.type == "cuda":
            file.parent.mkdir(parents=True, exist_ok=True)
            record = {"machine": machine, "source_digest": results.source_digest(), "rows": rows}
            file.write_text(json.dumps(record, indent=1) + "\n")
    team.barrier()
    workspace.close()
    dist.destroy_process_group()
    return 0


def cpu_us(variants: Mapping[str, Call], device: object) -> dict[str, list[float]]:
    """CPU time of each variant's call in us, repeat by repeat, with the GPU out of the way. Collective."""
    import torch
    import torch.distributed as dist

    on_gpu = torch.device(str(device)).type == "cuda"
    calls = CALLS if on_gpu else 20
    samples: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for number in range(REPEATS):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            call = variants[name]
            dist.barrier()
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda._sleep(SLEEP_CYCLES)
            start = time.perf_counter()
            for _ in range(calls):
                call()
            samples[name].append((time.perf_counter() - start) * 1e6 / calls)
            if on_gpu:
                torch.cuda.synchronize()
    return samples


def figures(ranks: Sequence[Mapping[str, Sequence[float]]]) -> list[dict[str, Any]]:
    """Rows of the record, of each rank's repeats by variant; the rank with the largest median counts."""
    from bench.timing import interval, percentile

    def stated(name: str, of_ranks: Sequence[Sequence[float]]) -> dict[str, float]:
        slowest = max(of_ranks, key=lambda samples: percentile(samples, 0.5))
        low, high = interval(slowest)
        found = {name: percentile(slowest, 0.5), f"{name}_low": low, f"{name}_high": high}
        return {key: round(value, 3) for key, value in found.items()}

    rows = []
    for name in ranks[0]:
        times = [rank[name] for rank in ranks]
        ratios = [[us / add for us, add in zip(rank[name], rank[ADD], strict=True)] for rank in ranks]
        rows.append({"variant": name, **stated("cpu_us", times), **stated("over_add", ratios)})
    return rows


def line(row: Mapping[str, Any]) -> str:
    us, times = (
        f"{row[key]:8.2f} [{row[f'{key}_low']:.2f} {row[f'{key}_high']:.2f}]" for key in ("cpu_us", "over_add")
    )
    return f"{row['variant']:<16}{us} us {times}x"


if __name__ == "__main__":
    sys.exit(main())
