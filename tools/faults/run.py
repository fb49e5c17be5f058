"""`make faults`: a rank is killed, stopped, delayed or made to call out of turn; every other rank must name it.

A round makes some three dozen calls on 2 to 4 processes; at a random one of them, a random rank does something wrong.
The fault counts as named if every other rank raises the right error, naming the right rank, at most a second after
the deadline; or, of those that are heard of (`plan.HEARD`), long before it. Groups run side by side, since they
mostly wait. Exit status: 0 if every fault was named, no rank hung, no rank raised an error after a delay within the
deadline, no bit that was returned is wrong, and nobody interrupted it.

Negative controls: --library tests/_C_test.so --off deadline (ranks hang), --off signature (wrong bits).
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.ranks import RankPool
from tools.faults.plan import FAULTS, KINDS, LETHAL, ON_THE_HOST, ORDERLY, Plan, draw
from tools.faults.rank import Outcome, round_of

MARGIN = 1.0  # seconds after the deadline by which a fault must have been named


class Tally:
    """Of all groups together."""

    def __init__(self, verbose: bool) -> None:
        self._lock, self._verbose = threading.Lock(), verbose
        self.injected: Counter[str] = Counter()
        self.named: Counter[str] = Counter()
        self.hung = self.wrong = self.alarms = self.honest = self.calls = self.undecided = 0
        self.slowest = 0.0

    def add(self, plan: Plan, outcomes: Sequence[tuple[bool, Any]]) -> None:
        problems, late, undecided = [], 0.0, 0
        hung = sum("still running" in str(value) for ok, value in outcomes if not ok)
        wrong = [line for ok, value in outcomes if ok for line in value.wrong]
        for rank, (ok, value) in enumerate(outcomes):
            if rank == plan.victim and (not ok or plan.kind in LETHAL):
                continue
            if not ok:
                problems.append(f"rank {rank}: {str(value)[-600:]}")
                continue
            late = max(late, value.took * (rank != plan.victim))  # that one may have stood still meanwhile
            undecided += KINDS[plan.kind] == value.error == "CallMismatch" and value.peer == -1
            problems += [f"rank {rank}: {line}" for line in judge(plan, rank, value)]
        with self._lock:
            self.calls += sum(value.made for ok, value in outcomes if ok)
            self.hung += hung
            self.undecided += undecided
            self.wrong += len(wrong)
            if plan.kind == "honest":
                self.honest += 1
                self.alarms += bool(problems)
            else:
                self.injected[plan.kind] += 1
                self.named[plan.kind] += not problems and not hung
                self.slowest = max(self.slowest, late - plan.limit)
            if (problems or wrong or hung) and self._verbose:
                print(f"{plan}", *problems, *wrong[:2], sep="\n    ", flush=True)


def blamed(plan: Plan, outcome: Outcome) -> tuple[int, ...]:
    """Whom a rank may name. Where two others differ in a call that it has not come to, it names both and blames none,
    unless a third rank has come to that call."""
    is_apart = KINDS[plan.kind] == "CallMismatch" and plan.world_size > 2 and outcome.made < plan.differs_at
    return (plan.victim, -1) if is_apart else (plan.victim,)


def judge(plan: Plan, rank: int, outcome: Outcome) -> list[str]:
    """What is wrong with how a round ended for `rank`; empty if nothing is."""
    wanted, found = KINDS[plan.kind], []
    if rank == plan.victim:  # it may finish its calls, or read an error that a peer wrote; which then names it
        if plan.kind in ("slow", "stop") and outcome.error and (outcome.error, outcome.peer) != (wanted, rank):
            found.append(f"the rank at fault got {outcome.error} of rank {outcome.peer}: {outcome.text}")
        if wanted == "CallMismatch" and outcome.error != wanted:
            found.append(f"the rank at fault got {outcome.error or 'no error'}: {outcome.text}")
        return found
    if outcome.error not in wanted.split(" or "):
        found.append(f"got {outcome.error or 'no error'} of rank {outcome.peer}, wanted {wanted}: {outcome.text}")
    elif wanted and outcome.peer not in blamed(plan, outcome):
        found.append(f"{wanted} names rank {outcome.peer}, wanted {plan.victim}: {outcome.text}")
    elif wanted and f"rank {plan.victim}" not in outcome.op_text:
        found.append(f"the op does not name rank {plan.victim}: {outcome.op_text}")
    # On a GPU a call that was launched counts, whatever came of it.
    if plan.kind in ORDERLY and plan.device == "cpu" and outcome.made != plan.at:
        found.append(f"{outcome.made} calls were complete, wanted {plan.at}, of all that rank {plan.victim} made")
    if outcome.took > plan.limit + MARGIN:
        found.append(f"took {outcome.took:.2f} s: {outcome.op_text}")
    return found


def serve(world_size: int, plans: queue.Queue[Plan], args: argparse.Namespace, tally: Tally) -> None:
    """One group: makes rounds until there are no more plans."""
    pool = RankPool(world_size, "cuda:0" if args.share else args.device)
    try:
        while time.monotonic() < args.end:
            try:
                plan = plans.get_nowait()
            except queue.Empty:
                return
            running = pool.start(round_of, plan)
            if plan.kind == "stop":
                watcher = threading.Thread(target=go_on_later, args=(pool.pids[plan.victim], plan.deadline + 1.5))
                watcher.start()
            outcomes = running.outcomes(plan.deadline + args.patience)
            if plan.kind == "stop":
                watcher.join()
            tally.add(plan, outcomes)
    finally:
        pool.discard()


def go_on_later(pid: int, seconds: float) -> None:
    """Waits until process `pid` has stopped, and `seconds` later lets it go on."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        until = time.monotonic() + 30
        while stat.read_text().rpartition(")")[2].split()[0] != "T" and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)
    except OSError:
        pass  # it is gone


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=0, help="how many (default 550; 110 on GPUs)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--share", action="store_true", help="all ranks on the first GPU, which they take in turn")
    parser.add_argument("--ranks", default="", help="world sizes, e.g. 2,4 (default 2,3,4; on GPUs: all of them)")
    parser.add_argument("--groups", type=int, default=0, help="side by side (default 8; 1 on GPUs)")
    parser.add_argument("--deadline", type=float, default=0.0, help="seconds (default 1)")
    parser.add_argument("--kinds", default=",".join([*FAULTS, "honest"]))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=30.0, help="seconds after the deadline until a rank is hung")
    parser.add_argument("--seconds", type=float, default=3600.0, help="inject no more faults after that")
    parser.add_argument("--record", type=Path, help="add the figures to this GPU record (tools/gpu_record.py)")
    parser.add_argument("--library", default="", help="a test build, for --off")
    parser.add_argument("--off", default="", help="a rule to switch off, as in tests/common/cases/rules.py")
    args = parser.parse_args()
    args.end = time.monotonic() + args.seconds
    if args.library:
        os.environ["MNNVL_AR_LIBRARY"] = str(Path(args.library).resolve())  # ranks inherit it, before they load one
    cuda = args.device == "cuda"
    deadline = args.deadline or 1.0
    kinds = tuple(kind for kind in args.kinds.split(",") if not (cuda and kind in ON_THE_HOST))
    sizes = [int(n) for n in args.ranks.split(",")] if args.ranks else [2, 3, 4]
    if cuda and not args.ranks:
        import torch

        sizes = [torch.cuda.device_count()]
    groups = args.groups or (1 if cuda else 8)
    faults = args.faults or (110 if cuda else 550)
    began, tally = time.monotonic(), Tally(verbose=True)
    queues: dict[int, queue.Queue[Plan]] = {n: queue.Queue() for n in sizes}
    for number in range(faults if "honest" not in kinds else -(-faults * len(kinds) // (len(kinds) - 1))):
        size = sizes[number // len(kinds) % len(sizes)]
        plan = draw(number, size, deadline, args.seed, kinds, args.device)
        queues[size].put(Plan(**{**vars(plan), "off": args.off}))
    ended: list[BaseException] = []

    def group(*arguments: Any) -> None:
        try:
            serve(*arguments)
        except BaseException as error:
            ended.append(error)
            traceback.print_exc()

    threads = [
        threading.Thread(target=group, args=(sizes[n % len(sizes)], queues[sizes[n % len(sizes)]], args, tally))
        for n in range(max(groups, len(sizes)) if not cuda else len(sizes))
    ]
    signal.signal(signal.SIGINT, lambda *_: setattr(args, "end", 0.0))  # the faults so far are still reported
    for thread in threads:
        thread.start()
        if cuda:
            thread.join()  # groups would share GPUs
    for thread in threads:
        thread.join()
    injected, named = sum(tally.injected.values()), sum(tally.named.values())
    for kind in tally.injected:
        print(f"  {kind:24} {tally.named[kind]:4} of {tally.injected[kind]} named")
    print(f"  honest delays: {tally.honest}, of which {tally.alarms} were complained of")
    print(f"  {tally.undecided} ranks blamed neither of two that differ in a call which they had not come to")
    print(f"  {tally.calls} calls checked; the latest error came {tally.slowest:.2f} s after its deadline")
    print(f"  {time.monotonic() - began:.0f} s, deadline {deadline} s, world sizes {sizes}, {args.device}")
    print(f"faults: {injected} injected, {named} named, {tally.hung} hung, {tally.wrong} wrong bits")
    if args.record:
        from tools import gpu_record

        figures = {"injected": injected, "named": named, "hung": tally.hung, "wrong_bits": tally.wrong}
        more = {"calls": tally.calls, "deadline": deadline, "seed": args.seed, "kinds": dict(tally.injected)}
        key = f"faults, {args.device}, {' and '.join(map(str, sizes))} ranks{' on one GPU' * args.share}"
        good = not ended and named == injected and not tally.hung and not tally.wrong
        gpu_record.merge("faults", key, {**figures, **more}, args.record, good=good)
    if ended:
        print(f"faults: {len(ended)} groups of ranks ended before their faults were injected, first by {ended[0]!r}")
    bad = named != injected or tally.hung > 0 or tally.wrong > 0 or tally.alarms > 0
    return int(bool(ended) or args.end == 0.0 or bad)


if __name__ == "__main__":
    sys.exit(main())
