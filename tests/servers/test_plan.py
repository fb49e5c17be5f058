"""The scenarios, and that their servers know every argument: against the text of their wheels."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from compat.wheels import text_of
from servers import faults, measures, modes, plan, scenario, sglang_server, vllm_server
from servers.command_line import flags
from servers.plan import scenarios

VLLM, SGLANG = ("0.20.2", "0.26.0", "0.33.0"), ("0.5.16", "0.5.17")
COMMUNICATORS = "distributed/device_communicators"
ALL = scenarios()


def test_names_measures_and_order() -> None:
    names = [each.name for each in ALL]
    assert len(set(names)) == len(names)
    for each in ALL:
        assert each.name.endswith(f"/{each.mode}")
        assert 0 < each.seconds <= each.limit < 600
        for measure in each.measures:
            if measure.kind != "reference":
                inspect.signature(measures.KINDS[measure.kind]).bind(None, **measure.options)
        if each.mode == "fp32":
            before = [other.name for other in ALL[: names.index(each.name)]]
            compared = ("ops", "as_is") if f"{each.subject}/ops" in names else modes.MODES
            assert {f"{each.subject}/{mode}" for mode in compared} <= set(before)


def test_all_that_the_issue_asks_for_is_there() -> None:
    kinds = {(each.server, each.model.architecture) for each in ALL if each.mode == "ours"}
    assert {("vllm", name) for name in ("llama", "gpt_oss", "gemma", "qwen3_moe", "llama_fp8")} <= kinds
    assert {("sglang", name) for name in ("qwen3", "qwen3_moe", "gpt_oss")} <= kinds
    sizes = {
        (each.http, m.options["requests"], m.options["concurrency"])
        for each in ALL
        for m in each.measures
        if m.kind == "traffic"
    }
    assert {(http, *size) for http in (True, False) for size in ((512, 128), (2048, 128), (256, 64))} <= sizes
    done = {
        (m.options["kind"], m.options["where"], each.mode) for each in ALL for m in each.measures if m.kind == "fault"
    }
    assert {(kind, "decode", mode) for kind in faults.KINDS for mode in ("ours", "as_is")} <= done
    assert {("stop", where, "ours") for where in ("decode", "prefill", "start-up")} <= done


@pytest.mark.parametrize("server", modes.SERVERS)
def test_flashinfers_own_mnnvl_is_named_in_ours_alone(server: str) -> None:
    for mode in (*modes.MODES, "ops"):
        told = {**modes.environment(server, mode, Path("calls")), **modes.arguments(server, mode)}
        assert ("mnnvl" in map(str, told.values())) == (mode == "ours")
        assert told["NCCL_NVLS_ENABLE"] == "0"
        assert "auto" not in map(str, told.values())


def fields(text: str, name: str) -> set[str]:
    """The annotated names in the body of a class."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return {e.target.id for e in node.body if isinstance(e, ast.AnnAssign) and isinstance(e.target, ast.Name)}
    raise LookupError(name)


def parameters(text: str, owner: str, name: str) -> list[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef) and node.name == owner:
            for each in node.body:
                if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef) and each.name == name:
                    return [argument.arg for argument in (*each.args.args, *each.args.kwonlyargs)]
    raise LookupError(f"{owner}.{name}")


def unknown(given: dict[str, Any], known: set[str]) -> set[str]:
    return given.keys() - known


def keywords(server: str) -> list[dict[str, Any]]:
    return [scenario.keywords(each, Path("models")) for each in ALL if each.server == server]


def test_a_wrong_keyword_is_found() -> None:
    text = "class A:\n    tp_size: int = 1\n    def f(self): ...\n"
    assert unknown({"tp_size": 1, "tp": 2}, fields(text, "A")) == {"tp"}
    with pytest.raises(LookupError):
        parameters(text, "A", "g")


@pytest.mark.parametrize("version", VLLM)
def test_vllm_knows_every_keyword(version: str) -> None:
    engine = fields(text_of("vllm", version, "vllm/engine/arg_utils.py"), "EngineArgs")
    compilation = text_of("vllm", version, "vllm/config/compilation.py")
    speculative = fields(text_of("vllm", version, "vllm/config/speculative.py"), "SpeculativeConfig")
    for given in keywords("vllm"):
        assert unknown(given, engine) == set()
        assert unknown(given["compilation_config"], fields(compilation, "CompilationConfig")) == set()
        assert unknown(given["compilation_config"]["pass_config"], fields(compilation, "PassConfig")) == set()
        assert unknown(given.get("speculative_config", {}), speculative) == set()
        for each in flags(given, negated=True):
            name = each.removeprefix("--").removeprefix("no-").replace("-", "_")
            assert not each.startswith("--") or name in engine
    assert "FULL_AND_PIECEWISE" in compilation
    assert "tokens_only" in engine
    sampling = fields(text_of("vllm", version, "vllm/sampling_params.py"), "SamplingParams")
    assert unknown({**vllm_server.sampling_arguments(1), "logprobs": 5}, sampling) == set()


