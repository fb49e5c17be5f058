"""The runner with stand-ins for servers: limits, what is left over, faults, the record, a scenario from end to end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from servers import __main__ as program
from servers import events, faults, record, runner
from servers.models.architectures import tiny
from servers.plan import Measure, Scenario, scenarios

TESTS = Path(__file__).resolve().parent.parent
FAST = Scenario("vllm/stand-in/as_is", "vllm", tiny("llama"), "as_is", (Measure("sleep"),))


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(TESTS), runner.MARK: str(folder)}


def is_alive(pid: int) -> bool:
    try:
        return (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]) != "Z"
    except OSError:
        return False


HANGS = """
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"],
                         start_new_session=True)
open("pids", "w").write(f"{os.getpid()} {child.pid}")
print("waits", flush=True)
if len(sys.argv) > 1:
    open("harmed.1", "w").write(repr(time.time()))
time.sleep(600)
"""


@pytest.mark.parametrize("harm", [[], ["harm"]])
def test_what_hangs_is_ended_with_all_it_started(tmp_path: Path, harm: list[str]) -> None:
    """By its limit, or by the patience after a fault; a stopped process of another session too."""
    limit, patience = (600.0, 1.0) if harm else (6.0, 600.0)
    found = runner.process([sys.executable, "-c", HANGS, *harm], environment(tmp_path), limit, tmp_path, FAST, patience)
    assert ("after the fault" if harm else "by its limit") in found.cut
    if (tmp_path / "pids").exists():  # a busy machine may not have come so far within 6 s
        pids = list(map(int, (tmp_path / "pids").read_text().split()))
        assert within(60, lambda: not any(map(is_alive, pids)))
    assert harm == [] or [text for _, text in found.log] == ["waits"]


def test_what_runs_ends_with_a_runner_that_is_told_to_end(tmp_path: Path) -> None:
    """As by `timeout`. The control: one that is killed leaves it, and the next runner ends that."""
    program = (
        "import sys; from pathlib import Path; from servers import runner; runner.ends_when_told(); "
        f"runner.process([sys.executable, '-c', {HANGS!r}], {{**__import__('os').environ}}, 600, Path(sys.argv[1]))"
    )
    for number, how in enumerate((signal.SIGTERM, signal.SIGKILL)):
        folder = tmp_path / str(number)
        folder.mkdir()
        started = [sys.executable, "-c", program, str(folder)]
        child = subprocess.Popen(started, env={**environment(folder), "PYTHONPATH": str(TESTS)})
        assert within(60, lambda folder=folder: len((folder / "pids").read_text().split()) == 2)
        pids = list(map(int, (folder / "pids").read_text().split()))
        child.send_signal(how)
        child.wait(60)
        if how == signal.SIGTERM:
            assert within(60, lambda pids=pids: not any(map(is_alive, pids)))
            continue
        assert all(map(is_alive, pids))
        assert runner.end_all(tmp_path / "another") == []
        assert sorted(runner.end_all(tmp_path)) == sorted(pids)
        assert within(60, lambda pids=pids: not any(map(is_alive, pids)))


def within(seconds: float, found: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if found():
                return True
        time.sleep(0.05)
    return False


def test_a_process_that_dies_is_told(tmp_path: Path) -> None:
    found = runner.process([sys.executable, "-c", "raise SystemExit(5)"], environment(tmp_path), 120.0, tmp_path)
    assert found.cut == ""
    assert [(each["event"], each["status"]) for each in events.read(tmp_path / "events.jsonl")] == [("gone", 5)]


def test_a_line_that_was_cut_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "e").write_text('{"event": "a", "at": 1}\n{"event": "b", "a')
    assert [each["event"] for each in events.read(tmp_path / "e")] == ["a"]
    assert events.read(tmp_path / "none") == []


HARM = """
import json, os, sys
from servers import faults
where, rank = sys.argv[1:]
for step in range(1, 6):
    print("step", step, flush=True)
    faults.at_step(int(rank), where)
