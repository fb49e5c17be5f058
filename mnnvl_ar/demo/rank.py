"""One rank of the demo: makes every call of the traffic and compares every bit of every output with the reference."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

import mnnvl_ar
from mnnvl_ar._library import ops as library
from mnnvl_ar.demo.rows import hostile_rows
from mnnvl_ar.demo.traffic import CALLS, EMBEDDING, LAYERS, MODELS, PIECES, SETS, Form, Pass, bucket_of, passes
from mnnvl_ar.ranks import Rank

EPS = 1e-6
POISON = 3.0  # no row of answers is all this
DISTINCT = (
    131  # rows of a set of inputs, then they come again: more would take the CPU longer than the GPU all its calls
)


@dataclass
class Task:
    """What the parent asks of every rank."""

    seed: int
    most_tokens: int
    seconds: float
    calls: int  # 0: until `seconds` have passed
    deadline: float
    broken_rules: int = 0  # test builds only


@dataclass
class Tally:
    """Of one size: calls, outputs with a wrong bit, and microseconds of each."""

    calls: int = 0
    wrong: int = 0
    first_wrong: str = ""
    times: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Set:
    """One set of inputs, [most_tokens, hidden], with all the answers; a call of fewer tokens takes the first rows.
    Never written: calls in place get copies.
    """

    x: torch.Tensor
    residual: torch.Tensor
    weight: torch.Tensor
    answers: dict[str, torch.Tensor]  # by `Form.outputs`

    def inputs(self, tokens: int, copy: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x, residual, weight) of a call, to be written only if `copy`."""
        x, residual, weight = self.x[:tokens], self.residual[:tokens], self.weight
        return (x.clone(), residual.clone(), weight.clone()) if copy else (x, residual, weight)


def call(
    form: Form, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, handle: int
) -> tuple[torch.Tensor, ...]:
    """Makes one call; its outputs, as `form.outputs` names them."""
    if form is Form.FUSED:
        return mnnvl_ar.ops.all_reduce_rms_norm(x, residual, weight, EPS, handle)
    if form is Form.FUSED_IN_PLACE:
        mnnvl_ar.ops.all_reduce_rms_norm_out(x, residual, weight, EPS, x, residual, handle)
        return x, residual
    if form is Form.PLAIN:
        return (mnnvl_ar.ops.all_reduce(x, handle),)
    out = x if form is Form.PLAIN_IN_PLACE else torch.empty_like(x)
    mnnvl_ar.ops.all_reduce_out(x, out, handle)
    return (out,)


def serve(rank: Rank, task: Task) -> tuple[Any, ...]:
    """(tallies, transport, its reason) of this rank; tells (share done, calls) meanwhile."""
    if rank.device.type == "cpu":
        torch.set_num_threads(1)
    worker = Worker(rank, task, lambda *progress: rank.tell(progress))
    worker.run()
    dist.barrier()
    worker.workspace.close()
    return worker.tallies, repr(worker.workspace.transport), worker.workspace.transport_reason


