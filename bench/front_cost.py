"""What the FlashInfer front adds to a bare op, in CPU time of an eager call. `python bench/front_cost.py`

Method: one rank alone, the smallest row, so that an op is little but its dispatch. Batches of calls of the bare op and
of the front, with the keyword arguments that vLLM gives, take turns. Of each the CPU time of the thread in the quickest
batch, which others of the machine disturbed least; the medians are told beside it. FlashInfer is not needed: of its
function only the place is taken. Exit status 1 if the front costs more than its figure, 3 us a call.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from mnnvl_ar import Workspace, ops
from mnnvl_ar.compat.flashinfer import FUSE, wrapped
from mnnvl_ar.compat.shared import Shared
from mnnvl_ar.compat.workspace import FusionWorkspace

FIGURE = 3.0  # us
HIDDEN = 64


class Alone:
    rank, size = 0, 1

    def all_gather(self, text: str) -> Sequence[str]:
        return [text]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=50, help="of a batch (default 50)")
    parser.add_argument("--batches", type=int, default=2000)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    group = Alone()
    inner = Workspace(group, 16, HIDDEN, torch.bfloat16, device=args.device, monitor=False)
    workspace = FusionWorkspace(Shared(inner, group), "mnnvl", 16, HIDDEN, torch.bfloat16)
    costs = [
        report(name, *(bench(pair, args.calls, args.batches, args.device)))
        for name, pair in pairs(workspace, args.device).items()
    ]
    workspace.destroy()
    return int(max(costs) > FIGURE)


def pairs(workspace: FusionWorkspace, device: str) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """By pattern: the bare op, and the front."""
    x, residual, weight = (
        torch.ones(*shape, HIDDEN, dtype=torch.bfloat16, device=device) for shape in ((1,), (1,), ())
    )
    handle = workspace.handle
    front = wrapped(FUSE, lambda *arguments, **named: None)
    vllm: dict[str, Any] = {
        "launch_with_pdl": True,
        "trigger_completion_at_end": False,
        "output": None,
        "quant_out": None,
        "scale_out": None,
        "rms_eps": 1e-6,
        "scale_factor": None,
        "layout_code": 0,
        "use_oneshot": None,
        "fp32_acc": True,
        "weight_bias": 0.0,
    }

    def norm() -> None:
        ops.all_reduce_rms_norm_out(x, residual, weight, 1e-6, x, residual, handle)

    def front_norm() -> None:
        front(
            input=x, workspace=workspace, pattern=1, residual_out=residual, norm_out=x, residual_in=residual,
            rms_gamma=weight, **vllm,
        )  # fmt: skip

    def total() -> None:
        ops.all_reduce(x, handle)

    def front_total() -> None:
        front(input=x, workspace=workspace, pattern=0, launch_with_pdl=True, trigger_completion_at_end=False)

    return {"all-reduce, add, norm": (norm, front_norm), "all-reduce": (total, front_total)}


def bench(
    pair: tuple[Callable[[], Any], Callable[[], Any]], calls: int, batches: int, device: str
) -> tuple[list[float], list[float]]:
    """us of CPU a call, of the bare op and of the front, by batch."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(batches):
        for call, found in zip(pair, times, strict=True):
            if device == "cuda":
                torch.cuda.synchronize()
            began = time.thread_time()
            for _ in range(calls):
                call()
            found.append((time.thread_time() - began) * 1e6 / calls)
    return times


def report(name: str, bare: list[float], front: list[float]) -> float:
    cost, middle = min(front) - min(bare), statistics.median(front) - statistics.median(bare)
    figures = f"bare op {min(bare):6.2f} us, front {min(front):6.2f} us: costs {cost:5.2f} us of CPU a call"
    print(f"{name:<22} {figures} (at most {FIGURE:g}; by medians {middle:.2f})")
    return cost


if __name__ == "__main__":
    sys.exit(main())
