"""Checks a machine of several hosts, proves bits, tunes, and measures; one record comes home. Run on each node:

    srun, one task a node:    python -m bench.gb200 --head HOST0            (nvl72.sbatch, two_nodes.sbatch)
    Kubernetes, a pod a node: the same                                      (two_nodes.yaml)
    mpirun, one task a node:  the same
    by hand, on node I of N:  python -m bench.gb200 --head HOST0 --node I --nodes N

Exit status, the same on all nodes: 0, all parts that were to run have run, and every bit of ours was right; 3, a bit
was wrong; 1, the machine is not fit, or a rank or a node failed: it is named, all ranks were ended, and the record
holds what was measured until then; 2, the command line makes no sense.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

from bench import options, whole
from bench.gb200 import machine, parts, place, watch
from bench.gb200.crew import Crew, Gone
from bench.gb200.place import Place
from bench.gb200.ranks import Ranks
from bench.gb200.record import BEGIN, END, Record
from bench.launch import WRONG, free_port
from mnnvl_ar.doctor import show

LEAST = 30.0  # seconds that a part is worth starting for, beside parts.SPARE
LAST_WORDS = 10.0  # seconds that the first node waits for the others to have read how it ended


class Stopped(Exception):
    """By SIGTERM, as Slurm and Kubernetes send it when time is up."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.gb200", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = p.add_argument_group("where (Slurm, Kubernetes and MPI tell node and nodes)")
    where.add_argument("--head", help="the first node, by a name or address that all nodes reach")
    where.add_argument("--port", type=int, default=29500, help="that the first node listens at (29500)")
    where.add_argument("--node", type=int, help="the number of this node, from 0")
    where.add_argument("--nodes", type=int, help="how many there are")
    where.add_argument("--gpus-per-node", type=int, help="GPUs that each node must have (as many as the first)")
    where.add_argument("--patience", type=float, default=300.0, help="seconds in which all nodes must have come (300)")
    what = p.add_argument_group("what")
    what.add_argument("--tp", type=_sizes, default=list(parts.TPS), help="group sizes (4,8,16,36,72: those that fit)")
    what.add_argument("--multicast", action="store_true", help="allow NVLink multicast: your own rack only")
    what.add_argument("--parts", type=_names, default=[], help=f"only these of {','.join(parts.ORDER)}")
    what.add_argument("--minutes", type=float, default=80.0, help="start no part that does not fit in (80)")
    what.add_argument("--out", type=Path, default=Path("mnnvl-ar-gb200"), help="folder of record and logs")
    what.add_argument("--print", action="store_true", help="print the record at the end, where no disk is kept")
    what.add_argument("--device", choices=("cuda", "cpu"), help="cpu: a rehearsal on the host: no times")
    what.add_argument(
        "--ranks-per-node",
        type=int,
        help="as many as a node has GPUs, with --device cpu 1; more than GPUs share them: a rehearsal, no times",
    )
    return p


