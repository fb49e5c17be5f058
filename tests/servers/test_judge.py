"""What is wrong with a scenario: each kind of wrong is found, and nothing in a sound one."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from mnnvl_ar.compat import policy
from mnnvl_ar.errors import PeerTimeout
from servers import compare, judge
from servers.answers import Answer
from servers.plan import Scenario, scenarios

BY_NAME = {each.name: each for each in scenarios()}
COUNTED = {"calls": 10**6, "normed": 100, "workspace_bytes": 64 << 20, "workers": 2}
SPEED, TRAFFIC, STOP = "vllm/llama-32/ours", "vllm/http-ngram-1/ours", "vllm/stop-in-decode/ours"
INVARIANT = "vllm/invariant/ops"


def measured(kind: str) -> dict[str, Any]:
    found = {
        "answers": {"answered": 48, "wanted": 48, "degenerate": 0, "without_logprobs": 0},
        "steps": {"batches": {"1": {"median_ms": 3.0, "quartiles_ms": [2.9, 3.1]}}, "repeats": 8, "steps_made": 2340},
        "compositions": {"again_same_bits": True, "other_order_same_bits": True, "alone_same_bits": True},
        "traffic": {"requests": 512, "concurrency": 128, "http": True, "answered": 512, "unanswered": []},
        "sleep": {"same_bits": True, "awake_after_s": 1.0},
    }[kind]
    return {"event": "measured", "at": 2.0, "kind": kind, "counted": dict(COUNTED), **copy.deepcopy(found)}


def sound(scenario: Scenario) -> list[dict[str, Any]]:
    first = [
        {"event": "installed", "at": 0.0, "version": "0.26.0"},
        {"event": "started", "at": 1.0, "seconds": 100.0},
    ]
    return [*first, *(measured(each.kind) for each in scenario.measures)]


def problems(
    name: str, events: list[dict[str, Any]], log: judge.Lines = (), cut: str = "", harmed: Any = None
) -> list[str]:
    return list(judge.judged(BY_NAME[name], events, list(log), cut, harmed)["problems"])


@pytest.mark.parametrize("name", [SPEED, TRAFFIC, INVARIANT, "vllm/sleep/ours", "vllm/ops/ops", "vllm/llama-32/as_is"])
def test_nothing_is_wrong_with_a_sound_one(name: str) -> None:
    assert problems(name, sound(BY_NAME[name])) == []


@pytest.mark.parametrize(
    ("name", "kind", "change", "says"),
    [
        (SPEED, "answers", {"answered": 47}, "47 of 48 prompts"),
        (SPEED, "answers", {"degenerate": 3}, "few tokens in turn"),
        (SPEED, "answers", {"without_logprobs": 1}, "without log-probabilities"),
        (SPEED, "compositions", {"other_order_same_bits": False}, "not in another order"),
        (SPEED, "steps", {"counted": {**COUNTED, "calls": 0}}, "no call of ours was served"),
        (SPEED, "steps", {"counted": {**COUNTED, "calls": 2340 * 31}}, "calls in 2340 steps of 32 layers"),
        (SPEED, "answers", {"counted": {**COUNTED, "normed": 0}}, "no call of ours fused a norm"),
        (SPEED, "answers", {"counted": {**COUNTED, "workers": 1}}, "1 workers said"),
        (TRAFFIC, "traffic", {"answered": 511, "unanswered": ["request 7: not answered"]}, "511 of 512"),
        (INVARIANT, "compositions", {"alone_same_bits": False}, "a prompt alone gives other bits"),
        ("vllm/ops/ops", "answers", {"counted": {**COUNTED, "normed": 0}}, "no call of ours fused a norm"),
        ("vllm/sleep/ours", "sleep", {"same_bits": False}, "after sleep differ"),
    ],
)
def test_what_is_wrong_is_found(name: str, kind: str, change: dict[str, Any], says: str) -> None:
    events = sound(BY_NAME[name])
    next(each for each in events if each.get("kind") == kind).update(change)
    assert any(says in line for line in problems(name, events))


FUSED = {
    "vllm": "INFO Initialized FlashInfer Allreduce norm fusion workspace with backend=trtllm",
    "sglang": "FlashInfer AllReduce Fusion enabled and workspace initialized: backend=trtllm, rank=0",
}


@pytest.mark.parametrize(
    ("name", "log", "says"),
    [
        ("vllm/llama-32/trtllm", [FUSED["vllm"]], ""),
        ("vllm/llama-32/trtllm", [], "nothing says that it was fused"),
        ("vllm/llama-32/trtllm", [FUSED["vllm"].replace("trtllm", "mnnvl")], "nothing says that it was fused"),
        (
            "vllm/llama-32/trtllm",
            [FUSED["vllm"], "WARNING Flashinfer allreduce-norm fusion will be disabled."],
            "not fused by trtllm: WARNING",
        ),
        ("sglang/qwen3-32/trtllm", [FUSED["sglang"]], ""),
        ("sglang/qwen3-32/trtllm", [FUSED["sglang"], "FlashInfer allreduce fusion disabled globally"], "not fused"),
        ("sglang/qwen3-32/trtllm", [FUSED["vllm"]], "nothing says that it was fused"),
        ("vllm/llama-32/as_is", [], ""),
    ],
)
def test_trtllm_fuses_or_the_scenario_fails(name: str, log: list[str], says: str) -> None:
    found = problems(name, sound(BY_NAME[name]), [(5.0, each) for each in log])
    assert [says in each for each in found] == ([True] if says else [])


@pytest.mark.parametrize(("name", "a_layer"), [("vllm/llama-32/ours", 2), ("sglang/qwen3-32/ours", 1)])
def test_a_server_that_fuses_half_as_often_is_asked_for_half(name: str, a_layer: int) -> None:
    for calls, wrong in ((16 * a_layer * 2340, 0), (16 * a_layer * 2340 - 1, 1)):
        events = sound(BY_NAME[name])
        next(each for each in events if each.get("kind") == "steps")["counted"]["calls"] = calls
        assert len(problems(name, events)) == wrong


def test_a_server_that_is_not_batch_invariant_by_itself_is_not_held_to_it() -> None:
    events = sound(BY_NAME[SPEED])
    events[-1] |= {"again_same_bits": False, "other_order_same_bits": False, "alone_same_bits": False}
    assert problems(SPEED, events) == []


def test_a_measurement_that_is_missing() -> None:
    events = sound(BY_NAME[SPEED])[:-1]
    assert "ended by its limit" in problems(SPEED, events, cut="ended by its limit of 300 s")[0]
    raised = {"event": "raised", "at": 3.0, "type": "EngineDeadError", "text": "why"}
    assert "EngineDeadError: why" in problems(SPEED, [*events, raised])[0]


TOKENS = [[1, 2, 3, 4], [5, 6, 7, 8]]


def of_fault(returned: list[list[int]] = TOKENS) -> list[dict[str, Any]]:
    events = sound(BY_NAME[SPEED])[:2]
    events += [{"event": "sound", "at": 5.0 + n, "number": n, "tokens": TOKENS} for n in range(2)]
    events += [{"event": "returned", "at": 9.0, "request": i, "tokens": t[:3]} for i, t in enumerate(returned)]
    return [*events, {"event": "raised", "at": 25.0, "type": "EngineDeadError", "text": "dead"}]


def line(of: int, by: int = 0) -> str:
    """As the library writes it."""
    return policy.last_words(PeerTimeout(f"rank {by} waited 8 s for rank {of}", by, of, 7, "a call", "", 8.0))


NAMED = [(18.2, line(1))]


def test_a_fault_that_was_named() -> None:
    assert problems(STOP, of_fault(), NAMED, harmed=10.0) == []
    told = judge.judged(BY_NAME[STOP], of_fault(), NAMED, "", 10.0)["fault"]
    assert (told["named_by_ours"], told["tokens_returned"]) == ([1], 6)
    assert told["named_after_s"] == pytest.approx(8.2)
    assert told["dead_after_s"] == pytest.approx(15.0)


@pytest.mark.parametrize(
    ("log", "events", "says"),
    [
        ([(18.2, line(0, by=1))], of_fault(), "rank 1 was at fault, named were [0]"),
        ([*NAMED, (18.3, line(0, by=1))], of_fault(), "rank 1 was at fault, named were [0, 1]"),
        ([], of_fault(), "nobody named rank 1"),
        ([(3.0, line(1))], of_fault(), "nobody named rank 1"),  # before the fault
        ([(19.5, line(1))], of_fault(), "named after 9.5 s"),
        (NAMED, of_fault()[:-1], "did not say that it is dead"),
        (NAMED, [*of_fault()[:-1], {**of_fault()[-1], "at": 31.0}], "12.8 s after the rank was named"),
        (NAMED, of_fault([[1, 2, 9], [5]]), "request 0: token 2 is 9, right was [3]"),
    ],
)
def test_a_fault_that_ended_wrongly(log: judge.Lines, events: list[dict[str, Any]], says: str) -> None:
    assert any(says in each for each in problems(STOP, events, log, harmed=10.0))


def test_runs_that_differ_without_a_fault_judge_nothing() -> None:
    events = of_fault()
    events[3] = {**events[3], "tokens": [[1, 2, 3, 5], TOKENS[1]]}
    assert any("cannot be judged" in each for each in problems(STOP, events, NAMED, harmed=10.0))


def test_a_fault_that_was_not_done() -> None:
    assert "was not done" in problems(STOP, of_fault(), NAMED)[0]


def test_the_server_may_find_a_death_first_but_not_a_stop() -> None:
    log = [(10.2, "ERROR Worker proc VllmWorker-1 died unexpectedly (exit code: -9), shutting down executor.")]
    assert problems("vllm/kill-in-decode/ours", of_fault(), log, harmed=10.0) == []
    assert problems(STOP, of_fault(), log, harmed=10.0) == ["nobody named rank 1"]
    other = [(10.2, "Worker proc VllmWorker-0 died unexpectedly (exit code: -9)")]
    assert problems("vllm/kill-in-decode/ours", of_fault(), other, harmed=10.0) == ["nobody named rank 1"]
    sglang = [(10.2, "Subprocess scheduler_1 (pid=77) crashed with exit code -9")]
    assert problems("sglang/kill-in-decode/ours", of_fault(), sglang, harmed=10.0) == []


def test_without_ours_nobody_need_be_named() -> None:
    assert problems("vllm/stop-in-decode/as_is", of_fault()[:-1], [], cut="did not end", harmed=10.0) == []


def answer(tokens: list[int], *values: float) -> Answer:
    return Answer(tokens, [{token: value, 99: -5.0} for token, value in zip(tokens, values, strict=True)])


def test_agreement_stops_where_texts_part() -> None:
    ours, theirs = [answer([1, 2, 3], -1, -1, -1)], [answer([1, 4, 3], -1.5, -2, -9)]
    found = compare.agreement(ours, theirs)
    assert found["equal_tokens"] == pytest.approx(1 / 3)
    assert found["same_answers"] == 0
    assert found["logprobs_compared"] == 3  # 1 and 99 at the first place, 99 at the second
    assert found["logprob_apart_max"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="1 answers and 2"):
        compare.agreement(ours, theirs * 2)


def test_bits() -> None:
    one = [answer([1, 2], -1, -2)]
    assert compare.same_bits(one, [answer([1, 2], -1, -2)])
    assert not compare.same_bits(one, [answer([1, 2], -1, -2 - 1e-15)])
    assert not compare.same_bits(one, [answer([1, 3], -1, -2)])


def test_farther_by_more_than_chance() -> None:
    theirs = [0.010 + 0.001 * (i % 5) for i in range(40)]
    assert compare.no_farther(theirs, theirs)["no_farther"]
    assert compare.no_farther([x - 0.001 for x in theirs], theirs)["no_farther"]
    jitter = [x + (-1) ** i * 0.002 for i, x in enumerate(theirs)]
    assert compare.no_farther(jitter, theirs)["no_farther"]
    assert not compare.no_farther([x + 0.001 + 0.0001 * (i % 3) for i, x in enumerate(theirs)], theirs)["no_farther"]
    far = {"no_farther_than_as_is": compare.no_farther([x + 0.01 for x in theirs], theirs)}
    event = {"event": "measured", "at": 1.0, "kind": "reference", **far}
    assert "farther from fp32" in problems("vllm/llama-32/fp32", [event])[0]
