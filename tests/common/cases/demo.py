"""The demo's own parts: what it calls, and that it compares what it called."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

TOKENS, HIDDEN = 8, 2880  # rows of every kind


class Recorded(TorchDispatchMode):
    """Stands for a CUDA graph on the host: ops inside of `with` are noted, and made again, on the same memory, by
    `replay`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        self._made.append((op, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for op, args, kwargs, result in self._made:
            again = op(*args, **kwargs)
            for old, new in zip(_tensors(result), _tensors(again), strict=True):
                old.copy_(new)


def _tensors(result: Any) -> tuple[torch.Tensor, ...]:
    return () if result is None else (result,) if isinstance(result, torch.Tensor) else tuple(result)


def _worker(rank: Any) -> Any:
    from mnnvl_ar.demo.rank import Task, Worker

    task = Task(0, most_tokens=TOKENS, seconds=0.0, calls=0, deadline=20.0)
    return Worker(rank, task, lambda *_: None)


def _tally_of_pass(worker: Any) -> Any:
    from mnnvl_ar.demo.traffic import Pass

    worker.tallies.clear()
    worker._pass(Pass(HIDDEN, TOKENS, captured=False))
    (tally,) = worker.tallies.values()
    return tally


def _spoil(outputs: tuple[torch.Tensor, ...]) -> None:
    """Turns one bit of the last output."""
    flat = outputs[-1].flatten()
    flat.view(torch.int16)[flat.isfinite().nonzero()[-1]] ^= 1


def check_each_form_is_compared(rank: Any) -> None:
    """A pass makes every form; one wrong bit in each call of a form is counted, under its name, and nothing else."""
    from mnnvl_ar.demo import rank as demo
    from mnnvl_ar.demo.traffic import CALLS, Form

    worker, call, made = _worker(rank), demo.call, Counter()
    for spoiled in Form:

        def spoiling(form: Any, *arguments: Any, spoiled: Any = spoiled) -> Any:
            outputs = call(form, *arguments)
            if form is spoiled:
                made[form] += 1
                _spoil(outputs)
            return outputs

        with patch.object(demo, "call", spoiling):
            tally = _tally_of_pass(worker)
        assert (tally.calls, tally.wrong) == (CALLS, made[spoiled]), spoiled
        assert tally.first_wrong == f"{spoiled.outputs[-1]} ({spoiled.value}) of [{TOKENS}, {HIDDEN}]"
    assert sum(made.values()) == CALLS
    assert min(made.values()) >= 1
    assert _tally_of_pass(worker).wrong == 0  # and no call has written a set
    worker.workspace.close()


def check_forms_write_where_they_say(rank: Any) -> None:
    """Outputs of a call in place are its inputs, those of other calls are not, and leave the inputs alone."""
    from mnnvl_ar.demo.rank import call
    from mnnvl_ar.demo.traffic import Form
    from mnnvl_ar.reference import same_bits

    worker = _worker(rank)
    taken = worker.sets[HIDDEN][0]
    for form in Form:
        inputs = taken.inputs(TOKENS, copy=True)
        outputs = call(form, *inputs, worker.workspace.handle)
        places = [output.data_ptr() for output in outputs]
        assert (places == [tensor.data_ptr() for tensor in inputs[: len(places)]]) == form.in_place, form
        for name, output in zip(form.outputs, outputs, strict=True):
            assert same_bits(output, taken.answers[name]), (form, name)
        for tensor, before in zip(inputs, (taken.x, taken.residual, taken.weight), strict=True):
            assert tensor.data_ptr() in places or same_bits(tensor, before), form
    worker.workspace.close()


def check_pieces(rank: Any) -> None:
    """Graphs give right answers replay after replay, and the same inputs twice do not hide that nothing ran."""
    from mnnvl_ar.demo.rank import Checks, Tally
    from mnnvl_ar.demo.traffic import PIECES, Pass

    worker, each = _worker(rank), Pass(HIDDEN, TOKENS, captured=True)
    sets = worker.sets[HIDDEN]
    for forms in dict.fromkeys(PIECES):
        with patch.object(torch.cuda, "CUDAGraph", Recorded), patch.object(torch.cuda, "graph", lambda graph: graph):
            piece = worker._piece(forms, each)
        assert worker._piece(forms, each) is piece
        for replay, calls, wrong in (
            (piece.graph.replay, 2, 0),
            (lambda: None, 2, sum(len(form.outputs) for form in forms)),
        ):
            for pair in ([sets[1], sets[2]], [sets[3], sets[0]], [sets[3], sets[0]]):
                tally = Tally()
                checks = Checks(tally, each, rank.device)
                with patch.object(piece.graph, "replay", replay):
                    piece.replay(pair, checks)
                checks.settle()
                assert (tally.calls, tally.wrong) == (calls, wrong), (forms, tally.first_wrong)
    assert _tally_of_pass(worker).wrong == 0  # and no replay has written a set
    worker.workspace.close()
