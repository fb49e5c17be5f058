"""Hostile timing on virtual ranks: CTAs that sleep, ranks that come late, other work that takes the SMs. Every function
is run by all ranks, and holds all bits against the reference."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

from common.cases.calls import Call, check_calls
from common.cases.graphs import check_graphs
from common.cases.rules import break_rule
from common.streams import stream_aside

DELAY_NS, LATE = 20_000, 0.005
OTHER_ELEMENTS = 1 << 28  # of fp32: half a millisecond of all SMs


def check_delays_in_kernels(rank: Any, calls: list[Call], workspaces: list[dict[str, Any]], **sizes: Any) -> None:
    """CTAs sleep at random at each step of a call, one rank is late besides; eager calls, then graphs. `workspaces` are
    to be of no other test, as they stay delayed."""
    for options in workspaces:
        break_rule(rank.workspace(**options).handle, "", delay_ns=DELAY_NS)
    for options in workspaces:
        check_calls(rank, calls, options, late=LATE)
    check_graphs(rank, 60, workspaces, rank.world_size, **sizes)


def check_beside_other_work(rank: Any, calls: list[Call], workspace: dict[str, Any]) -> None:
    """Another stream fills the device, again and again."""
    rank.workspace(**workspace)
    with other_work(rank.device) if rank.rank == 0 else contextlib.nullcontext():
        rank.barrier()
        for _ in range(3):
            check_calls(rank, calls, workspace)
        rank.barrier()


@contextlib.contextmanager
def other_work(device: torch.device) -> Iterator[None]:
    """Begun when this is entered: what the first of it loads and allocates could wait for calls that wait."""
    begun, enough = threading.Event(), threading.Event()

    def work() -> None:
        stream = stream_aside(device)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            memory = torch.zeros(OTHER_ELEMENTS, device=device)
            while not enough.is_set():
                memory.add_(1.0)
                stream.synchronize()
                begun.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        assert begun.wait(20.0)
        yield
    finally:
        enough.set()
        thread.join()
