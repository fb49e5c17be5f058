"""The scenarios, in the order in which they are worth their time: one server start each, and what is measured on it.

`seconds` is what a scenario is expected to take on two H200s with cold caches, `limit` when it is ended. Models have 32
layers only where milliseconds a step are the point.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from servers.models.architectures import MODELS, Model
from servers.modes import MODES, OURS

LIMIT = 300.0
PATIENCE = 75.0  # seconds after a fault in which the engine may find out


@dataclass(frozen=True)
class Measure:
    """What to measure: a function of `measures`, and its arguments."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scenario:
    """server: "vllm", "sglang" or "" for the comparison with fp32. extra: arguments of the server beside the usual.
    drafter: a model whose folder is the speculative one. http: the server runs as its users start it. environment:
    beside its mode's."""

    name: str
    server: str
    model: Model
    mode: str
    measures: tuple[Measure, ...]
    seconds: float = 150.0
    limit: float = LIMIT
    extra: dict[str, Any] = field(default_factory=dict)
    drafter: Model | None = None
    http: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def subject(self) -> str:
        """What is compared across modes: the name without the mode."""
        return self.name.rsplit("/", 1)[0]

    @property
    def is_ours(self) -> bool:
        return self.mode in OURS

    @property
    def calls_a_layer(self) -> int:
        """Of ours, in a step. SGLang fuses one of the two all-reduces of a dense Qwen3's layer, and does the other."""
        return 1 if (self.server, self.model.architecture, self.mode) == ("sglang", "qwen3", "ours") else 2

    @property
    def is_batch_invariant(self) -> bool:
        return self.environment.get("VLLM_BATCH_INVARIANT") == "1"

    @property
    def is_fault(self) -> bool:
        return any(each.kind == "fault" for each in self.measures)


ANSWERS = Measure("answers", {"count": 48, "shortest": 16, "longest": 200, "tokens": 96, "top": 5})
STEPS = Measure("steps", {"batches": [1, 8, 64], "tokens": 128, "repeats": 8})
COMPOSITIONS = Measure("compositions", {"count": 16, "length": 64, "tokens": 48})
SLEEP = Measure("sleep", {"count": 8})
LLAMA_32 = replace(MODELS["llama"], layers=32)
FEW_SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
JIT = 100.0  # seconds that FlashInfer compiles its trtllm, once a machine


def traffic(requests: int, concurrency: int, repeated: bool = False) -> Measure:
    return Measure("traffic", {"requests": requests, "concurrency": concurrency, "repeated": repeated})


def scenarios() -> list[Scenario]:
    return [
        *_vllm_speed(),
        *_vllm_traffic(),
        *_vllm_faults(),
        *_sglang(),
        *_vllm_models(),
        *_pdl_modes(),
        *_through_ops(),
    ]


def _three_modes(
    subject: str, server: str, model: Model, measures: tuple[Measure, ...], seconds: float = 150.0
) -> Iterator[Scenario]:
    """And their distance to the same model in fp32. Bits across compositions are ours to keep, so ours alone."""
    for mode in MODES:
        mine = (*measures, COMPOSITIONS) if mode == "ours" else measures
        jit = JIT if mode == "trtllm" else 0.0
        yield Scenario(f"{subject}/{mode}", server, model, mode, mine, seconds + jit, LIMIT + jit)
    yield Scenario(f"{subject}/fp32", "", model, "fp32", (Measure("reference"),), seconds=60.0)


def _vllm_speed() -> Iterator[Scenario]:
    yield from _three_modes("vllm/llama-32", "vllm", LLAMA_32, (ANSWERS, STEPS), seconds=190.0)


def _speculation(method: str, tokens: int) -> dict[str, Any]:
    lookup = {"prompt_lookup_min": 1, "prompt_lookup_max": 3} if method == "ngram" else {}
    return {"speculative_config": {"method": method, "num_speculative_tokens": tokens, **lookup}}


def _vllm_traffic() -> Iterator[Scenario]:
    """The reports' traffic. With one drafted token a step has requests of 1 and of 2 tokens, mixed."""
    llama = MODELS["llama"]
    for name, method, tokens, measures in (
        ("ngram-1", "ngram", 1, (traffic(512, 128, repeated=True), traffic(256, 64))),
        ("eagle-1", "eagle", 1, (traffic(512, 128), traffic(256, 64))),
        ("ngram-3", "ngram", 3, (traffic(2048, 128, repeated=True),)),
    ):
        yield Scenario(
            f"vllm/http-{name}/ours",
            *("vllm", llama, "ours", measures),
            extra={"max_num_seqs": 128, **_speculation(method, tokens)},
            drafter=MODELS["eagle"] if method == "eagle" else None,
            http=True,
        )
    offline = (traffic(512, 128), traffic(2048, 128), traffic(256, 64))
    yield Scenario("vllm/offline/ours", "vllm", llama, "ours", offline, extra={"max_num_seqs": 128})


