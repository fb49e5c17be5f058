"""The tables of servers, on made-up records."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import synthetic

from bench import report, servers

COUNTED = {"calls": 123456, "normed": 9, "workspace_bytes": 67158016, "workers": 2}
STEPS = {"1": {"median_ms": 3.0}, "8": {"median_ms": 3.5}, "64": {"median_ms": 8.25, "quartiles_ms": [8.2, 8.316]}}


def run(scenario: str, measured: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    server, mode = scenario.split("/")[0], scenario.rsplit("/", 1)[1]
    return {
        "scenario": scenario, "server": "" if mode == "fp32" else server, "model": "llama-32x4096", "mode": mode,
        "installed": {} if mode == "fp32" else {"version": "0.26.0"}, "source_digest": "today", "when": 1.0,
        "passed": True, "problems": [], "start_up_s": 131.4, "measured": measured, **more,
    }  # fmt: skip


def record() -> dict[str, Any]:
    answers = {"kind": "answers", "answered": 48}
    agreement = {"equal_tokens": 0.875, "same_answers": 30, "answers": 48}
    reference = {
        "kind": "reference",
        "to_fp32": {m: {"logprob_apart_mean": 0.0123, "first_choice": 0.99} for m in ("ours", "as_is")},
        "ours_and_as_is": agreement,
    }
    traffic = {
        "kind": "traffic",
        "requests": 512,
        "concurrency": 128,
        "http": True,
        "answered": 512,
        "counted": COUNTED,
    }
    fault = {
        "kind": "stop", "where": "decode", "rank": 1, "harmed": True, "named_by_ours": [1], "named_after_s": 8.21,
        "named_by_server": [], "dead_after_s": 17.04, "cut": "",
    }  # fmt: skip
    without = {**fault, "named_by_ours": [], "named_after_s": None, "dead_after_s": None, "cut": "not within 75 s"}
    runs = [
        run("vllm/llama-32/ours", [{**answers, "counted": COUNTED}, {"kind": "steps", "batches": STEPS}]),
        run("vllm/llama-32/as_is", [answers, {"kind": "steps", "batches": {**STEPS, "1": {"median_ms": 3.2}}}]),
        run("vllm/llama-32/fp32", [reference]),
        run("vllm/http-eagle-1/ours", [traffic]),
        run("vllm/stop-in-decode/ours", [], fault=fault),
        run("vllm/stop-in-decode/as_is", [], fault=without),
    ]
    return {"machine": "2 x NVIDIA H200", "runs": runs}


def test_the_tables() -> None:
    lines = servers.section({"servers_h200x2": record()}, "today").split("\n")
    assert lines[0] == ("2 x NVIDIA H200, unmodified servers, TP2: 6 scenarios ([servers.md](servers.md)).")
    for line in (
        "| vllm 0.26.0, llama-32x4096 | ours | 3.000, -6.2 % | 3.500, +0.0 % | 8.250 (8.20 to 8.32), +0.0 % "
        "| - | 0.0123 | 131 s | 64 MiB |",
        "| vllm 0.26.0, llama-32x4096 | as is | 3.200 | 3.500 | 8.250 (8.20 to 8.32) | 87.5 % | 0.0123 | 131 s | - |",
        "| vllm 0.26.0 | vllm/http-eagle-1/ours | 512 at 128, HTTP | 512 | 123456 |",
        "| vllm 0.26.0 | rank 1: stop, in decode | ours | rank 1 by ours, 8.2 s | 17.0 s |",
        "| vllm 0.26.0 | rank 1: stop, in decode | as is | nobody | not within 75 s |",
    ):
        assert line in lines
    assert len([line for line in lines if line.startswith("|---")]) == 3


def test_releases_are_not_compared_with_each_other() -> None:
    told = record()
    later = {"version": "0.33.0"}
    told["runs"] = [*told["runs"][:3], {**told["runs"][0], "installed": later}]
    told["runs"][2]["installed"] = {"version": "0.26.0"}
    rows = servers.section({"s": told}, "today").split("\n")[4:]
    assert rows[0].startswith("| vllm 0.26.0, llama-32x4096 | ours | 3.000, -6.2 % |")
    assert rows[2].startswith("| vllm 0.33.0, llama-32x4096 | ours | 3.000 | 3.500 | 8.250 (8.20 to 8.32) | - | - |")


def test_sleep_is_told() -> None:
    told = record()
    slept = {"kind": "sleep", "same_bits": True, "awake_after_s": 1.25}
    told["runs"] = [run("vllm/sleep/ours", [slept]), run("vllm/sleep/as_is", [{**slept, "same_bits": False}])]
    section = servers.section({"s": told}, "today")
    assert "vllm 0.26.0, vllm/sleep/ours: the same bits after sleep, awake in 1.2 s." in section
    assert "vllm/sleep/as_is: other bits after sleep" in section


def test_what_failed_and_what_is_old_is_said() -> None:
    told = record()
    told["runs"][3] = {**told["runs"][3], "passed": False, "source_digest": "before"}
    section = servers.section({"servers_h200x2": told}, "today")
    assert "vllm/http-eagle-1/ours **FAILED**" in section
    assert "1 **of earlier sources**" in section
    before = servers.section({"servers_h200x2": record()}, "today")
    assert "FAILED" not in before
    assert "earlier" not in before


def test_half_a_record_is_a_table() -> None:
    told = copy.deepcopy(record())
    told["runs"] = told["runs"][:1]
    told["runs"][0]["measured"] = told["runs"][0]["measured"][:1]
    assert "| ours | - | - | - | - | - | 131 s | 64 MiB |" in servers.section({"s": told}, "today")
    assert servers.section({"s": {"machine": "a", "runs": []}}, "today") == ""
    assert servers.section({}, "today") == ""


def test_the_page_has_it_once_there_are_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "draw", lambda runs, folder: [])
    results, page = tmp_path / "results", tmp_path / "page.md"
    synthetic.write(results / "h200x8.json", "8 x NVIDIA H200", synthetic.rows((2, 8)))
    empty = f"above\n{report.BEGIN}\n{report.END}\n" + "\n".join(report.SERVERS) + "\nbelow\n"
    page.write_text(empty)
    arguments = ["--results", str(results), "--page", str(page)]
    assert report.main(arguments) == 0
    assert page.read_text().endswith("\n".join(report.SERVERS) + "\nbelow\n")
    (results / "servers_h200x2.json").write_text(json.dumps(record()))
    assert report.main(arguments) == 0
    text = page.read_text()
    assert "| vllm 0.26.0 | rank 1: stop, in decode | ours |" in text.split(report.SERVERS[0])[1]
    assert text.count("8 x NVIDIA H200, hidden") == 1
    assert report.main(arguments) == 0
    assert page.read_text() == text


def test_the_page_of_this_repository_has_the_place() -> None:
    text = (report.results.ROOT / "docs" / "benchmarks.md").read_text()
    assert all(text.count(mark) == 1 for mark in report.SERVERS)