faults.at_start_up(int(rank))
print("sound", flush=True)
"""


def harmed(folder: Path, kind: str, where: str, rank: int, armed: bool = True, at: str = "") -> tuple[int, list[str]]:
    if armed:
        (folder / "armed").touch()
    asked = {"kind": kind, "where": at or where, "rank": 1, "step": 3, "seconds": 0.0, "folder": str(folder)}
    found = subprocess.Popen(
        [sys.executable, "-c", HARM, where, str(rank)],
        env={**environment(folder), faults.VARIABLE: json.dumps(asked)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    if kind == "stop" and rank == 1:
        end = time.monotonic() + 60
        while (
            time.monotonic() < end and Path(f"/proc/{found.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T"
        ):
            time.sleep(0.02)
        found.kill()
    said = found.communicate(timeout=120)[0].split("\n")
    return found.returncode, [line for line in said if line]


@pytest.mark.parametrize(("kind", "status"), [("kill", -9), ("stop", -9), ("raise", 1), ("delay", 0)])
def test_a_worker_is_harmed_at_its_step(tmp_path: Path, kind: str, status: int) -> None:
    returned, said = harmed(tmp_path, kind, "decode", 1)
    assert returned == status
    assert len([line for line in said if line.startswith("step")]) == (5 if kind == "delay" else 3)
    assert float((tmp_path / "harmed.1").read_text()) <= time.time()


@pytest.mark.parametrize(
    ("where", "rank", "armed", "at"),
    [("decode", 0, True, ""), ("decode", 1, False, ""), ("decode", 1, True, "prefill")],
)
def test_nobody_else_is_harmed(tmp_path: Path, where: str, rank: int, armed: bool, at: str) -> None:
    assert harmed(tmp_path, "kill", where, rank, armed, at) == (0, [*(f"step {n}" for n in range(1, 6)), "sound"])
    assert not list(tmp_path.glob("harmed.*"))


def test_a_worker_is_harmed_as_it_starts(tmp_path: Path) -> None:
    returned, said = harmed(tmp_path, "kill", "decode", 1, armed=False, at="start-up")
    assert (returned, len(said)) == (-9, 5)


def run(name: str, seconds: float, passed: bool = True) -> dict[str, Any]:
    return {
        "scenario": name,
        "installed": {"version": "1"},
        "passed": passed,
        "problems": [],
        "seconds": seconds,
        "when": 1.0,
    }


def test_none_begins_that_would_not_end_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = [replace(FAST, name=f"a/{n}/as_is", seconds=s) for n, s in enumerate((1.0, 1.0, 9999.0, 2.0))]
    kept: list[dict[str, Any]] = []
    limits: list[float] = []
    runs, not_run = runner.campaign(
        wanted, 600.0, lambda each, limit: (limits.append(limit), run(each.name, 0.0))[1], kept.append
    )
    assert [each["scenario"] for each in runs] == ["a/0/as_is", "a/1/as_is", "a/3/as_is"]
    assert kept == runs
    assert [each.name for each in not_run] == ["a/2/as_is"]
    assert all(590.0 < limit <= 600.0 - runner.SPARE for limit in limits)
    assert "some 1 s; " in capsys.readouterr().out


def test_nothing_is_compared_before_all_of_it_has_run() -> None:
    modes = [replace(FAST, name=f"a/{mode}", mode=mode, seconds=s) for mode, s in (("ours", 1.0), ("trtllm", 9999.0))]
    wanted = [*modes, replace(FAST, name="a/fp32", mode="fp32"), replace(FAST, name="b/fp32", mode="fp32")]
    runs, not_run = runner.campaign(wanted, 600.0, lambda each, _: run(each.name, 0.0), lambda _: None)
    assert [each["scenario"] for each in runs] == ["a/ours", "b/fp32"]
    assert [each.name for each in not_run] == ["a/trtllm", "a/fp32"]


def test_what_ran_before_says_how_long_it_takes() -> None:
    told = [{**run(FAST.name, seconds), "measured": [{}]} for seconds in (100.0, 80.0)]
    assert runner.expected(FAST, told) == pytest.approx(115.0)
    assert runner.expected(FAST, [{**told[0], "seconds": 299.0}]) == FAST.limit
    of_nothing = [{**run(FAST.name, 3.0), "measured": []}, {**told[0], "scenario": "another"}]
    assert runner.expected(FAST, of_nothing) == FAST.seconds, "what has not come to its first measurement says nothing"
    harmed = {**run(FAST.name, 60.0), "measured": [], "fault": {"harmed": True}}
    assert runner.expected(FAST, [harmed]) == pytest.approx(69.0)


def test_the_record_keeps_the_newest_of_each(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "servers_a.json"
    record.add(file, "2 x A", [run("b", 1.0), {**run("a", 1.0), "installed": {"version": "2"}}])
    record.add(file, "2 x A", [{**run("b", 7.0), "when": 2.0}, {**run("a", 3.0), "when": 0.5}])
    record.add(file, "2 x A", [{**run("b", 9.0), "when": 0.1}])
    told = json.loads(file.read_text())
    assert [(r["scenario"], r["installed"]["version"], r["seconds"]) for r in told["runs"]] == [
        ("a", "1", 3.0),
        ("a", "2", 1.0),
        ("b", "1", 7.0),
    ]
    with pytest.raises(ValueError, match=r"is of 2 x A, this is 2 x B"):
        record.add(file, "2 x B", [])


def test_records_of_several_calls_are_joined(tmp_path: Path) -> None:
    for number in range(2):
        record.add(tmp_path / f"{number}.json", "2 x A", [run(f"s{number}", 1.0)])
    target = tmp_path / "all.json"
    parts = [str(tmp_path / f"{number}.json") for number in range(2)]
    assert program.main(["--join", *parts, "--results", str(target)]) == 0
    assert [each["scenario"] for each in json.loads(target.read_text())["runs"]] == ["s0", "s1"]


def test_the_list_says_why_not(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "machine", lambda: ("no GPU", 0))
    assert program.main(["--list", "--only", "eagle"]) == 0
    assert "vllm/http-eagle-1/ours" in capsys.readouterr().out
    monkeypatch.setattr(program, "machine", lambda: ("2 x A", 2))
    assert program.main(["--only", "sglang/http"]) == 0
    assert "sglang/http/ours: skipped: sglang is not installed" in capsys.readouterr().out


VLLM = """
import os, pathlib, random, time
class SamplingParams:
    def __init__(self, **given): self.__dict__.update(given)
