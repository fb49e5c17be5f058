"""compute-sanitizer on the kernels: memcheck, racecheck, initcheck, synccheck on one GPU with virtual ranks.

    python -m tools.sanitize [--ranks 2 4] [--tools memcheck ...] [--timeout 240]

prints one line for each tool and world size, and exits non-zero on any finding. All run the same short script, each in
a process of its own: both ops, both strategies, three dtypes, sizes that grow and shrink, every output compared with
the reference.

Racecheck never sees the end of a cluster's split barrier, which some warps only arrive at, and the call would hang:
with it each row stays in one CTA.

Under a sanitizer, kernels run 10 to 100 times slower. Kernels of different ranks wait for each other, so they must run
at the same time; if the tool does not let them, no data arrives, the deadline ends the wait, and the line says
"serialised" instead of "clean". Racecheck looks at shared memory only, which ranks do not share: with it, --ranks 1
shows something too.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tools import ROOT, gpu_record
from tools.multicast import keep_multicast_off

TOOLS = {
    "memcheck": ["--leak-check", "no"],
    "racecheck": ["--racecheck-report", "all"],
    "initcheck": [],
    "synccheck": [],
}
CLUSTERS = {"racecheck": 1}  # CTAs a row, where not as many as the library takes
DEADLINE = 60.0  # seconds; a call takes milliseconds even here, unless ranks are serialised
WRONG, SERIALISED = 3, 4


def launch(ops: Any, handles: list[int], strategy: int, *tensors: Any) -> None:
    """A fused call, then a plain one, on one rank (the last of `tensors`), into outputs that are allocated already."""
    x, z, w, norm, after, total, rank = tensors
    ops.all_reduce_rms_norm_out(x[rank], z, w, 1e-6, norm[rank], after[rank], handles[rank], strategy=strategy)
    ops.all_reduce_out(x[rank], total[rank], handles[rank], strategy=strategy)


def work(ranks: int, cluster: int) -> int:
    """What runs under the tool. Returns 0 if all bits are right, WRONG, or SERIALISED if a rank's deadline passed."""
    import torch

    from common.rows import hostile_rows, weights
    from common.virtual import VirtualGroup
    from mnnvl_ar import reference
    from mnnvl_ar._library import named, ops

    device = torch.device("cuda:0")
    wrong = 0
    for dtype, hidden in ((torch.bfloat16, 2880), (torch.float16, 512), (torch.float32, 264)):
        shape: dict[str, Any] = {"cluster": cluster} if cluster else {}
        group = VirtualGroup(ranks, 8, hidden, dtype, "cuda:0", crossover=1 << 30, deadline=DEADLINE, **shape)
        for call, tokens in enumerate((8, 1, 3, 5, 2, 8)):
            strategy = call % 2
            inputs = [hostile_rows(tokens, hidden, dtype, seed=call, rank=rank) for rank in range(ranks)]
            residual = hostile_rows(tokens, hidden, dtype, seed=call + 100, rank=0)
            weight = weights(hidden, dtype, seed=call)
            x, z, w = [one.to(device) for one in inputs], residual.to(device), weight.to(device)
            # All memory before any launch: allocating may wait for the device, and so for ranks not yet launched.
            norm, after, total = ([torch.empty_like(z) for _ in range(ranks)] for _ in range(3))
            torch.cuda.synchronize()
            step = functools.partial(launch, ops, group.handles, strategy, x, z, w, norm, after, total)
            group.each(step)
            torch.cuda.synchronize()
            if any(named(ops._workspace_fault, handle, False)["code"] != 0 for handle in group.handles):
                return SERIALISED
            want = (*reference.all_reduce_rms_norm(inputs, residual, weight, 1e-6), reference.all_reduce(inputs))
            for got in zip(norm, after, total, strict=True):
                wrong += sum(not reference.same_bits(g, w) for g, w in zip(got, want, strict=True))
        group.close()
    return WRONG if wrong else 0


def find_sanitizer() -> str | None:
    places = [
        os.environ.get("PATH", ""),
        os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin",
        "/usr/local/cuda/bin",
    ]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def check(sanitizer: str, tool: str, ranks: int, timeout: float) -> tuple[bool, str]:
    """(clean, one line)."""
    command = [sanitizer, "--tool", tool, *TOOLS[tool], "--error-exitcode", "99", "--print-limit", "20"]
    command += [sys.executable, "-m", "tools.sanitize", "--work", str(ranks)]
    command += ["--cluster", str(CLUSTERS.get(tool, 0))]
    # A hardware queue for each stream, or ranks could wait behind one another; no caching, so that bounds are real.
    env = {**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": "32", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    head = f"{tool:10} {ranks} ranks: "
    try:
        got = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, cwd=ROOT)
    except subprocess.TimeoutExpired as late:
        output = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        return False, f"{head}no end in {timeout:.0f} s; {output[-300:].strip()}"
    output = got.stdout + got.stderr
    reports = [line for line in output.splitlines() if line.startswith("=========")]
    summary = next((line.strip("= ") for line in reversed(reports) if "SUMMARY" in line), "no summary")
    meaning = {0: "clean", 99: "FOUND", WRONG: "WRONG BITS", SERIALISED: "serialised: ranks did not run side by side"}
    clean = got.returncode == 0
    line = f"{head}{meaning.get(got.returncode, f'exit {got.returncode}')}; {summary}"
    return clean, line if clean else "\n".join([line, *reports[:40], got.stderr[-1500:]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=list(TOOLS))
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds a tool and world size")
    parser.add_argument("--record", type=Path, help="add what was found to this GPU record (tools/gpu_record.py)")
    parser.add_argument("--work", type=int, metavar="RANKS", help="run the script itself, as under a tool")
    parser.add_argument("--cluster", type=int, default=0, help="with --work: CTAs a row (0: as the library takes)")
    options = parser.parse_args()
    keep_multicast_off()
    if options.work is not None:
        return work(options.work, options.cluster)
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print("no compute-sanitizer: it comes with the CUDA toolkit, or pip install nvidia-cuda-sanitizer-api")
        return 1
    results: dict[str, bool] = {}
    for tool in options.tools:
        for ranks in options.ranks:
            clean, line = check(sanitizer, tool, ranks, options.timeout)
            print(line, flush=True)
            results[f"{tool}, {ranks} virtual ranks"] = clean
    if options.record:
        gpu_record.merge("sanitizers", "compute-sanitizer clean", results, options.record, good=all(results.values()))
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
