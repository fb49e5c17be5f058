"""vLLM, in the words of `scenario`: `LLM` in this process, or its API server in one of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from servers.answers import Answer, Logprobs
from servers.prompts import Prompt

# Of both; what is named here is held to the wheels (test_wheels_of_servers).
USUAL = {
    "skip_tokenizer_init": True,
    "tensor_parallel_size": 2,
    "max_model_len": 4096,
    "max_num_seqs": 64,
    "gpu_memory_utilization": 0.5,
    "enable_prefix_caching": False,
    "dtype": "bfloat16",
    "max_logprobs": 8,
    "seed": 0,
}
GENERATE = "/inference/v1/generate"


def version() -> str:
    return metadata.version("vllm")


class Offline:
    """`LLM`, whose engine and workers are processes of their own."""

    def __init__(self, folder: Path, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        self._llm = LLM(model=str(folder), **arguments)

    def generate(self, prompts: Sequence[Prompt], tokens: int | Sequence[int], top: int = 0) -> list[Answer]:
        asked = [tokens] * len(prompts) if isinstance(tokens, int) else list(tokens)
        texts = [{"prompt_token_ids": prompt} for prompt in prompts]
        found = self._llm.generate(texts, [sampling(each, top) for each in asked], use_tqdm=False)
        return [_answer(each.outputs[0]) for each in found]

    def stream(self, prompts: Sequence[Prompt], tokens: int) -> Iterator[tuple[int, list[int]]]:
        """Number of the prompt, and all tokens that it has so far, whenever there are more."""
        engine = self._llm.llm_engine
        for number, prompt in enumerate(prompts):
            engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling(tokens, 0))
        while engine.has_unfinished_requests():
            for each in engine.step():
                yield int(each.request_id.split("-")[0]), list(each.outputs[0].token_ids)

    def sleep(self) -> None:
        self._llm.sleep(level=1)

    def wake(self) -> None:
        self._llm.wake_up()


def sampling(tokens: int, top: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**sampling_arguments(tokens), logprobs=top or None)


def sampling_arguments(tokens: int) -> dict[str, Any]:
    return {"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True, "detokenize": False}


def _answer(output: Any) -> Answer:
    tops: list[Logprobs] = []
    for each in output.logprobs or []:
        tops.append({int(token): float(entry.logprob) for token, entry in each.items()})
    return Answer(list(output.token_ids), tops)


def command(folder: Path, arguments: dict[str, Any], port: int) -> list[str]:
    from servers.command_line import flags

    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--tokens-only"]
    return [*program, *flags(arguments, negated=True), "--port", str(port), "--host", "127.0.0.1"]


def request(prompt: Prompt, tokens: int) -> dict[str, Any]:
    """Body for GENERATE. Not streamed, which 0.20 cannot."""
    return {"token_ids": prompt, "sampling_params": sampling_arguments(tokens), "stream": False}


def tokens_of(body: dict[str, Any]) -> list[int]:
    return list(body["choices"][0]["token_ids"] or [])
