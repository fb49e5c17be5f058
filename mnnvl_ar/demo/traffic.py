"""The traffic of a server: forward passes of 32 layers, with the token counts that vLLM and SGLang capture graphs for.

All ranks draw the same passes from the same seed. A pass is one all-reduce after the embedding, then two fused calls a
layer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

LAYERS = 32
CALLS = 1 + 2 * LAYERS  # of a pass
MODELS = {2880: "gpt-oss-120b", 4096: "Qwen3.5-397B-A17B", 7168: "DeepSeek-V3/V4", 8192: "Llama-70B"}
VLLM = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
SGLANG = (1, 2, 4, 8, 12, *range(16, 257, 8), *range(272, 497, 16), 512)
CAPTURED = tuple(sorted({*VLLM, *SGLANG}))
BUCKETS = ((1, 1), (2, 4), (8, 16), (17, 64), (65, 256), (257, 512))  # rows of the table
SETS = 4  # of inputs, taken in turn; no multiple of the ring's three slots, so that what a slot held before never fits


@dataclass(frozen=True)
class Pass:
    """One forward pass: every call is [tokens, hidden]."""

    hidden: int
    tokens: int
    captured: bool  # replay graphs, on GPUs; else call eagerly
    in_place: bool  # eager calls write over their inputs, as vLLM's compiled pieces do


def passes(seed: int, most_tokens: int) -> Iterator[Pass]:
    """Without end. Captured sizes, and now and then an eager one of any size in between; small ones more often, as in
    decode.
    """
    draw = random.Random(seed)
    sizes = [tokens for tokens in CAPTURED if tokens <= most_tokens]
    while True:
        order = [(hidden, tokens) for hidden in MODELS for tokens in sizes]
        order += [(hidden, tokens) for hidden in MODELS for tokens in sizes[:4]]
        draw.shuffle(order)
        for hidden, tokens in order:
            captured = draw.random() < 0.7
            if not captured and draw.random() < 0.5:
                tokens = draw.randint(1, most_tokens)
            yield Pass(hidden, tokens, captured, draw.random() < 0.5)


def bucket_of(tokens: int) -> tuple[int, int]:
    return next((low, high) for low, high in BUCKETS if low <= tokens <= high or tokens < low)
