"""A short test of real ranks: bring-up, bits, latency, bandwidth."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]

import mnnvl_ar

HIDDEN = 8192
SMALL, LARGE = 1, {"cpu": 16, "cuda": 1024}  # tokens
LIMIT = 120.0  # seconds for everything, after which ranks are killed


def run(gpus: int, seconds: float) -> dict[str, Any]:
    """Ranks in processes of their own, one a GPU, or two on the host. Returns rank 0's `measure`."""
    if seconds <= 0:
        return {"ran": False}
    size, device = (gpus, "cuda") if gpus else (2, "cpu")
    context = multiprocessing.get_context("spawn")
    until = time.monotonic() + LIMIT
    with tempfile.TemporaryDirectory(prefix="mnnvl_ar-doctor-") as meeting:
        pipes, processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_serve, args=(theirs, meeting, rank, size, device, seconds), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        results = [_receive(pipe, rank, until) for rank, pipe in enumerate(pipes)]
        for process in processes:
            process.join(5.0)
            if process.is_alive():
                process.kill()
                process.join()
    return next((result for result in results if not result["ok"]), results[0])


def measure(group: dist.ProcessGroup, device: torch.device, seconds: float) -> dict[str, Any]:
    """Collective. {ok, error, ranks, transport, transport_reason, latency_us, bandwidth_gb_s, ...} of this rank."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    large = LARGE[device.type]
    with mnnvl_ar.Workspace(group, large, HIDDEN, torch.bfloat16, device=device, deadline=20.0, monitor=False) as ws:
        found: dict[str, Any] = {"ran": True, "ok": True, "error": "", "ranks": size, "device": device.type}
        found |= {"transport": ws.transport, "transport_reason": ws.transport_reason}
        wrong = 0
        for tokens in (SMALL, 7, 16):
            xs = [_rows(tokens, r) for r in range(size)]
            got = mnnvl_ar.ops.all_reduce(xs[rank].to(device), ws.handle)
            wrong += not mnnvl_ar.reference.same_bits(got, mnnvl_ar.reference.all_reduce(xs))
        found["latency_us"] = 1e6 * _time(group, ws, _rows(SMALL, rank).to(device), seconds / 2)
        took = _time(group, ws, _rows(large, rank).to(device), seconds / 2)
        found["bandwidth_gb_s"] = large * HIDDEN * 2 / took / 1e9
        found["message_bytes"] = large * HIDDEN * 2
        ws.check()
        if wrong:
            found |= {"ok": False, "error": f"{wrong} sums on rank {rank} differ from the reference"}
        dist.barrier(group)
    return found


def _time(group: dist.ProcessGroup, ws: mnnvl_ar.Workspace, x: torch.Tensor, seconds: float) -> float:
    """Median seconds of a call, over batches that all ranks make alike."""
    calls = 20 if x.is_cuda else 3
    times: list[float] = []
    out = torch.empty_like(x)
    until = time.monotonic() + seconds
    while True:
        goes_on = torch.tensor([float(time.monotonic() < until or not times)])
        dist.all_reduce(goes_on, dist.ReduceOp.MIN, group=group)
        if not goes_on.item():
            return statistics.median(times)
        began = time.perf_counter()
        for _ in range(calls):
            mnnvl_ar.ops.all_reduce_out(x, out, ws.handle)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        times.append((time.perf_counter() - began) / calls)


def _rows(tokens: int, rank: int) -> torch.Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(17 * rank + tokens)).bfloat16()


def _receive(pipe: Connection, rank: int, until: float) -> dict[str, Any]:
    try:
        if pipe.poll(max(0.0, until - time.monotonic())):
            return dict(pipe.recv())
        return {"ran": True, "ok": False, "error": f"rank {rank} said nothing for {LIMIT:.0f} s"}
    except EOFError:
        return {"ran": True, "ok": False, "error": f"the process of rank {rank} died"}


def _serve(pipe: Connection, meeting: str, rank: int, size: int, device: str, seconds: float) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        where = torch.device(device, rank) if device == "cuda" else torch.device(device)
        if device == "cuda":
            torch.cuda.set_device(rank)
        store, limit = FileStore(f"{meeting}/store", size), timedelta(seconds=60)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
        assert dist.group.WORLD is not None
        pipe.send(measure(dist.group.WORLD, where, seconds))
        dist.destroy_process_group()
    except Exception as error:
        pipe.send({"ran": True, "ok": False, "error": str(error), "traceback": traceback.format_exc()})
