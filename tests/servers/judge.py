"""What is wrong with a scenario, from what its process told, what was logged, and when.

A scenario passes if nothing is: every measurement ended, all requests were answered, answers are no few tokens in turn,
ours served calls in each of them and fused norms, FlashInfer's trtllm fused where it is what is measured, a fault was
named as the rank that it was done to, and no token that came back is a wrong one.
"""

from __future__ import annotations

import re
from typing import Any

from servers import compare
from servers.modes import DEADLINE, FUSES, GIVES_UP, STARTUP_DEADLINE
from servers.plan import Scenario

STATUS = 87  # mnnvl_ar.compat.policy
LAST_WORDS = re.compile(r"mnnvl_ar ends rank (\d+) with status 87: (?:rank (\d+) is at fault|who is at fault)")
THEIR_WORDS = re.compile(
    r"Worker proc \S*?-(\d+) died|scheduler_(\d+) \(pid=\d+\) crashed|TP(\d+) pid=\d+\).*on purpose"
)
NAMED_WITHIN = 1.0  # seconds after the deadline
DEAD_WITHIN = 12.0  # seconds after that, until the engine says so
Lines = list[tuple[float, str]]  # Unix time of each line of the log


def judged(
    scenario: Scenario, events: list[dict[str, Any]], log: Lines, cut: str, harmed: float | None
) -> dict[str, Any]:
    """The record of a run. `cut`: why the runner ended it, if it did. `harmed`: when the fault was done."""
    first = {each["event"]: each for each in reversed(events)}
    measured = [_without(each) for each in events if each["event"] == "measured"]
    told: dict[str, Any] = {
        "scenario": scenario.name,
        "server": scenario.server,
        "model": scenario.model.name,
        "mode": scenario.mode,
        "installed": _without(first.get("installed", {})),
        "start_up_s": first.get("started", {}).get("seconds"),
        "measured": measured,
    }
    if scenario.is_fault:
        told["fault"], problems = fault(scenario, events, log, cut, harmed)
    else:
        problems = unfinished(scenario, events, measured, cut)
    if scenario.mode == "trtllm":
        problems += unfused(scenario.server, log)
    problems += [line for each in measured for line in wrong(scenario, each)]
    return {**told, "problems": problems, "passed": not problems}


def _without(event: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name not in ("event", "at")}


def unfinished(scenario: Scenario, events: list[dict[str, Any]], measured: list[dict[str, Any]], cut: str) -> list[str]:
    ended = [each["kind"] for each in measured]
    wanted = [each.kind for each in scenario.measures]
    if ended == wanted:
        return []
    raised = next((each for each in events if each["event"] == "raised"), None)
    why = f"{raised['type']}: {raised['text']}" if raised else cut or "its process ended"
    return [f"measured {', '.join(ended) or 'nothing'} of {', '.join(wanted)}: {why}"]


def unfused(server: str, log: Lines) -> list[str]:
    """A server that cannot have FlashInfer's workspace goes on without, and says so."""
    lines = [line for _, line in log if any(words in line for words in GIVES_UP[server])]
    if lines:
        return [f"not fused by trtllm: {lines[0]}"]
    return [] if any(FUSES[server] in line for _, line in log) else ["nothing says that it was fused by trtllm"]


def wrong(scenario: Scenario, measured: dict[str, Any]) -> list[str]:
    """With one measurement that ended."""
    kind, lines = measured["kind"], []
    if kind == "answers":
        if measured["answered"] != measured["wanted"]:
            lines.append(f"{measured['answered']} of {measured['wanted']} prompts were answered")
        if measured["without_logprobs"]:
            lines.append(f"{measured['without_logprobs']} answers came without log-probabilities")
        if measured["degenerate"]:
            lines.append(f"{measured['degenerate']} answers are a few tokens in turn, which proves nothing")
    if kind == "traffic" and measured["answered"] != measured["requests"]:
        lines.append(
            f"{measured['answered']} of {measured['requests']} requests were answered: {measured['unanswered']}"
        )
    if kind == "sleep" and not measured["same_bits"]:
        lines.append("answers after sleep differ")
    if kind == "compositions" and measured["again_same_bits"] and not measured["other_order_same_bits"]:
        lines.append("the server gives the same bits again, but not in another order")
    if kind == "compositions" and scenario.is_batch_invariant and not measured["alone_same_bits"]:
        lines.append("the server is to be batch-invariant, but a prompt alone gives other bits")
    if kind == "reference":
        for name, found in measured.items():
            if name.startswith("no_farther_than") and not found["no_farther"]:
                lines.append(f"ours is farther from fp32 ({name}): {found['ours']:.5f}, {found['theirs']:.5f}")
    if scenario.is_ours and kind != "fault":
        lines += [f"{kind}: {line}" for line in uncounted(scenario, measured)]
    return lines