@pytest.mark.parametrize("version", VLLM)
def test_vllm_is_called_as_it_is(version: str) -> None:
    folder = "serve/disagg" if version == "0.20.2" else "scale_out/token_in_token_out"
    protocol = text_of("vllm", version, f"vllm/entrypoints/{folder}/protocol.py")
    assert unknown(vllm_server.request([5], 3), fields(protocol, "GenerateRequest")) == set()
    assert "token_ids" in fields(protocol, "GenerateChoiceBase" if version == "0.33.0" else "GenerateResponseChoice")
    assert f'"{vllm_server.GENERATE}"' in text_of("vllm", version, f"vllm/entrypoints/{folder}/api_router.py")
    engine = text_of("vllm", version, "vllm/v1/engine/llm_engine.py")
    assert parameters(engine, "LLMEngine", "add_request")[1:4] == ["request_id", "prompt", "params"]
    assert parameters(engine, "LLMEngine", "step")
    llm = text_of("vllm", version, "vllm/entrypoints/llm.py")
    assert parameters(llm, "LLM", "sleep")[1] == "level"
    assert "use_tqdm" in parameters(llm, "LLM", "generate")
    assert parameters(llm, "LLM", "wake_up")
    worker = text_of("vllm", version, "vllm/v1/worker/worker_base.py")
    assert parameters(worker, "WorkerWrapperBase", "execute_model") == ["self", "scheduler_output"]
    assert parameters(worker, "WorkerWrapperBase", "__getattr__")  # compile_or_warm_up_model goes through it
    assert "self.global_rank" in worker
    assert "load_general_plugins()" in worker
    environment = text_of("vllm", version, "vllm/envs.py")
    for name in (*modes.environment("vllm", "ours", Path("calls")), *modes.environment("vllm", "ops", Path("calls"))):
        assert not name.startswith("VLLM_") or f'"{name}"' in environment
    executor = text_of("vllm", version, "vllm/v1/executor/multiproc_executor.py")
    assert "Worker proc %s died unexpectedly" in executor
    assert "VllmWorker-" in executor


@pytest.mark.parametrize("version", SGLANG)
def test_sglang_knows_every_keyword(version: str) -> None:
    known = fields(text_of("sglang", version, "sglang/srt/server_args.py"), "ServerArgs")
    for given in keywords("sglang"):
        assert unknown(given, known) == set()
    engine = text_of("sglang", version, "sglang/srt/entrypoints/engine.py")
    assert {"input_ids", "sampling_params", "return_logprob", "top_logprobs_num", "stream"} <= set(
        parameters(engine, "Engine", "generate")
    )
    sampling = text_of("sglang", version, "sglang/srt/sampling/sampling_params.py")
    assert unknown(sglang_server.sampling_arguments(1), fields(sampling, "SamplingParams")) == set()


def joined(text: str) -> str:
    """Pieces of one text in several lines, as one."""
    return re.sub(r'"\s*f?"', "", text)


@pytest.mark.parametrize(
    ("server", "version", "files"),
    [
        *(
            (
                "vllm",
                version,
                ("compilation/passes/fusion/allreduce_rms_fusion", f"{COMMUNICATORS}/flashinfer_all_reduce"),
            )
            for version in VLLM
        ),
        *(("sglang", version, ("srt/layers/flashinfer_comm_fusion",)) for version in SGLANG),
    ],
)
def test_a_server_says_that_it_fuses_or_that_it_gives_up(server: str, version: str, files: tuple[str, ...]) -> None:
    text = joined("".join(text_of(server, version, f"{server}/{file}.py") for file in files))
    for words in (modes.FUSES[server].removesuffix("trtllm"), *modes.GIVES_UP[server]):
        assert words in text


@pytest.mark.parametrize("version", SGLANG)
def test_sglang_is_called_as_it_is(version: str) -> None:
    scheduler = text_of("sglang", version, "sglang/srt/managers/scheduler.py")
    assert parameters(scheduler, "Scheduler", "run_batch")[:2] == ["self", "batch"]
    assert "self.ps.tp_rank" in scheduler
    assert "load_plugins()" in scheduler
    runner = text_of("sglang", version, "sglang/srt/model_executor/model_runner.py")
    assert parameters(runner, "ModelRunner", "init_cuda_graphs")[0] == "self"
    assert "self.ps.tp_rank" in runner
    http = text_of("sglang", version, "sglang/srt/entrypoints/http_server.py")
    assert f'"{sglang_server.GENERATE}"' in http
    assert '"/health"' in http
    tokens = text_of("sglang", version, "sglang/srt/managers/tokenizer_manager.py")
    for name in ('"index"', '"output_ids"', "output_top_logprobs", "output_token_logprobs"):
        assert name in tokens


def test_the_metadata_of_the_faults_is_found(tmp_path: Path) -> None:
    from importlib import metadata

    faults.install(tmp_path)
    found = metadata.Distribution.discover(path=[str(tmp_path)])
    entries = [entry for each in found for entry in each.entry_points]
    assert {entry.group for entry in entries} == {"vllm.general_plugins", "sglang.srt.plugins"}
    assert {entry.load() for entry in entries} == {faults.vllm, faults.sglang}


def test_command_lines() -> None:
    given = {"a_b": 3, "on": True, "off": False, "of": [1, 2], "json": {"x": True}}
    both = ["--a-b", "3", "--on", "--no-off", "--of", "1", "2", "--json", '{"x": true}']
    assert flags(given, negated=True) == both
    assert "--no-off" not in flags(given, negated=False)
    assert plan.scenarios() == ALL