def _faults(
    server: str, model: Model, kinds: tuple[str, ...], modes: tuple[str, ...], where: str
) -> Iterator[Scenario]:
    for mode in modes:
        for kind in kinds:
            fault = Measure("fault", {"kind": kind, "where": where, "rank": 1})
            seconds = 110.0 + (20.0 if mode == "ours" else PATIENCE)
            yield Scenario(f"{server}/{kind}-in-{where}/{mode}", server, model, mode, (fault,), seconds=seconds)


def _vllm_faults() -> Iterator[Scenario]:
    llama = MODELS["llama"]
    kinds = ("stop", "kill", "raise", "delay")
    yield from _faults("vllm", llama, kinds, ("ours",), "decode")
    yield from _faults("vllm", llama, kinds, ("ours",), "prefill")
    yield from _faults("vllm", llama, ("stop", "kill", "raise"), ("ours",), "start-up")
    yield from _faults("vllm", llama, kinds, ("as_is",), "decode")


def _sglang() -> Iterator[Scenario]:
    qwen, oss, moe = MODELS["qwen3"], MODELS["gpt_oss"], MODELS["qwen3_moe"]
    yield from _three_modes("sglang/qwen3-32", "sglang", replace(qwen, layers=32), (ANSWERS, STEPS), seconds=220.0)
    yield from _three_modes("sglang/gpt-oss", "sglang", oss, (ANSWERS, STEPS, traffic(256, 64)), seconds=170.0)
    yield from _faults("sglang", qwen, ("stop", "kill"), ("ours",), "decode")
    yield from _faults("sglang", qwen, ("stop", "kill"), ("as_is",), "decode")
    yield Scenario("sglang/http/ours", "sglang", qwen, "ours", (traffic(512, 128), traffic(2048, 128)), http=True)
    yield from _three_modes("sglang/qwen3-moe", "sglang", moe, (ANSWERS, STEPS), seconds=170.0)


def _vllm_models() -> Iterator[Scenario]:
    for name, measures in (
        ("gpt_oss", (ANSWERS, STEPS, traffic(256, 64))),
        ("qwen3_moe", (ANSWERS, STEPS)),
        ("gemma", (ANSWERS, STEPS)),
        ("llama_fp8", (ANSWERS, STEPS)),
    ):
        yield from _three_modes(f"vllm/{name.replace('_', '-')}", "vllm", MODELS[name], measures)
    yield Scenario("vllm/sleep/ours", "vllm", MODELS["llama"], "ours", (SLEEP,), extra={"enable_sleep_mode": True})


def _pdl_modes() -> Iterator[Scenario]:
    """What `MNNVL_AR_PDL` changes in a server: its GEMMs may be others than those that "auto" was measured between."""
    for mode in ("early", "late", "off"):
        name, environment = f"vllm/pdl-{mode}/ours", {"MNNVL_AR_PDL": mode}
        yield Scenario(name, "vllm", LLAMA_32, "ours", (STEPS,), environment=environment)


def _through_ops() -> Iterator[Scenario]:
    """`torch.ops` in compiled graphs and layers, FlashInfer's all-reduce off; compared with the server as it is. Where
    vLLM is to be batch-invariant, a prompt alone gives the bits that it gives among others."""
    for server, model, subject in (("vllm", MODELS["llama"], "vllm/ops"), ("sglang", MODELS["qwen3"], "sglang/ops")):
        for mode in ("ops", "as_is"):
            mine = (ANSWERS, STEPS, COMPOSITIONS) if mode == "ops" else (ANSWERS, STEPS)
            yield Scenario(f"{subject}/{mode}", server, model, mode, mine, seconds=170.0)
        yield Scenario(f"{subject}/fp32", "", model, "fp32", (Measure("reference"),), seconds=60.0)
    invariant = {"VLLM_BATCH_INVARIANT": "1", "VLLM_USE_BREAKABLE_CUDAGRAPH": "0"}
    yield Scenario("vllm/invariant/ops", "vllm", MODELS["llama"], "ops", (COMPOSITIONS,), environment=invariant)