def uncounted(scenario: Scenario, measured: dict[str, Any]) -> list[str]:
    """Calls that were not fused. Half of what a decoder's layers make in a step could not be all."""
    counted = measured.get("counted", {})
    calls, normed, workers = (counted.get(name, 0) for name in ("calls", "normed", "workers"))
    if workers < 2:
        return [f"{workers} workers said how many calls they served, wanted 2"]
    if calls < 1:
        return ["no call of ours was served"]
    if normed < 1:
        return ["no call of ours fused a norm"]
    steps = measured.get("steps_made", 0)
    if measured["kind"] == "steps" and calls < scenario.calls_a_layer * scenario.model.layers * steps / 2:
        return [f"{calls} calls in {steps} steps of {scenario.model.layers} layers"]
    return []


def fault(
    scenario: Scenario, events: list[dict[str, Any]], log: Lines, cut: str, harmed: float | None
) -> tuple[dict[str, Any], list[str]]:
    """What a fault did: who was named, by whom, after how many seconds; when the engine was dead; wrong tokens."""
    asked = next(each.options for each in scenario.measures if each.kind == "fault")
    rank, kind, where = asked["rank"], asked["kind"], asked["where"]
    told: dict[str, Any] = {**asked, "harmed": harmed is not None}
    if harmed is None:
        return told, [f"the fault was not done: {cut or _raised(events) or 'its process ended'}"]
    ours = [
        (at - harmed, found[1], found[2]) for at, line in log if (found := LAST_WORDS.search(line)) and at >= harmed
    ]
    theirs = [
        (at - harmed, next(filter(None, found.groups())))
        for at, line in log
        if (found := THEIR_WORDS.search(line)) and at >= harmed
    ]
    dead = min((each["at"] - harmed for each in events if each["event"] in ("raised", "gone")), default=None)
    told |= {
        "named_by_ours": sorted({int(name) for _, _, name in ours if name}),
        "named_after_s": min((at for at, _, name in ours if name), default=None),
        "named_by_server": sorted({int(name) for _, name in theirs}),
        "status_87": any(str(STATUS) in line for at, line in log if at >= harmed and "exit code" in line),
        "dead_after_s": dead,
        "cut": cut,
    }
    problems = _wrong_names(scenario.is_ours, kind, where, rank, told)
    if dead is None and scenario.is_ours:
        problems.append(f"the engine did not say that it is dead: {cut or 'its process ended'}")
    named = told["named_after_s"]
    if scenario.is_ours and None not in (dead, named) and dead - named > DEAD_WITHIN:
        problems.append(f"the engine said that it is dead {dead - named:.1f} s after the rank was named")
    tokens, lines = returned(events)
    told["tokens_returned"] = tokens
    return told, problems + lines


def _wrong_names(is_ours: bool, kind: str, where: str, rank: int, told: dict[str, Any]) -> list[str]:
    if not is_ours:
        return []
    found = []
    if any(name != rank for name in told["named_by_ours"]):
        found.append(f"rank {rank} was at fault, named were {told['named_by_ours']}")
    # A worker that has died, or has raised, may be found by the server first, which then ends the others.
    by_server = kind in ("kill", "raise") and rank in told["named_by_server"]
    if rank not in told["named_by_ours"] and not by_server:
        found.append(f"nobody named rank {rank}")
    deadline = STARTUP_DEADLINE if where == "start-up" else DEADLINE
    if told["named_after_s"] is not None and told["named_after_s"] > deadline + NAMED_WITHIN:
        found.append(f"named after {told['named_after_s']:.1f} s, the deadline was {deadline:g} s")
    return found


def returned(events: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """How many tokens came back in the run with the fault, and those that are wrong."""
    sound = [each["tokens"] for each in events if each["event"] == "sound"]
    last: dict[int, list[int]] = {}
    for each in events:
        if each["event"] == "returned":
            last[each["request"]] = each["tokens"]
    count = sum(map(len, last.values()))
    if not last:
        return 0, []
    if len(sound) != 2 or sound[0] != sound[1]:
        return count, ["two runs without a fault gave other tokens, so those returned cannot be judged"]
    return count, compare.wrong_tokens(last, sound[0])


def _raised(events: list[dict[str, Any]]) -> str:
    return next((f"{each['type']}: {each['text']}" for each in events if each["event"] == "raised"), "")
