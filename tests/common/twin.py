"""The twin in the library's place, on virtual ranks of one GPU: on some ranks, in some calls, or wherever it can.

    processes.run(in_virtual_ranks, 2, check_calls, "one", calls, workspace, timeout=60)

runs `check_calls(rank, calls, workspace)` on two virtual ranks in a process of its own, and returns how many calls the
twin made there. Sides: "none", "both", "one" (rank 0), "other" (all but rank 0), "random" (each call of each rank is
drawn). Calls that the twin does not have are the library's on every side: other ops and dtypes, two-shot.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import torch

from mnnvl_ar._library import named

SIDES = ("none", "both", "one", "other", "random")

_here = threading.local()  # of a virtual rank: `takes`, which says of a call whether it is the twin's, and `made`
_library: dict[str, Any] = {}  # the ops whose place the choice has taken
_installing = threading.Lock()


def in_virtual_ranks(_: Any, world_size: int, function: Callable[..., Any], side: str, *arguments: Any) -> int:
    """By a single process, which makes its virtual ranks itself. Returns how many calls the twin made."""
    from common.virtual_ranks import VirtualRanks
    from mnnvl_ar import dsl

    dsl.load("cuda:0", world_size)
    ranks = VirtualRanks(world_size)
    made = ranks.run(beside, function, side, *arguments, timeout=100)
    ranks.close()
    return sum(made)


def beside(rank: Any, function: Callable[..., Any], side: str, *arguments: Any) -> int:
    """`function(rank, ...)` with the twin in the library's place on this side."""
    install()
    _here.takes, _here.made = taker(side, rank.rank), 0
    try:
        function(rank, *arguments)
    finally:
        _here.takes = None
    return int(_here.made)


def in_place_of(work: Callable[[], None]) -> Callable[[], None]:
    """`work` for another thread, whose calls are then made by whom those of this thread are."""
    takes = getattr(_here, "takes", None)

    def elsewhere() -> None:
        _here.takes, _here.made = takes, 0
        work()

    return elsewhere


def taker(side: str, rank: int) -> Callable[[], bool]:
    draw = random.Random(rank)
    fixed = {"none": False, "both": True, "one": rank == 0, "other": rank != 0}
    return lambda: draw.random() < 0.5 if side == "random" else fixed[side]


def install() -> None:
    """Puts the choice in place of `mnnvl_ar.ops.all_reduce_rms_norm`, of its `_out` form and of torch.ops', for good. A
    thread that says nothing gets the library's."""
    from mnnvl_ar import ops

    with _installing:
        if not _library:
            _library.update(new=ops.all_reduce_rms_norm, out=ops.all_reduce_rms_norm_out)
            ops.all_reduce_rms_norm = choose  # type: ignore[assignment]
            ops.all_reduce_rms_norm_out = choose_out  # type: ignore[assignment]
            torch.ops.mnnvl_ar.all_reduce_rms_norm = choose


def is_ours(x: torch.Tensor, workspace: int, options: dict[str, Any]) -> bool:
    """Whether this thread's call is the twin's. Counts it."""
    takes = getattr(_here, "takes", None)
    if takes is None or not has(x, workspace, options.get("strategy", -1)) or not takes():
        return False
    _here.made += 1
    return True


def choose(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, workspace: int, **options: Any
) -> Any:
    from mnnvl_ar import dsl

    call = dsl.all_reduce_rms_norm if is_ours(x, workspace, options) else _library["new"]
    return call(x, residual, weight, eps, workspace, **options)


def choose_out(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    norm_out: torch.Tensor,
    residual_out: torch.Tensor,
    workspace: int,
    **options: Any,
) -> None:
    from mnnvl_ar import dsl

    if is_ours(x, workspace, options):
        dsl.all_reduce_rms_norm(x, residual, weight, eps, workspace, out=(norm_out, residual_out), **options)
    else:
        _library["out"](x, residual, weight, eps, norm_out, residual_out, workspace, **options)


def has(x: torch.Tensor, workspace: int, strategy: int) -> bool:
    """Whether the twin has a call of this kind."""
    if x.dtype != torch.bfloat16 or x.numel() == 0 or x.shape[-1] > 8192:
        return False
    row_bytes = x.shape[-1] * x.element_size()
    tokens = x.numel() // x.shape[-1]
    return int(named(torch.ops.mnnvl_ar._workspace_choice, workspace, tokens, row_bytes, strategy)["strategy"]) == 0


KINDS = (
    "slow",
    "exception",
    "skipped call",
    "extra call",
    "wrong shape",
    "wrong op",
    "wrong order",
    "other tag",
    "other eps",
    "other weight bias",
    "other weight dtype",
    "honest",
)


def rounds_of_faults(_: Any, side: str, own_sizes: bool) -> list[str]:
    """Two rounds of the library's fault matrix for each kind of fault that virtual ranks can have, and each number of
    ranks. By a single process. Returns what went wrong."""
    from dataclasses import replace

    from common.cases.twin import normed
    from common.virtual_ranks import VirtualRanks
    from mnnvl_ar import dsl
    from tools.faults import plan as plans
    from tools.faults.run import judge

    if own_sizes:
        small = [normed(tokens=t, hidden=h, seed=t) for t in (1, 8, 32) for h in (64, 264)]
        plans.SIZES["cuda"][:] = small
    problems, made = [], 0
    for world in (2, 4):
        dsl.load("cuda:0", world)
        ranks = VirtualRanks(world)
        for number in range(2 * len(KINDS)):
            plan = plans.draw(number, world, 0.5, 7, KINDS, "cuda")
            plan = replace(plan, recover=False, graphs=False)
            ended = ranks.run(round_beside, side, plan, timeout=30)
            made += sum(calls for _, calls in ended)
            for rank, (outcome, _) in enumerate(ended):
                problems += [f"{plan.kind} of {world}, rank {rank}: {line}" for line in judge(plan, rank, outcome)]
                problems += [f"{plan.kind} of {world}, rank {rank}: {line}" for line in outcome.wrong]
    enough = 300 if own_sizes else 60
    return problems or ([] if made > enough else [f"the twin made {made} calls"])


def round_beside(rank: Any, side: str, plan: Any) -> tuple[Any, int]:
    from common.cases.twin import check_round

    ended: list[Any] = []
    made = beside(rank, lambda rank: ended.append(check_round(rank, plan)), side)
    return ended[0], made
