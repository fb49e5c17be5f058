"""Carries out a script on one rank. The transport, and what a graph is, come from the machine: `host.HostMachine` or
`gpu.CudaMachine`.

Inputs are made and outputs compared by ordinary kernels on the device, inside the graphs too: what a call reads depends
on the pass it is replayed in, through indices in device memory, and a comparison adds the wrong rows to a counter in
device memory, which is read once at the end. So nothing waits for the device in between, as in a server.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch

from common.rows import DTYPES
from tools.replay.script import (
    SETS,
    WORKSPACES,
    Body,
    Call,
    Capture,
    Forward,
    Reopen,
    Script,
    Update,
    Warm,
)
from tools.replay.tables import EPS, make_tables, plan

Take = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]  # memory for a tensor
Work = Callable[[Take], None]


class Graph(Protocol):
    def replay(self) -> None: ...


class Machine(Protocol):
    """How a transport runs, captures and orders work."""

    def workspace(self, **options: Any) -> Any: ...
    def eager(self, work: Work) -> None: ...
    def capture(self, work: Work, kind: str, keep: bool) -> Graph: ...
    def update(self, into: Any, source: Any) -> None: ...
    def aside(self) -> contextlib.AbstractContextManager[None]: ...
    def join(self) -> None: ...
    def impatient(self) -> None: ...


class Server:
    """One rank. `figures` counts what was done; `wrong` how many rows were wrong, by form of call."""

    FORMS = ("sum", "", "A", "B", "C", "D", "E", "chained", "aside")

    def __init__(self, rank: Any, machine: Machine, script: Script, off: Callable[[int], None] | None = None) -> None:
        from mnnvl_ar import ops

        self.rank, self.machine, self.profile, self.ops = rank, machine, script.profile, ops
        self.off = off or (lambda handle: None)
        profile, device = script.profile, rank.device
        self.dtype = DTYPES[profile.dtype]
        self.tables = make_tables(
            rank.rank, rank.world_size, profile.hidden, profile.dtype, profile.seed, device, profile.largest
        )
        self.words = self.tables.x.shape[1]
        self.plans = {
            real: plan(real, profile.largest, self.tables.padding).to(device)
            for real in {*script.reals, 0, profile.largest}
        }
        self.cursor = self.plans[profile.largest][0].clone()  # [call % SETS, token] -> row
        self.live = torch.ones(profile.largest, dtype=torch.bool, device=device)
        self.lives = {r: (torch.arange(profile.largest) < r).to(device) for r in self.plans}
        self.attention = self.tables.x.index_select(0, self.plans[0][0, 0])  # what attention writes
        self.zeros = torch.zeros(profile.largest, profile.hidden, dtype=self.dtype, device=device)
        self.wrong = torch.zeros(len(self.FORMS), dtype=torch.int64, device=device)
        self.handles: dict[str, int] = {}
        self.open: dict[str, Any] = {}
        for name in WORKSPACES:
            self.open_workspace(name)
        self.graphs: dict[tuple[str, int], list[Graph]] = {}
        self.figures = {
            "calls": 0, "captured_graphs": 0, "replays": 0, "replayed_calls": 0, "eager_calls": 0, "updates": 0,
            "reopened": 0, "discarded": 0,
        }  # fmt: skip

    def open_workspace(self, name: str) -> None:
        self.open[name] = self.machine.workspace(
            max_tokens=self.profile.largest,
            hidden=self.profile.hidden,
            dtype=self.dtype,
            concurrent=self.profile.aside,
            max_bytes=self.profile.max_bytes,
        )
        self.handles[name] = self.open[name].handle
        self.off(self.handles[name])

    def run(self, script: Script) -> dict[str, Any]:
        for step in script.steps:
            if isinstance(step, Warm):
                self.warm(step)
            elif isinstance(step, Capture):
                self.capture(step)
            elif isinstance(step, Forward):
                self.forward(step)
            elif isinstance(step, Update):
                self.machine.update(self.graphs[step.into][0], self.graphs[step.source][0])
                self.figures["updates"] += 1
            else:
                self.reopen(step)
        self.rank.synchronize()
        wrong = {form or "functional": n for form, n in zip(self.FORMS, self.wrong.tolist(), strict=True) if n}
        self.figures["calls"] = self.figures["replayed_calls"] + self.figures["eager_calls"]
        return {**self.figures, "wrong_rows": sum(wrong.values()), "wrong_by_form": wrong}

    def close(self) -> None:
        """Collective: a peer may still be writing to what is closed before."""
        self.rank.barrier()
        self.graphs.clear()
        for workspace in self.open.values():
            workspace.close()

    # ---- steps

    def warm(self, step: Warm) -> None:
        if step.skew is None:
            self.rank.synchronize()
            self.rank.barrier()
        else:
            time.sleep(step.skew[self.rank.rank])
        self.eager((step.body,), step.body.tokens, step.turn, "stale")

    def capture(self, step: Capture) -> None:
        self.point_at(step.bodies[0].tokens, 0)
        graphs = []
        for body in step.bodies:
            graphs.append(self.machine.capture(partial(self.launch, body), step.kind, step.keep))
        if step.keep:
            self.graphs[step.key] = graphs
            self.figures["captured_graphs"] += len(graphs)
        else:
            self.figures["discarded"] += len(graphs)

    def forward(self, step: Forward) -> None:
        if not step.captured:
            self.eager(step.bodies, step.real, step.turn, step.padding)
            return
        for number, (graph, body) in enumerate(zip(self.graphs[step.key], step.bodies, strict=True)):
            self.attend(body, step.real, step.turn + number, step.padding)
            graph.replay()
            self.figures["replays"] += 1
            self.figures["replayed_calls"] += len(body.calls)

    def eager(self, bodies: tuple[Body, ...], real: int, turn: int, padding: str) -> None:
        for number, body in enumerate(bodies):
            self.attend(body, real, turn + number, padding)
            self.machine.eager(partial(self.launch, body))
            self.figures["eager_calls"] += len(body.calls)

    def reopen(self, step: Reopen) -> None:
        """Closes at once, as a server that reloads a model; captured graphs of the other workspaces live on."""
        self.rank.synchronize()
        self.rank.barrier()
        self.open[step.workspace].close()
        self.open_workspace(step.workspace)
        self.figures["reopened"] += 1
        self.eager((step.body,), step.body.tokens, 1, "garbage")

    # ---- what runs on the device

    def point_at(self, real: int, turn: int) -> None:
        self.cursor.copy_(self.plans[real][turn % SETS])
        self.live.copy_(self.lives[real])

    def attend(self, body: Body, real: int, turn: int, padding: str) -> None:
        """Attention, eager: writes the real rows of its output. `padding` says what becomes of the others."""
        self.point_at(real, turn)
        torch.index_select(self.tables.x, 0, self.cursor[0, :real], out=self.attention[:real])
        rest = self.attention[real : body.tokens]
        if padding == "zero":
            rest.zero_()
        elif padding == "garbage" and real < body.tokens:
            torch.index_select(self.tables.x, 0, self.cursor[0, real : body.tokens], out=rest)

    def launch(self, body: Body, take: Take) -> None:
        """The calls of `body`, with the ordinary kernels around them. Runs eagerly, or under capture."""
        group: list[_Operands] = []
        for number, call in enumerate(body.calls):
            if call.workspace == "aside":
                with self.machine.aside():
                    made = self.operands(call, number, body.tokens, take, None)
                    self.make(made)
                    self.compare(made)
                continue
            if call.after in ("kernel", "attention"):
                self.flush(group)
            group.append(self.operands(call, number, body.tokens, take, group[-1] if group else None))
        self.flush(group)
        self.machine.join()

    def flush(self, group: list[_Operands]) -> None:
        """Makes the calls of `group` with nothing between them, then compares all their outputs.

        The last call's first: a kernel is ordered behind the one before it, but behind an impatient kernel, which waits
        for nothing, not behind the call before that. The library sees to its own data only.
        """
        for made in group:
            if made.call.after == "impatient":
                self.machine.impatient()
            self.make(made)
        for made in reversed(group):
            self.compare(made)
        group.clear()

    def operands(self, call: Call, number: int, tokens: int, take: Take, before: _Operands | None) -> _Operands:
        shape = (tokens, self.profile.hidden)
        made = _Operands(call, number % SETS, tokens)
        if call.after == "call" and before is not None:
            made.before, made.turn = before, before.turn
        elif call.after == "attention":
            made.x = self.attention[:tokens].view(self.dtype)
        else:
            made.x = take(shape, self.dtype)
            torch.index_select(self.tables.x, 0, self.cursor[made.turn, :tokens], out=made.x.view(torch.int32))
        if made.before is None and call.form == "B":
            made.residual = self.zeros[:tokens]
        elif made.before is None and call.form != "sum":
            made.residual = take(shape, self.dtype)
            torch.index_select(
                self.tables.residual, 0, self.cursor[made.turn, :tokens], out=made.residual.view(torch.int32)
            )
        if call.form in ("C", "D", "E", "B"):
            made.fresh = [take(shape, self.dtype) for _ in range(2)]
        elif call.form == "sum":
            made.fresh = [take(shape, self.dtype)]
        return made

    def make(self, made: _Operands) -> None:
        call, handle, weight = made.call, self.handles[made.call.workspace], self.tables.weight
        choice = {"strategy": call.strategy, "pdl": call.pdl}
        x, residual = (made.x, made.residual) if made.before is None else made.before.outputs
        if call.form == "sum":
            self.ops.all_reduce_out(x, made.fresh[0], handle, **choice)
            made.outputs = (made.fresh[0],)
        elif call.form == "":
            made.outputs = self.ops.all_reduce_rms_norm(x, residual, weight, EPS, handle, **choice)
        else:
            norm_out = x if call.form in ("A", "D") else made.fresh[0]
            residual_out = {"A": residual, "B": x, "C": x}.get(call.form) if call.form != "E" else None
            residual_out = made.fresh[1] if residual_out is None else residual_out
            self.ops.all_reduce_rms_norm_out(x, residual, weight, EPS, norm_out, residual_out, handle, **choice)
            made.outputs = (norm_out, residual_out)

    def compare(self, made: _Operands) -> None:
        """Adds the number of real rows with a wrong bit to the counter of the call's form."""
        form = made.call.form if made.before is None else "chained"
        place = self.FORMS.index("aside" if made.call.workspace == "aside" else form)
        for got, table in zip(made.outputs, self.tables.answers[made.kind], strict=True):
            want = table.index_select(0, self.cursor[made.turn, : made.tokens])
            bad = torch.ne(got.view(torch.int32), want).any(-1)
            bad &= self.live[: made.tokens]
            self.wrong[place].add_(bad.sum())


class _Operands:
    """A call's tensors. before: the call whose outputs are its inputs."""

    def __init__(self, call: Call, turn: int, tokens: int) -> None:
        self.call, self.turn, self.tokens = call, turn, tokens
        self.x: Any = None
        self.residual: Any = None
        self.before: _Operands | None = None
        self.fresh: list[torch.Tensor] = []
        self.outputs: tuple[torch.Tensor, ...] = ()

    @property
    def kind(self) -> str:
        kind = {"sum": "sum", "B": "B"}.get(self.call.form, "fused")
        return kind if self.before is None else f"chained {kind}"
