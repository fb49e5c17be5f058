"""The traffic of a server: forward passes of 32 layers, with the token counts that vLLM and SGLang capture graphs for.

All ranks draw the same passes from the same seed. A pass is one all-reduce after the embedding, then two calls a layer,
one after attention and one after the MLP.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

LAYERS = 32
CALLS = 1 + 2 * LAYERS  # of a pass
MODELS = {2880: "gpt-oss-120b", 4096: "Qwen3.5-397B-A17B", 7168: "DeepSeek-V3/V4", 8192: "Llama-70B"}
VLLM = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
SGLANG = (1, 2, 4, 8, 12, *range(16, 257, 8), *range(272, 497, 16), 512)
CAPTURED = tuple(sorted({*VLLM, *SGLANG}))
BUCKETS = ((1, 1), (2, 4), (8, 16), (17, 64), (65, 256), (257, 512))  # rows of the table
SETS = 4  # of inputs, taken in turn; no multiple of the ring's three slots, so that what a slot held before never fits


class Form(Enum):
    """An op, and where its outputs go: made by the op, handed to it, or its inputs themselves."""

    FUSED = "fused"
    FUSED_IN_PLACE = "fused, in place"  # norm_out is x, residual_out is residual, as vLLM's compiled pieces have it
    PLAIN = "plain"
    PLAIN_OUT = "plain, into another tensor"
    PLAIN_IN_PLACE = "plain, in place"

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("norm", "residual_out") if self in (Form.FUSED, Form.FUSED_IN_PLACE) else ("all_reduce",)

    @property
    def in_place(self) -> bool:
        return self in (Form.FUSED_IN_PLACE, Form.PLAIN_IN_PLACE)


EMBEDDING = Form.PLAIN_OUT
_FUSED = (Form.FUSED, Form.FUSED_IN_PLACE)
_PLAIN = (Form.PLAIN, Form.PLAIN_IN_PLACE)
PIECES = (_FUSED, _FUSED, _PLAIN)  # a layer's two calls, by turns: servers do not fuse where another op comes between


@dataclass(frozen=True)
class Pass:
    """One forward pass: every call is [tokens, hidden]."""

    hidden: int
    tokens: int
    captured: bool  # replay graphs, on GPUs; else call eagerly


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
            yield Pass(hidden, tokens, captured)


def bucket_of(tokens: int) -> tuple[int, int]:
    return next((low, high) for low, high in BUCKETS if low <= tokens <= high or tokens < low)
