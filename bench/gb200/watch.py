"""One part on one node: its ranks run, until all have ended everywhere, or one has failed anywhere.

Whichever node sees a rank fail tells all others, and all end their ranks. The first node gathers what each of them has
to say and finds out whose fault it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench import progress
from bench.gb200.crew import TICK, Crew
from bench.gb200.ranks import Ranks
from mnnvl_ar.doctor.selftest import ranks as named

GRACE = 5.0  # seconds that the other ranks get once one has failed: they may say more
BEAT = 1.0
SLACK = 3  # times as long as a step of the bench may take on one host
# What the last words of ranks are that only lost another one.
CONSEQUENCES = ("Connection", "connection", "gloo", "NCCL", "Broken pipe", "Socket", "has died")


@dataclass
class Outcome:
    """trouble: what ended the part, in words, None if nothing did. wrong: a result of ours was not right."""

    trouble: str | None = None
    wrong: bool = False
    failures: list[dict[str, Any]] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)


def run(crew: Crew, key: str, ranks: Ranks, limit: float, show: Callable[[str], None]) -> Outcome | None:
    """Waits for `ranks`, whose notes are at `key`. Returns the outcome over all nodes on the first node, and None on
    the others. limit: seconds, by the first node's clock. show: called with what the first rank prints."""
    began = time.monotonic()
    try:
        _until_over(crew, key, ranks, limit, show)
        note = {"states": [ranks.state(rank) for rank in ranks.numbers], "wrong": ranks.wrong}
    finally:
        ranks.end()
    if crew.place.leads:
        show(ranks.news())
    crew.tell(f"{key}/ended/{crew.place.node}", note)
    if not crew.place.leads:
        return None
    return _outcome(crew, key, began)


def _until_over(crew: Crew, key: str, ranks: Ranks, limit: float, show: Callable[[str], None]) -> None:
    told: set[int] = set()
    began = beat = time.monotonic()
    end = None
    while True:
        now = time.monotonic()
        for rank, how in ranks.failed().items():
            if rank not in told:
                told.add(rank)
                crew.append(f"{key}/failures", failure(crew, f"rank {rank}", how, ranks.tail(rank), rank))
        if crew.place.leads:
            show(ranks.news())
            if why := _overdue(crew, ranks, began, now, limit) if end is None else None:
                crew.append(f"{key}/failures", failure(crew, "the part", why))
        if end is None and crew.listed(f"{key}/failures"):
            end = now + GRACE
        if (end is not None and now > end) or (not ranks.running and _all_done(crew, key, end)):
            return
        if now - beat > BEAT:
            crew.beat()
            beat = now
        time.sleep(TICK)


def _all_done(crew: Crew, key: str, end: float | None) -> bool:
    """This node's ranks have ended: whether to go. With a failure, at once; else when those of all nodes have."""
    done = f"{key}/done"
    crew.tell(f"{done}/{crew.place.node}", True)
    return end is not None or all(crew.read(f"{done}/{node}") for node in range(crew.place.nodes))


def _overdue(crew: Crew, ranks: Ranks, began: float, now: float, limit: float) -> str | None:
    """On the first node, whose first rank says what all are at."""
    if now - began > limit:
        return f"was not done in {limit:.0f} s"
    if gone := crew.silent(range(crew.place.nodes), began):
        return f"had no sign of life from {nodes_named(gone)}"
    state = ranks.state(ranks.numbers[0])
    if state["at"] != progress.STARTING and state["seconds"] > SLACK * state["limit"]:
        return f"made no progress in {state['seconds']:.0f} s"
    return None


def failure(crew: Crew, what: str, how: str, tail: str = "", rank: int | None = None) -> dict[str, Any]:
    """What is appended for all nodes to read. tail: the end of the rank's log."""
    return {"what": what, "rank": rank, "node": crew.place.node, "how": how, "tail": tail, "time": time.time()}


def _outcome(crew: Crew, key: str, began: float) -> Outcome:
    until = time.monotonic() + 2 * GRACE
    notes, missing = crew.gather(f"{key}/ended", began, until)
    failures = crew.listed(f"{key}/failures")
    outcome = Outcome(wrong=any(note["wrong"] for note in notes.values()), failures=failures)
    outcome.states = sorted((state for note in notes.values() for state in note["states"]), key=lambda s: s["rank"])
    troubles = [f"{nodes_named(missing)} went silent"] if missing else []
    troubles += [blame(failures, outcome.states)] if failures else []
    outcome.trouble = "; ".join(troubles) or None
    return outcome


def blame(failures: Sequence[dict[str, Any]], states: Sequence[dict[str, Any]]) -> str:
    """What happened, the likeliest cause first: a rank that was killed, one that failed by itself, one that lost
    others; where none failed, what the ranks were at, and which of them stood still."""

    def order(failure: dict[str, Any]) -> tuple[int, float]:
        last = (failure["tail"].strip().splitlines() or [""])[-1]
        if any(word in failure["how"] for word in ("killed", "SIGTERM")):
            return 0, failure["time"]
        return 2 if any(word in last for word in CONSEQUENCES) else 1, failure["time"]

    first = min(failures, key=order)
    where = "" if first["rank"] is None else f" on node {first['node']}"
    text = f"{first['what']}{where} {first['how']}"
    if last := first["tail"].strip().splitlines():
        text += f": {last[-1].strip()}"
    if first["rank"] is None and states:
        text += "; " + behind(states)
    return text


def behind(states: Sequence[dict[str, Any]]) -> str:
    """Who was at what, fewest ranks first; of processes that do not run, how they are."""
    groups: dict[str, list[int]] = {}
    for state in states:
        mark = f" (process {state['process']})" if state["process"] else ""
        groups.setdefault(f"{state['at']}{mark}", []).append(state["rank"])
    ordered = sorted(groups.items(), key=lambda item: (len(item[1]), item[1]))
    return "; ".join(f"{named(who)} at: {what}" for what, who in ordered)


def nodes_named(nodes: Sequence[int]) -> str:
    return f"node{'s' if len(nodes) > 1 else ''} {', '.join(map(str, nodes))}"