class Worker:
    """`tell(share done, calls)` is called now and then."""

    def __init__(self, rank: Rank, task: Task, tell: Callable[[float, int], None]) -> None:
        self.rank, self.task, self.tell, self.device = rank, task, tell, rank.device
        self.tallies: dict[tuple[int, tuple[int, int]], Tally] = defaultdict(Tally)
        size, hidden = task.most_tokens, max(MODELS)
        self.workspace = mnnvl_ar.Workspace(
            rank.join(60.0), size, hidden, torch.bfloat16, device=self.device, deadline=task.deadline
        )
        if task.broken_rules:
            library._sabotage(self.workspace.handle, task.broken_rules, 0, 0, 0)
        self.sets = {hidden: [self._make_set(hidden, turn) for turn in range(SETS)] for hidden in MODELS}
        self.turn = 0
        self.graphs: dict[tuple[tuple[Form, Form], int, int], Piece] = {}

    def _make_set(self, hidden: int, turn: int) -> Set:
        tokens, world = min(self.task.most_tokens, DISTINCT), self.rank.world_size
        seed = 10_007 * self.task.seed + 101 * turn + hidden
        shares = [hostile_rows(tokens, hidden, torch.bfloat16, seed=seed, rank=rank) for rank in range(world + 1)]
        xs, residual = shares[:-1], shares[-1]
        weight = (1 + 0.1 * torch.randn(hidden, generator=torch.Generator().manual_seed(seed))).bfloat16()
        total = mnnvl_ar.reference.all_reduce(xs)
        norm, residual_out = mnnvl_ar.reference.all_reduce_rms_norm(xs, residual, weight, EPS)
        self.tell(0.0, 0)
        named = {"all_reduce": total, "norm": norm, "residual_out": residual_out}
        answers = {name: self._repeat(answer) for name, answer in named.items()}
        return Set(self._repeat(xs[self.rank.rank]), self._repeat(residual), weight.to(self.device), answers)

    def _repeat(self, rows: torch.Tensor) -> torch.Tensor:
        tokens = self.task.most_tokens
        return rows.to(self.device).repeat(-(-tokens // len(rows)), 1)[:tokens]

    def run(self) -> None:
        began, made = time.monotonic(), 0
        for each in passes(self.task.seed, self.task.most_tokens):
            self._pass(each)
            made += CALLS
            seconds = time.monotonic() - began
            share = made / self.task.calls if self.task.calls else seconds / self.task.seconds
            enough = self._agree(share >= 1)
            self.tell(1.0 if enough else min(share, 0.99), made)
            if enough:
                break

    def _agree(self, enough: bool) -> bool:
        """Rank 0 decides for all."""
        flag = torch.tensor([int(enough)])
        dist.broadcast(flag, 0)
        return bool(flag.item())

    def _pass(self, each: Pass) -> None:
        tally = self.tallies[each.hidden, bucket_of(each.tokens)]
        checks = Checks(tally, each, self.device)
        self._eager(EMBEDDING, each, checks)
        for layer in range(LAYERS):
            forms = PIECES[layer % len(PIECES)]
            if each.captured and self.device.type == "cuda":
                piece = self._piece(forms, each)
                piece.replay([self._next(each.hidden) for _ in forms], checks)
            else:
                for form in forms:
                    self._eager(form, each, checks)
        checks.settle()

    def _next(self, hidden: int) -> Set:
        self.turn += 1
        return self.sets[hidden][self.turn % SETS]

    def _eager(self, form: Form, each: Pass, checks: Checks) -> None:
        taken = self._next(each.hidden)
        inputs = taken.inputs(each.tokens, copy=form.in_place)
        with checks.timed(1):
            outputs = call(form, *inputs, self.workspace.handle)
        checks.compare(form, outputs, taken)

    def _piece(self, forms: tuple[Form, Form], each: Pass) -> Piece:
        key = (forms, each.hidden, each.tokens)
        if key not in self.graphs:
            self.graphs[key] = Piece(forms, self.sets[each.hidden][0], each.tokens, self.workspace.handle)
        return self.graphs[key]


class Piece:
    """The part of a layer between two attentions as a CUDA graph: its two calls, on inputs that are copied in."""

    def __init__(self, forms: tuple[Form, Form], example: Set, tokens: int, handle: int) -> None:
        self.forms, self.tokens = forms, tokens
        self.inputs = [example.inputs(tokens, copy=True) for _ in forms]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = [call(form, *inputs, handle) for form, inputs in zip(forms, self.inputs, strict=True)]

    def replay(self, pair: list[Set], checks: Checks) -> None:
        """One replay, on the inputs of `pair`. Nothing of the last one is left: not what calls in place made of their
        inputs, and not its outputs, which may be the right ones again."""
        for (x, residual, weight), outputs, new in zip(self.inputs, self.outputs, pair, strict=True):
            for output in outputs:
                output.fill_(POISON)
            x.copy_(new.x[: self.tokens])
            residual.copy_(new.residual[: self.tokens])
            weight.copy_(new.weight)
        with checks.timed(len(self.forms)):
            self.graph.replay()
        for form, outputs, new in zip(self.forms, self.outputs, pair, strict=True):
            checks.compare(form, outputs, new)


class Checks:
    """Compares and times the calls of one pass; on a GPU without waiting for it before `settle`."""

    def __init__(self, tally: Tally, each: Pass, device: torch.device) -> None:
        self.tally, self.each, self.device = tally, each, device
        self._good: list[torch.Tensor] = []
        self._names: list[str] = []
        self._events: list[tuple[int, Any, Any]] = []
        self._timed = 0

    def timed(self, calls: int) -> Checks:
        self._timed = calls
        return self

    def __enter__(self) -> None:
        if self.device.type == "cuda":
            self._before = torch.cuda.Event(enable_timing=True)
            self._before.record()
        else:
            self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.tally.calls += self._timed
        if self.device.type == "cuda":
            after = torch.cuda.Event(enable_timing=True)
            after.record()
            self._events.append((self._timed, self._before, after))
        else:
            self.tally.times.append((time.perf_counter() - self._began) * 1e6)

    def compare(self, form: Form, outputs: tuple[torch.Tensor, ...], taken: Set) -> None:
        for name, got in zip(form.outputs, outputs, strict=True):
            want = taken.answers[name][: got.shape[0]]
            same = got.view(torch.int16) == want.view(torch.int16)
            if self.device.type == "cuda" or not bool(same.all()):
                self._good.append((same | (got.isnan() & want.isnan())).all())
                self._names.append(f"{name} ({form.value})")

    def settle(self) -> None:
        """Waits for the pass and adds it to the tally."""
        if self._good:
            for name, good in zip(self._names, torch.stack(self._good).tolist(), strict=True):
                if not good:
                    self.tally.wrong += 1
                    shape = f"[{self.each.tokens}, {self.each.hidden}]"
                    self.tally.first_wrong = self.tally.first_wrong or f"{name} of {shape}"
        for calls, before, after in self._events:
            self.tally.times.append(before.elapsed_time(after) * 1000 / calls)
