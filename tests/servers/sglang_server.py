"""SGLang, in the words of `scenario`: `sgl.Engine` in this process, or its HTTP server in one of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from servers.answers import Answer
from servers.prompts import Prompt

USUAL = {
    "skip_tokenizer_init": True,
    "tp_size": 2,
    "context_length": 4096,
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "mem_fraction_static": 0.5,
    "disable_radix_cache": True,
    "max_running_requests": 128,
    "cuda_graph_max_bs_decode": 128,
    "chunked_prefill_size": 2048,  # more are neither fused nor captured
    "dtype": "bfloat16",
    "random_seed": 0,
    "log_level": "info",
}
GENERATE = "/generate"


def version() -> str:
    return metadata.version("sglang")


class Offline:
    """`sgl.Engine`, whose schedulers are processes of their own. A fault in one ends this process, too."""

    def __init__(self, folder: Path, arguments: dict[str, Any]) -> None:
        import sglang

        self._engine = sglang.Engine(model_path=str(folder), **arguments)

    def generate(self, prompts: Sequence[Prompt], tokens: int | Sequence[int], top: int = 0) -> list[Answer]:
        asked = [tokens] * len(prompts) if isinstance(tokens, int) else list(tokens)
        found = self._engine.generate(
            input_ids=[list(prompt) for prompt in prompts],
            sampling_params=[sampling_arguments(each) for each in asked],
            return_logprob=bool(top),
            top_logprobs_num=top,
        )
        return [_answer(each) for each in found]

    def stream(self, prompts: Sequence[Prompt], tokens: int) -> Iterator[tuple[int, list[int]]]:
        """As vLLM's."""
        asked = {"input_ids": [list(prompt) for prompt in prompts], "sampling_params": sampling_arguments(tokens)}
        for each in self._engine.generate(**asked, stream=True):
            yield int(each["index"]), list(each["output_ids"])

    def sleep(self) -> None:
        self._engine.release_memory_occupation()

    def wake(self) -> None:
        self._engine.resume_memory_occupation()


def sampling_arguments(tokens: int) -> dict[str, Any]:
    return {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}


def _answer(output: dict[str, Any]) -> Answer:
    meta = output["meta_info"]
    tops = [{int(token): float(value) for value, token, *_ in each} for each in meta.get("output_top_logprobs") or []]
    for top, (value, token, *_) in zip(tops, meta.get("output_token_logprobs") or [], strict=False):
        top[int(token)] = float(value)
    return Answer(list(output["output_ids"]), tops)


def command(folder: Path, arguments: dict[str, Any], port: int) -> list[str]:
    from servers.command_line import flags

    program = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(folder)]
    return [*program, *flags(arguments, negated=False), "--port", str(port), "--host", "127.0.0.1"]


def request(prompt: Prompt, tokens: int) -> dict[str, Any]:
    return {"input_ids": prompt, "sampling_params": sampling_arguments(tokens), "stream": True}


def tokens_of(body: dict[str, Any]) -> list[int]:
    return list(body["output_ids"])
