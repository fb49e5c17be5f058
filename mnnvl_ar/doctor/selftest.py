"""A short test of real ranks: bring-up, bits, latency, bandwidth; on GPUs then of every two ranks by themselves."""

from __future__ import annotations

import math
import statistics
import time
import traceback
from typing import Any

import torch
import torch.distributed as dist

import mnnvl_ar
from mnnvl_ar.doctor import pairs
from mnnvl_ar.ranks import Rank, RankPool

HIDDEN = 8192
SMALL, LARGE = 1, {"cpu": 16, "cuda": 1024}  # tokens
CALLS, CALLS_BY_TURNS = {"cpu": 3, "cuda": 20}, 3  # of a batch; by ranks that share a GPU
_MOST_ROUNDS = 10_000
_SPARE = 2.0  # seconds in which what the pairs have found can still be told


def run(gpus: int, seconds: float, limit: float) -> dict[str, Any]:
    """Ranks in processes of their own, one a GPU, or two on the host, which are killed `limit + seconds` seconds later.
    Returns their `summary`."""
    if seconds <= 0:
        return {"ran": False}
    size, device = (gpus, "cuda") if gpus else (2, "cpu")
    with RankPool(size) as pool:
        running = pool.start(_serve, device, seconds, limit)  # waits for PyTorch, which the limit leaves out
        outcomes = running.outcomes(limit + seconds, grace=math.inf)  # the others say what they waited for
    return summary({rank: value if ok else silent(value) for rank, (ok, value) in enumerate(outcomes)})


def measure(group: dist.ProcessGroup, device: torch.device, seconds: float, limit: float) -> dict[str, Any]:
    """Collective. {ok, error, ranks, transport, transport_reason, latency_us, bandwidth_gb_s, by_turns, ...} of this
    rank. by_turns: ranks share a GPU; without that, on GPUs also `pairs`, as `pairs.measure` has them, for what is left
    of `limit / 2 + seconds`. Raises what bring-up or calls of the whole group raise: bring-up waits `limit / 2` seconds
    for the other ranks, a call `limit / 4`."""
    until = time.monotonic() + limit / 2 + seconds
    size, large = dist.get_world_size(group), LARGE[device.type]
    with mnnvl_ar.Workspace(
        group, large, HIDDEN, torch.bfloat16, device=device, deadline=limit / 4, timeout=limit / 2, monitor=False
    ) as ws:
        found: dict[str, Any] = {"ran": True, "ok": True, "error": "", "ranks": size, "device": device.type}
        found |= {"transport": ws.transport, "transport_reason": ws.transport_reason}
        found["by_turns"] = by_turns = pairs.have_one_gpu(group, device, limit / 4)
        try:
            found |= _measured(ws, large, seconds, CALLS_BY_TURNS if by_turns else CALLS[device.type])
        except RuntimeError:
            ws.check()  # says more plainly than an op what became of a call
            raise
    if device.type == "cuda" and 1 < size <= pairs.MOST_RANKS and not by_turns:
        found["pairs"] = pairs.measure(group, device, limit / 8, until - time.monotonic() - _SPARE)
    return found


def _measured(ws: mnnvl_ar.Workspace, large: int, seconds: float, calls: int) -> dict[str, Any]:
    wrong = 0
    for tokens in (SMALL, 7, 16):
        xs = [_rows(tokens, r) for r in range(ws.world_size)]
        got = mnnvl_ar.ops.all_reduce(xs[ws.rank].to(ws.device), ws.handle)
        wrong += not mnnvl_ar.reference.same_bits(got, mnnvl_ar.reference.all_reduce(xs))
    ws.check()
    if wrong:
        raise RuntimeError(f"{wrong} of 3 sums differ from the reference")
    small, took = (_time(ws, _rows(tokens, ws.rank).to(ws.device), seconds / 2, calls) for tokens in (SMALL, large))
    row = HIDDEN * torch.bfloat16.itemsize
    return {
        "latency_us": 1e6 * small,
        "row_bytes": SMALL * row,
        "bandwidth_gb_s": large * row / took / 1e9,
        "message_bytes": large * row,
    }


def failed(why: Exception | str) -> dict[str, Any]:
    """The result of a rank whose test failed, or never began. Of an error the first line, and where it was raised."""
    if isinstance(why, str):
        return {"ran": True, "ok": False, "error": why}
    text = str(why).split("\n")[0] or type(why).__name__
    return {"ran": True, "ok": False, "error": text, "traceback": "".join(traceback.format_exception(why))}


def silent(why: str) -> dict[str, Any]:
    """The result of a rank that was not heard of, which is likelier at fault than those that waited for it."""
    return {**failed(f"said nothing more: {why}"), "silent": True}


def summary(results: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Of the results by rank: the lowest rank's, with the `pairs` of all; if a rank failed, {ran, ok: False, errors,
    by_rank}. `errors` are lines with the ranks that they came from, of silent ranks first."""
    bad = {rank: result for rank, result in sorted(results.items()) if not result.get("ok", True)}
    if not bad:
        first = results[min(results)]
        found = [result["pairs"] for result in results.values() if "pairs" in result]
        return {**first, "pairs": pairs.merge(found)} if found else first
    by_text: dict[str, list[int]] = {}
    for rank in sorted(bad, key=lambda rank: not bad[rank].get("silent", False)):
        by_text.setdefault(bad[rank]["error"], []).append(rank)
    errors = [f"{ranks(who)}: {text}" for text, who in by_text.items()]
    return {"ran": True, "ok": False, "errors": errors, "by_rank": results}


def ranks(numbers: list[int]) -> str:
    """As "rank 2", or "ranks 0, 2 and 3"."""
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    return f"ranks {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def _time(ws: mnnvl_ar.Workspace, x: torch.Tensor, seconds: float, calls: int) -> float:
    """Median seconds of a call, over batches of `calls`, as many on every rank."""
    out = torch.empty_like(x)

    def batch() -> float:
        began = time.perf_counter()
        for _ in range(calls):
            mnnvl_ar.ops.all_reduce_out(x, out, ws.handle)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return (time.perf_counter() - began) / calls

    batch()
    # How many is agreed on by a call of our own, whose sum is the same on every rank, and whose wait is bounded.
    total = mnnvl_ar.ops.all_reduce(torch.full_like(x[:1], batch()), ws.handle)[0, 0].item()
    ws.check()
    rounds = min(max(1, int(seconds * ws.world_size / (total * calls))), _MOST_ROUNDS)
    times = [batch() for _ in range(rounds)]
    ws.check()
    return statistics.median(times)


def _rows(tokens: int, rank: int) -> torch.Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(17 * rank + tokens)).bfloat16()


def _serve(rank: Rank, device: str, seconds: float, limit: float) -> dict[str, Any]:
    torch.set_num_threads(1)
    try:
        where = torch.device(device, rank.rank) if device == "cuda" else rank.device
        if where.type == "cuda":
            torch.cuda.set_device(where)  # here and not in the launcher, since a GPU that fails is a result
        return measure(rank.join(limit / 2), where, seconds, limit)
    except Exception as error:
        return failed(error)