class Output:
    def __init__(self, tokens, logprobs): self.token_ids, self.logprobs, self.outputs = tokens, logprobs, [self]
class Entry:
    def __init__(self, logprob): self.logprob = logprob
def text(prompt, count):
    draw = random.Random(str(prompt))
    return [draw.randrange(3, 30000) for _ in range(count)]
class Engine:
    def __init__(self): self.asked, self.done = {}, 0
    def add_request(self, name, prompt, params): self.asked[name] = (prompt["prompt_token_ids"], params.max_tokens)
    def has_unfinished_requests(self): return bool(self.asked)
    def step(self):
        self.done += 1
        folder = pathlib.Path(os.environ["SERVERS_SCENARIO"])
        if (folder / "armed").exists() and self.done == 5:
            (folder / "harmed.1").write_text(repr(time.time()))
            print("Worker proc VllmWorker-1 died unexpectedly (exit code: -9), shutting down executor.", flush=True)
            raise RuntimeError("EngineCore encountered an issue")
        found = []
        for name, (prompt, count) in list(self.asked.items()):
            tokens = text(prompt, count)[: self.done]
            if os.environ.get("STAND_IN_LIES") and (folder / "armed").exists(): tokens[-1] += 1
            out = Output(tokens, None); out.request_id = name; found.append(out)
            if len(tokens) == count: del self.asked[name]
        if not self.asked: self.done = 0
        return found
class LLM:
    def __init__(self, **given): self.llm_engine = Engine()
    def generate(self, prompts, params, use_tqdm=True):
        return [Output(t := text(p["prompt_token_ids"], s.max_tokens),
                       [{x: Entry(-1.0), 2: Entry(-2.0)} for x in t] if s.logprobs else None)
                for p, s in zip(prompts, params)]
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Something that calls itself vLLM, and the models as if they had been written."""
    site = tmp_path / "site"
    (site / "vllm").mkdir(parents=True)
    (site / "vllm" / "__init__.py").write_text(VLLM)
    (site / "vllm-9.dist-info").mkdir()
    (site / "vllm-9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 9\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    for scenario in scenarios():
        folder = tmp_path / "work" / "models" / scenario.model.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
    return tmp_path


def test_a_scenario_from_end_to_end(stand_in: Path) -> None:
    scenario = next(each for each in scenarios() if each.name == "vllm/llama-32/as_is")
    told = runner.run(scenario, stand_in / "work", stand_in / "out")
    assert told["problems"] == []
    assert told["installed"]["version"] == "9"
    assert [each["kind"] for each in told["measured"]] == ["answers", "steps"]
    assert told["measured"][1]["batches"].keys() == {"1", "8", "64"}
    assert (stand_in / "work" / "outputs" / "vllm-9" / "vllm.llama-32.as_is.json.gz").exists()


def test_a_scenario_is_ended_when_all_time_is_over(stand_in: Path) -> None:
    scenario = next(each for each in scenarios() if each.name == "vllm/llama-32/as_is")
    told = runner.run(scenario, stand_in / "work", stand_in / "out", limit=0.0)
    assert "ended by its limit of 0 s" in told["problems"][0]


def test_ours_is_not_started_where_flashinfers_own_mnnvl_would_run(stand_in: Path) -> None:
    scenario = next(each for each in scenarios() if each.name == "vllm/llama-32/ours")
    told = runner.run(scenario, stand_in / "work", stand_in / "out")
    log = (stand_in / "out" / "vllm.llama-32.ours" / "log").read_text()
    assert "the server is not started: FlashInfer's own mnnvl could run" in log
    assert "measured nothing of answers" in told["problems"][0]


@pytest.mark.parametrize("lies", ["", "1"])
def test_a_fault_from_end_to_end(stand_in: Path, monkeypatch: pytest.MonkeyPatch, lies: str) -> None:
    monkeypatch.setenv("STAND_IN_LIES", lies)
    scenario = next(each for each in scenarios() if each.name == "vllm/kill-in-decode/as_is")
    told = runner.run(scenario, stand_in / "work", stand_in / "out")
    assert told["fault"]["named_by_server"] == [1]
    assert told["fault"]["dead_after_s"] < 60
    assert told["fault"]["tokens_returned"] == 4
    assert len(told["problems"]) == (1 if lies else 0)
