"""One rank of the bench: makes a team for each group size, and measures its cells one after the other."""

from __future__ import annotations

import argparse
import gc
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from bench import launched, options, peers, progress, results, table
from bench.buffers import Inputs, Outputs, make_inputs, make_outputs, reset
from bench.cells import Cell, grid
from bench.check import Oracle, verdict
from bench.contexts import Context, around, base_of
from bench.floor import floor_us, machine_of
from bench.launch import WRONG
from bench.ours import Ours
from bench.quantised import KINDS
from bench.team import Team, gpus_of_ranks, join_world, make_team
from bench.timing import Clock, Replay, calls_of, rounds_of
from bench.variant import Limits, Peer, Unavailable, Variant

T = TypeVar("T")
SETUP_LIMIT = 120.0
SAY_EVERY = 20.0  # seconds, of how far it is
COMPILE_LIMIT = 420.0  # FlashInfer compiles for minutes at its first use


def work(args: argparse.Namespace) -> int:
    """A whole run on this rank. Returns its exit status: 0, or WRONG if a result of ours was not right."""
    rank, world_size, device = join_world(args.device)
    args = options.settle(args, world_size)
    run = Run(args, rank, device)
    if args.warm_peers:
        run.warm_peers(world_size)
    else:
        sizes = (args.tp, args.op, args.dtype, args.hidden, args.tokens)
        run.cells(list(grid(*sizes, args.mode, args.l2, args.context, args.skew)))
    dist.barrier()
    dist.destroy_process_group()
    wrong = [row for row in run.results.rows if results.is_ours(row["variant"]) and not row["ok"]]
    return WRONG if wrong else 0


class Run:
    def __init__(self, args: argparse.Namespace, rank: int, device: torch.device) -> None:
        self.args, self.rank, self.device = args, rank, device
        self.end = time.monotonic() + args.seconds
        machine = machine_name(device, dist.get_world_size())
        file: Path | None = args.json
        if file is None and args.whole:
            file = results.FOLDER / f"{results.machine_slug(machine)}.json"
        self.figures = machine_of(machine)
        self.named, file = file, file or args.scratch
        self.results = results.Results(machine, results.source_digest(), file if rank == 0 else None)
        if args.resume and file is not None:
            self.results.resume(file)
        for text in args.without:
            name, _, reason = text.partition("=")
            self.results.skipped[name] = reason
        self.say(f"{machine}, torch {torch.__version__}, sources {self.results.digest}")

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def warm_peers(self, world_size: int) -> None:
        """Lets every peer set itself up once over all ranks, so that whatever it compiles is there afterwards."""
        team = make_team(world_size, self.device)
        if team is not None:
            for name, peer in self.peers(team, Limits(1, 1024, (torch.bfloat16,))).items():
                self.say(f"{name}: ready")
                peer.close()

    def cells(self, cells: list[Cell]) -> None:
        done = _agreed(self.results.done())
        cells = [cell for cell in cells if results.cell_key(cell) not in done]
        self.say(table.LEGEND)
        self.say(table.HEADER)
        for tp in dict.fromkeys(cell.tp for cell in cells):
            progress.report(f"making a group of {tp}", limit=SETUP_LIMIT)
            team = make_team(tp, self.device)
            if team is not None:
                Session(self, team, [cell for cell in cells if cell.tp == tp]).run()
            progress.report("waiting for ranks outside the group", limit=SETUP_LIMIT)
            dist.barrier()
        self.results.save()
        for line in self.results.notes():
            self.say(line)
        if self.named is not None:
            self.say(f"wrote {self.named}")

    def peers(self, team: Team, limits: Limits) -> dict[str, Peer]:
        """The peers that every rank of the team could set up."""
        made: dict[str, Peer] = {}
        for name in self.args.peers:
            if any(text.startswith(f"{name}=") for text in self.args.without):
                continue
            progress.report(f"setting up {name}", name, COMPILE_LIMIT)
            start = time.monotonic()
            peer, failure = attempt(lambda name=name: peers.make(name, team, limits))  # type: ignore[misc]
            why = team.vote(failure)
            if why is None and peer is not None:
                made[name] = peer
                self.say(f"{name}: set up for TP{team.size} in {time.monotonic() - start:.1f} s")
            else:
                self.results.skipped[f"{name} TP{team.size}"] = str(why)
                self.say(f"{name}: skipped for TP{team.size}: {why}")
        return made


