"""Times every launch shape of a group's cells over one block of symmetric memory, and of the quickest the PDL modes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from bench import progress
from bench.buffers import make_inputs, make_outputs, reset
from bench.cells import Cell
from bench.check import Oracle, verdict
from bench.contexts import around, base_of
from bench.ours import bind_call
from bench.shapes import Shape, most_one_shot_bytes, shapes
from bench.team import Team
from bench.timing import Clock, Replay, calls_of
from mnnvl_ar import Pdl, Strategy
from mnnvl_ar._library import ops
from mnnvl_ar.memory import Request, allocate
from mnnvl_ar.tuning import Table
from mnnvl_ar.workspace import Layout, create

PDLS = ("off", "late", "early")
NO_TABLE = Table()  # every handle has its strategy and launch shape by name


def tune_group(
    team: Team, rows: Sequence[Sequence[Cell]], rounds: int, end: float
) -> Iterator[dict[Cell, list[tuple[float, Shape]]]]:
    """For each of `rows` (the cells of one row size), as soon as it is done: each cell's shapes by time, in us. Raises
    `RuntimeError` where a shape gave wrong bits. Stops at the first row that was not done by the time `end`
    (time.monotonic). Collective, to the last item."""
    slot_bytes = max(_slot_bytes(team.size, cell) for cells in rows for cell in cells)
    layout = Layout(slot_bytes)
    memory = allocate(team.control, Request(layout.nbytes, layout.fills, layout.probe_offset, team.device))
    handles: dict[Shape, int] = {}  # by shape with PDL off
    clock, oracle = Clock(team), Oracle(team.device)
    processors = torch.cuda.get_device_properties(team.device).multi_processor_count if clock.on_gpu else 0

    began, done, total = time.monotonic(), 0, sum(map(len, rows))

    def race(cell: Cell) -> list[tuple[float, Shape]]:
        nonlocal done
        progress.report(str(cell), limit=300.0)
        tried = list(shapes(cell, processors))
        for shape in tried:
            if shape not in handles:
                handles[shape] = create(
                    memory.pointers,
                    team.rank,
                    team.device,
                    slot_bytes,
                    NO_TABLE,
                    multicast_pointer=memory.multicast_pointer,
                    strategy=int(Strategy[shape.strategy.upper()]),
                    deadline=30.0,
                    launch=shape.launch,
                )
        found = _race(team, cell, tried, handles, clock, oracle, rounds)
        if team.device.type == "cuda":
            modes = [replace(found[0][1], pdl=pdl) for pdl in PDLS]
            found = _race(team, cell, modes, handles, clock, oracle, rounds) + found[1:]
            found.sort(key=lambda item: item[0])
        if team.rank == 0:
            (us, first), *others = found
            second = f"; next {others[0][0]:.2f} {others[0][1]}" if others else ""
            done += 1
            left = progress.so_far(done, total, time.monotonic() - began)
            print(f"{cell}: {us:.2f} us {first}{second} ({left})", flush=True)
        return found

    for cells in rows:
        best: dict[Cell, list[tuple[float, Shape]]] = {}
        for cell in cells:
            if team.gather(time.monotonic() > end)[0]:
                break
            best[cell] = race(cell)
        if len(best) < len(cells):
            if team.rank == 0:
                print(f"out of time: nothing is written for {cells[len(best)]} and what comes after it", flush=True)
            break
        yield best
    for handle in handles.values():
        ops._workspace_close(handle)
    team.barrier()
    memory.close()


def _race(
    team: Team, cell: Cell, tried: list[Shape], handles: dict[Shape, int], clock: Clock, oracle: Oracle, rounds: int
) -> list[tuple[float, Shape]]:
    calls = calls_of(cell, shared=team.shared)
    inputs = make_inputs(cell, team.rank, calls, team.device)
    outputs = make_outputs(cell, inputs)  # one set for all: only one shape runs at a time
    context = around(cell, inputs, team.rank, team.device)
    base = base_of(context, cell, inputs, calls, team.device)
    want = oracle.expected(cell, inputs, oracle.sums(team, inputs), calls)
    replays = []
    for shape in tried:
        options = {"strategy": int(Strategy[shape.strategy.upper()]), "pdl": int(Pdl[shape.pdl.upper()])}
        call = bind_call(cell, inputs, outputs, handles[replace(shape, pdl="off")], options)
        replays.append(Replay(context.step(call, outputs), calls, cell, team.device))
    times = clock.measure(cell, replays, rounds, base)
    found = []
    for shape, replay, timed in sorted(zip(tried, replays, times, strict=True), key=lambda item: item[2].p50_us):
        reset(inputs, outputs)
        if team.device.type == "cuda":
            torch.cuda.synchronize()
        team.barrier()
        replay.run()
        if team.device.type == "cuda":
            torch.cuda.synchronize()
        wrong = team.vote(verdict(cell, outputs, want, exact=True))
        if wrong is not None:
            raise RuntimeError(f"{cell}, {shape}: {wrong}")
        found.append((timed.p50_us, shape))
    for replay in (*replays, *([] if base is None else [base])):
        replay.release()
    return found


def _slot_bytes(ranks: int, cell: Cell) -> int:
    """In which every shape that is tried runs at once."""
    table, call = Table(one_shot_bytes=most_one_shot_bytes(ranks)), (ranks, cell.tokens, cell.nbytes // cell.tokens)
    return max(table.slot_bytes(*call, strategy) for strategy in (Strategy.AUTO, Strategy.TWO_SHOT))
