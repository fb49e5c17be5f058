"""Replays over the host transport: a graph is a list of calls, recorded once and made again with the same arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tools.replay.script import Script
from tools.replay.server import Server, Work


class Recorded:
    """`work` on tensors that stay where they are. Nothing runs at capture time: that would already make the calls."""

    def __init__(self, work: Work, before: Callable[[], None]) -> None:
        self.work, self.before = work, before
        self.memory: list[torch.Tensor] = []

    def replay(self) -> None:
        recorded = iter(self.memory)
        fresh: list[torch.Tensor] = []

        def take(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            kept = next(recorded, None)
            if kept is None:
                kept = torch.empty(shape, dtype=dtype)
                fresh.append(kept)
            return kept

        self.before()
        self.work(take)
        self.memory += fresh


class HostMachine:
    """frozen: for the controls. In a test build that counts calls on the host, each replay counts from the same number,
    as a kernel does that gets the count as a parameter."""

    def __init__(self, rank: Any, deadline: float = 20.0, frozen: bool = False) -> None:
        self.rank, self.deadline, self.frozen = rank, deadline, frozen
        self.handles: list[int] = []

    def workspace(self, **options: Any) -> Any:
        made = self.rank.new_workspace(deadline=self.deadline, **options)
        self.handles.append(made.handle)
        return made

    def before_replay(self) -> None:
        for handle in self.handles if self.frozen else ():
            torch.ops.mnnvl_ar._workspace_reset(handle)  # the count of calls that a test build keeps on the host

    def eager(self, work: Work) -> None:
        work(lambda shape, dtype: torch.empty(shape, dtype=dtype))

    def capture(self, work: Work, kind: str, keep: bool) -> Recorded:
        return Recorded(work, self.before_replay)

    def update(self, into: Recorded, source: Recorded) -> None:
        into.__dict__.setdefault("own", (into.work, into.memory))
        work, memory = source.__dict__.get("own", (source.work, source.memory))
        into.work, into.memory = work, memory

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        yield

    def join(self) -> None:
        pass

    def impatient(self) -> None:
        pass


def serve(rank: Any, script: Script, off: str = "") -> dict[str, Any]:
    """Runs on every rank; returns the figures. off: rules to switch off, in a test build."""
    from common.cases.rules import break_rule

    def sabotage(handle: int) -> None:
        if off:
            break_rule(handle, off, frozen_dirty=1)

    server = Server(rank, HostMachine(rank, 2.0 if off else 20.0, "device_epoch" in off), script, sabotage)
    rank.barrier()
    figures = server.run(script)
    server.close()
    return figures


def total(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of all ranks as one: the counts, which must be the same on every rank, and the sum of wrong rows."""
    apart = ("wrong_rows", "wrong_by_form", "seconds")
    first = {name: value for name, value in figures[0].items() if name not in apart}
    by_form: dict[str, int] = {}
    for each in figures:
        assert first == {name: value for name, value in each.items() if name not in apart}
        for form, rows in each["wrong_by_form"].items():
            by_form[form] = by_form.get(form, 0) + rows
    seconds = {"seconds": max(each["seconds"] for each in figures)} if "seconds" in figures[0] else {}
    return {**first, **seconds, "wrong_rows": sum(by_form.values()), "wrong_by_form": by_form}