def _sizes(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(parts.ORDER):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: wanted some of {','.join(parts.ORDER)}")
    return names


def main() -> int:
    p = parser()
    args = p.parse_args()
    args.out = args.out.resolve()
    try:
        here = place.find(os.environ, node=args.node, nodes=args.nodes, head=args.head, port=args.port)
    except ValueError as error:
        p.error(str(error))
    settle(args)
    signal.signal(signal.SIGTERM, _stop)
    node = Node(args, here)
    try:
        return node.lead() if here.leads else node.follow()
    except (Gone, Stopped) as error:
        why = str(error)
    _deafen()
    return node.finish(1, why)


def settle(args: argparse.Namespace) -> None:
    """Without --multicast, keeps it off for all that is started here: the doctor would try it."""
    if not args.multicast:
        options.settle_multicast(allow=False)


def _stop(*_: object) -> None:
    raise Stopped("ended by SIGTERM")


def _deafen() -> None:
    """From here on SIGTERM only spoils the exit status: srun sends it once the first of all nodes has ended."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Node:
    """What one node does. record: on the first one, once all nodes have come."""

    def __init__(self, args: argparse.Namespace, here: Place) -> None:
        self.args, self.place = args, here
        self.began = time.monotonic()
        self.record: Record | None = None
        self.begun = 0  # parts
        self.printed = False

    def say(self, text: str) -> None:
        print(f"bench.gb200, node {self.place.node}: {text}", flush=True)

    # ---- the first node

    def lead(self) -> int:
        args, size = self.args, self.place.nodes
        self.say(f"{size} nodes by {self.place.by}, ranks meet at {self.place.head}:{self.place.port}")
        crew = Crew(self.place, args.patience)
        status = 1
        try:
            status = self._lead(crew)
        except (Gone, Stopped) as error:
            self.finish(1, str(error))
        finally:
            _deafen()
            crew.tell("over", status)
            crew.tell("bye/0", True)
            crew.gather("bye", time.monotonic(), time.monotonic() + LAST_WORDS)
        return status

    def _lead(self, crew: Crew) -> int:
        args, size = self.args, self.place.nodes
        crew.tell("node/0", self._look())
        nodes, missing = crew.gather("node", time.monotonic() + args.patience, time.monotonic() + args.patience)
        gpus = nodes[0]["gpus"]
        each = args.ranks_per_node or gpus or 1
        world = each * size
        self.record = record = Record(args.out / "results.json", self.place.by, world, nodes)
        troubles = [f"node {node} of {size} did not come in {args.patience:.0f} s" for node in missing]
        troubles += machine.problems(nodes, args.gpus_per_node if gpus else 0)
        if gpus == 0 and args.device != "cpu":
            troubles.append(f"node 0 ({nodes[0]['host']}) has no GPU (--device cpu is a rehearsal)")
        refusal = nodes[0]["multicast_refusal"]
        if args.multicast and gpus and refusal:
            troubles.append(f"--multicast, but multicast is forbidden here by {refusal}")
        if args.multicast and 0 < gpus < each:
            troubles.append(f"--multicast, but {each} ranks would share {gpus} GPUs, which multicast cannot")
        if troubles:
            return self.finish(1, "; ".join(troubles))
        self.say(f"{world} ranks, {each} on each of {size} nodes, all alike; the record is {record.file}")
        for part in self._planned(world, on_gpu=gpus > 0, shared=0 < gpus < each):
            trouble = self._lead_part(crew, part, each, gpus)
            if trouble is not None:
                return self.finish(1, f"{part.name}: {trouble}")
        return self.finish(WRONG if record.wrong else 0, None)

    def _planned(self, world: int, *, on_gpu: bool, shared: bool) -> list[parts.Part]:
        """The parts to run. The others of those that were asked for are in the record, with the reason."""
        args = self.args
        multicast = args.multicast and on_gpu
        planned = parts.plan(world, tps=args.tp, on_gpu=on_gpu, multicast=multicast, only=args.parts, shared=shared)
        assert self.record is not None
        names = [part.name for part in planned]
        for name in parts.ORDER:
            if name not in names and (not args.parts or name in args.parts):
                why = "no GPU" if not on_gpu else "one rank only" if world == 1 else "without --multicast"
                self.record.skip(name, "ranks share a GPU" if shared and name != "multicast" else why)
        return planned

    def _lead_part(self, crew: Crew, part: parts.Part, each: int, gpus: int) -> str | None:
        """What ended it, or None. each, gpus: ranks and GPUs of a node."""
        assert self.record is not None
        left = self.args.minutes * 60 - (time.monotonic() - self.began)
        limit = min(part.limit, left)
        if limit < parts.SPARE + LEAST:
            self.record.skip(part.name, f"for want of time: {max(0.0, left):.0f} s left of --minutes")
            self.say(f"{part.name}: not run for want of time")
            return None
        leaves = self.args.out / f"{part.name}.json"
        leaves.unlink(missing_ok=True)  # of a run before this one
        arguments = list(part.arguments)
        if part.leaves != "doctor":
            arguments += ["--seconds", f"{limit - parts.SPARE:.0f}"]
        if part.leaves in ("rows", "table"):
            arguments += ["--json" if part.leaves == "rows" else "--out", str(leaves)]
        table = self.record.found["table"] if part.tuned else None
        port = free_port()
        plan = {"name": part.name, "arguments": arguments, "limit": limit, "port": port, "table": table}
        plan |= {"each": each, "gpus": gpus}
        self.say(f"{part.name}: begins, {limit:.0f} s at most: {shlex.join(arguments)}")
        self.record.begin(part, arguments)
        number, self.begun = self.begun, self.begun + 1
        crew.tell(f"plan/{number}", plan)
        started = time.monotonic()
        outcome = watch.Outcome(trouble="cut short")
        try:
            found = self._part(crew, number, plan)
            assert found is not None
            outcome = found
        except (Gone, Stopped) as error:
            outcome.trouble = str(error)
            raise
        finally:
            log = self._folder(part.name) / "rank0.log"
            self.record.end(part, outcome, time.monotonic() - started, leaves, log)
        took = time.monotonic() - started
        if part.leaves == "doctor" and self.record.found["doctor"]:
            print(show.text(self.record.found["doctor"]), flush=True)
        self.say(f"{part.name}: {self.record.found['parts'][-1]['status']} after {took:.0f} s")
        return outcome.trouble

    def finish(self, status: int, trouble: str | None) -> int:
        """Says how it ended, on the first node in the record too."""
        if trouble:
            self.say(f"FAILED: {trouble}")
        if self.record is not None and not self.printed:
            self.printed = True
            self.record.finish(status, trouble)
            for part in self.record.found["parts"]:
                why = f": {part['why']}" if part["why"] else ""
                self.say(f"  {part['name']:<10}{part['status']}{why}")
            rows = len(self.record.found["rows"])
            verdict = {0: "complete", WRONG: "A RESULT OF OURS IS WRONG"}.get(status, "incomplete")
            self.say(f"{verdict}; {rows} rows in {self.record.file}")
            if self.args.print:
                print(f"{BEGIN}\n{self.record.file.read_text()}{END}", flush=True)
        return status

    # ---- the others

    def follow(self) -> int:
        crew = Crew(self.place, self.args.patience)
        crew.tell(f"node/{self.place.node}", self._look())
        number = 0
        while True:
            plan, over = crew.wait_any(f"plan/{number}", "over")
            if plan is None:
                _deafen()
                crew.tell(f"bye/{self.place.node}", True)
                if over:
                    self.say("FAILED: the first node says why" if over != WRONG else "a result of ours is wrong")
                return int(over)
            self._part(crew, number, plan)
            number += 1

    # ---- all

    def _look(self) -> dict[str, Any]:
        args = {name: value for name, value in vars(self.args).items() if name not in ("node", "out", "print")}
        return machine.look(self.args.device, self.place.nodes, [f"{name}={value}" for name, value in args.items()])

    def _folder(self, part: str) -> Path:
        folder: Path = self.args.out / "logs" / part
        return folder

    def _part(self, crew: Crew, number: int, plan: dict[str, Any]) -> watch.Outcome | None:
        arguments = list(plan["arguments"])
        if plan["table"] is not None:
            arguments += ["--tables", str(self._keep_table(plan["table"]))]
        each, rank = plan["each"], self.place.node * plan["each"]
        world, meeting = each * self.place.nodes, (self.place.head, plan["port"])
        environment = {"CUDA_VISIBLE_DEVICES": ""} if self.args.device == "cpu" else {}
        folder = self._folder(plan["name"])
        ranks = Ranks(arguments, rank, each, world, meeting, folder, environment, plan["gpus"])
        tell = _print if plan["name"] != "check" else lambda text: None  # JSON, which is told in words later
        try:
            return watch.run(crew, f"part/{number}", ranks, plan["limit"], tell)
        except Stopped as error:  # before other ranks say that they lost ours
            crew.append(f"part/{number}/failures", watch.failure(crew, f"node {self.place.node}", str(error)))
            raise
        finally:
            ranks.end()

    def _keep_table(self, table: dict[str, Any]) -> Path:
        """The folder of this node that holds it, under the name that the library looks for."""
        from mnnvl_ar.tuning.machines import machine_class

        folder: Path = self.args.out / "tables"
        whole.write(folder / f"{machine_class(table['machine'])}.json", json.dumps(table))
        return folder


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