class Session:
    """All cells of one team."""

    def __init__(self, run: Run, team: Team, cells: list[Cell]) -> None:
        self.run_, self.team, self.all = run, team, cells
        limits = Limits.of(cells)
        args = run.args
        self.ours = Ours(team, limits, args.strategy, args.pdl, args.transport)
        self.peers = run.peers(team, limits)
        self.clock = Clock(team)
        self.oracle = Oracle(team.device)

    def run(self) -> None:
        began = said = time.monotonic()
        for number, cell in enumerate(self.all):
            if number and time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                self.run_.say(f"TP{self.team.size}: {progress.so_far(number, len(self.all), said - began)}")
            left = self.team.gather(self.run_.end - time.monotonic())[0]  # the first rank's clock decides
            if left < 0:
                self.run_.results.not_run.append(str(cell))
                continue
            args = self.run_.args
            self.measure(cell, args.rounds or rounds_of(cell, quick=args.quick, hurried=left < args.seconds / 2))
            gc.collect()  # graphs and buffers of this cell
            if self.team.device.type == "cuda":
                torch.cuda.empty_cache()
            self.run_.results.save()
        progress.report("closing", limit=SETUP_LIMIT)
        self.team.barrier()
        for peer in self.peers.values():
            attempt(peer.close)
        self.ours.close()

    def measure(self, cell: Cell, rounds: int) -> None:
        calls = calls_of(cell, shared=self.team.shared)
        progress.report(f"{cell}: inputs", limit=SETUP_LIMIT)
        inputs = make_inputs(cell, self.team.rank, calls, self.team.device)
        context = around(cell, inputs, self.team.rank, self.team.device)
        base = self.base(cell, context, inputs, calls)
        about = self.about(cell, context, inputs)
        sums = self.oracle.sums(self.team, inputs)
        want = self.oracle.expected(cell, inputs, sums, calls)
        ready = []
        for peer, variant in self.variants(cell):
            progress.report(f"{cell}: {variant.name}", peer, SETUP_LIMIT)
            entry, failure = attempt(lambda variant=variant: self.prepare(cell, context, variant, inputs, calls))  # type: ignore[misc]
            why = self.team.vote(failure)
            if why is None and entry is not None:
                ready.append((peer, *entry))
            elif peer is None:
                self.ours.check()  # says more, if a call of ours timed out
                raise RuntimeError(f"{cell}: {variant.name}: {why}")
            else:
                self.settle()  # raises if the CUDA context is gone; the watch then starts us without this peer
                self.run_.results.skipped[f"{variant.name}, {cell}"] = str(why)
        for peer, variant, replay, outputs in ready:  # the first replay of each alone, so that a hang has a name
            progress.report(f"{cell}: first replay of {variant.name}", peer)
            reset(inputs, outputs)
            self.settle()
            replay.run()
            self.settle()
        progress.report(f"{cell}: rounds", limit=SETUP_LIMIT)
        times = self.clock.measure(cell, [replay for _, _, replay, _ in ready], rounds, base)
        figures = self.run_.figures
        floor = None if figures is None else round(floor_us(cell, figures), 3)
        rows = []
        for (peer, variant, replay, outputs), timed in zip(ready, times, strict=True):
            progress.report(f"{cell}: checking {variant.name}", peer)
            reset(inputs, outputs)
            self.settle()
            self.team.barrier()
            replay.run()
            self.settle()
            judge = variant.judge
            found = judge(inputs, outputs, calls) if judge else verdict(cell, outputs, want, variant.exact)
            wrong = self.team.vote(found)
            row = {
                **cell.key(),
                "variant": variant.name,
                "p50_us": round(timed.p50_us, 3),
                "p99_us": round(timed.p99_us, 3),
                "low_us": round(timed.low_us, 3),
                "high_us": round(timed.high_us, 3),
                "base_us": round(timed.base_us, 3),
                "floor_us": floor,
                "ok": wrong is None,
                "calls": calls,
                "rounds": rounds,
                **about,
                **variant.extra,
            }
            rows.append(row if wrong is None else {**row, "error": wrong})
            replay.release()
        if base is not None:
            base.release()
        self.run_.results.rows += rows
        self.run_.say(table.line(str(cell), rows))
        if self.run_.args.verbose:
            self.run_.say(table.details(rows))

    def variants(self, cell: Cell) -> list[tuple[str | None, Variant]]:
        found: list[tuple[str | None, Variant]] = [(None, variant) for variant in self.ours.variants(cell)]
        for name, peer in self.peers.items():
            if cell.op not in KINDS or name in peers.ANY_OP:
                found += [(name, variant) for variant in peer.variants(cell)]
        return found

    def base(self, cell: Cell, context: Context, inputs: Inputs, calls: int) -> Replay | None:
        replay = base_of(context, cell, inputs, calls, self.team.device)
        self.settle()
        return replay

    def about(self, cell: Cell, context: Context, inputs: Inputs) -> dict[str, object]:
        """What stands around the calls: the mode that is quickest behind one GEMM may be the slowest behind another."""
        if cell.context != "gemm" or self.team.device.type != "cuda":
            return {}
        found, failure = attempt(lambda: launched.kernels(context.step(None, make_outputs(cell, inputs))))
        if failure is not None:
            self.run_.results.skipped[f"names of kernels, {cell}"] = failure
        return {"gemms": found}

    def prepare(
        self, cell: Cell, context: Context, variant: Variant, inputs: Inputs, calls: int
    ) -> tuple[Variant, Replay, Outputs]:
        outputs = make_outputs(cell, inputs)
        step = context.step(variant.bind(cell, inputs, outputs), outputs)
        replay = Replay(step, calls, cell, self.team.device)
        if variant.finish is not None:
            variant.finish()
        return variant, replay, outputs

    def settle(self) -> None:
        if self.team.device.type == "cuda":
            torch.cuda.synchronize(self.team.device)


def attempt(action: Callable[[], T]) -> tuple[T | None, str | None]:
    """(result, None) or (None, why not)."""
    try:
        return action(), None
    except Unavailable as error:
        return None, str(error)
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error)[-800:]}"


def machine_name(device: torch.device, world_size: int) -> str:
    """As tools/gpu_record.json names it: "8 x NVIDIA H200", or "1 x NVIDIA H200 for 4 ranks". Collective over the
    world."""
    own = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} host"
    names: list[str] = [""] * world_size
    dist.all_gather_object(names, own)
    gpus = gpus_of_ranks(device)
    parts = []
    for name in sorted(set(names)):
        ranks = names.count(name)
        places = [gpu or str(rank) for rank, gpu in enumerate(gpus) if names[rank] == name]
        parts.append(f"{len(set(places))} x {name}" + (f" for {ranks} ranks" if len(set(places)) < ranks else ""))
    return " + ".join(parts)


def _agreed(done: set[tuple[object, ...]]) -> set[tuple[object, ...]]:
    """The first rank's view of the result file, which may not be on the others' disks."""
    box = [done]
    dist.broadcast_object_list(box, src=0)
    return box[0]
