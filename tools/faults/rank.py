"""What each rank does in a round: calls, every output bit checked, until the plan's fault breaks the workspace."""

from __future__ import annotations

import logging
import multiprocessing.util
import os
import random
import signal
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from common.cases.calls import Prepared, wanted
from common.cases.rules import break_rule
from tools.faults.plan import HEARD, ON_THE_HOST, SIZES, SUDDEN, WORKSPACE, Plan


@dataclass
class Outcome:
    """How a round ended for one rank."""

    made: int = 0  # calls that returned
    wrong: list[str] = field(default_factory=list)  # of those
    error: str = ""  # class that check() raised, or "" if all calls returned
    peer: int = -1  # that it names
    took: float = 0.0  # seconds from the beginning of the call to the error
    text: str = ""
    op_text: str = ""  # what the op said


class Interrupted(RuntimeError):
    """What the handler of kind "signal" raises."""


def interrupt(*_: Any) -> None:
    raise Interrupted("a signal's handler")


class Sudden:
    """Does `deed` to this process after `delay` seconds, from a thread, whatever the process is doing then."""

    def __init__(self, deed: str, delay: float, workspace: Any) -> None:
        self._deed, self._delay, self._workspace = deed, delay, workspace
        if deed == "signal":
            signal.signal(signal.SIGTERM, interrupt)
        self._done = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def wait(self) -> None:
        self._done.wait(60)

    def _run(self) -> None:
        time.sleep(self._delay)
        if self._deed == "exit in a call":
            os._exit(3)
        if self._deed == "closed by force":
            self._workspace.close(force=True)
        else:
            numbers = {
                "kill": signal.SIGKILL,
                "death": signal.SIGKILL,
                "stop": signal.SIGSTOP,
                "signal": signal.SIGTERM,
            }
            os.kill(os.getpid(), numbers[self._deed])
        self._done.set()


def round_of(rank: Any, plan: Plan) -> Outcome:
    """Collective."""
    logging.getLogger("mnnvl_ar").setLevel(logging.CRITICAL)  # what the monitors say, hundreds of times
    try:
        return _round_of(rank, plan)
    except Interrupted as raised:  # between two calls, and no more calls are made
        return Outcome(error="interrupted", text=str(raised))


def _round_of(rank: Any, plan: Plan) -> Outcome:
    workspace = _workspace(rank, plan)
    for call in SIZES[plan.device]:  # kept, so that no rank waits while another computes its reference
        wanted(call, rank.world_size)
    outcome, sudden = Outcome(), None
    is_victim, pauses = rank.rank == plan.victim, random.Random(plan.seed + rank.rank)
    graphs = _Graphs(rank, workspace) if plan.graphs else None
    rank.barrier()
    for number, call in enumerate(plan.calls(rank.rank)):
        prepared = graphs.of(call) if graphs else Prepared(rank, call)
        if is_victim and number == plan.at:
            if plan.kind == "exit before first call":
                os._exit(3)
            if plan.kind == "exception":
                break
            if plan.kind in HEARD and plan.kind != "death":
                _leave(workspace, plan)
                break
            if plan.kind in ("slow", "honest"):
                time.sleep(
                    plan.deadline * (0.4 if plan.kind == "honest" else 1.0) + plan.more["late"] * (plan.kind == "slow")
                )
            if plan.kind in SUDDEN:
                sudden = Sudden(plan.kind, plan.more["delay"], workspace)
        if sudden and number == plan.at + 4:
            sudden.wait()
        began = time.monotonic()
        try:
            if graphs:
                graphs.replay(call)
            else:
                prepared.launch(workspace.handle)
            rank.synchronize()
            if plan.looks:
                if pauses.random() < 0.3:
                    time.sleep(0.005 * pauses.random())
                workspace.check()
        except RuntimeError as error:
            _explain(workspace, error, outcome, time.monotonic() - began)
            break
        outcome.made += 1
        outcome.wrong += prepared.wrong()
    if sudden and plan.kind in ON_THE_HOST:
        sudden.wait()  # or it would happen in the next round
    if plan.kind == "closed by force" or plan.kind in HEARD:  # the next round's is a new one, on all ranks
        rank._workspaces.pop("faults").close(force=True)
    return outcome


def _leave(workspace: Any, plan: Plan) -> None:
    if plan.kind == "close":
        workspace.close(force=plan.graphs)
    elif plan.kind == "sleep":
        workspace.sleep()
    else:  # as a child of multiprocessing ends
        multiprocessing.util._exit_function()  # type: ignore[attr-defined]
        os._exit(0)


def _explain(workspace: Any, error: RuntimeError, outcome: Outcome, took: float) -> None:
    import mnnvl_ar

    outcome.took, outcome.op_text = took, str(error)
    try:
        workspace.check()
        outcome.error, outcome.text = "nothing", "check() raised nothing"
    except mnnvl_ar.WorkspaceBroken as broken:
        outcome.error, outcome.peer, outcome.text = type(broken).__name__, broken.peer, str(broken)
    except mnnvl_ar.MnnvlArError as closed:
        outcome.error, outcome.text = "closed", str(closed)


def _workspace(rank: Any, plan: Plan) -> Any:
    """The last round's, recovered, or a new one. All ranks choose alike: their plans and pasts are alike."""
    kept = rank._workspaces.get("faults")
    if kept is not None and plan.recover:
        kept.recover(rank.group, timeout=30.0)
    else:
        if kept is not None:
            kept.close(force=True)
        kept = rank.new_workspace(**WORKSPACE, deadline=plan.deadline, monitor=plan.kind in HEARD)
        rank._workspaces["faults"] = kept
    if plan.off:
        break_rule(kept.handle, plan.off)
    return kept


class _Graphs:
    """Each call as a captured graph, kept for the round."""

    def __init__(self, rank: Any, workspace: Any) -> None:
        self._rank, self._handle = rank, workspace.handle
        self._made: dict[Any, tuple[Prepared, Any]] = {}

    def of(self, call: Any) -> Prepared:
        if call not in self._made:
            prepared = Prepared(self._rank, call)
            self._made[call] = prepared, self._rank.capture(lambda: prepared.launch(self._handle))
        self._made[call][0].refill()
        return self._made[call][0]

    def replay(self, call: Any) -> None:
        self._made[call][1].replay()
