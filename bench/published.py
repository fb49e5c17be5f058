"""What peers have published of such calls on Blackwell, for the page of predictions (bench/model.py).

All of it is from public threads, as their authors give it; nothing here was measured by us. Most were timed one call at
a time, with what that adds, and are no figures to beat: beside the prediction they say whether it is in a possible
range, and which of its inputs to doubt.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.expected import HIDDEN, HIGH, LIKELY, LOW, Case


@dataclass(frozen=True)
class Published:
    """`tokens` of `hidden`, bf16; where a source gives bytes, the tokens that are nearest."""

    what: str
    gpus: str
    ranks: int
    hidden: int
    tokens: int
    us: float
    source: str

    def predicted(self, case: Case = LIKELY) -> float:
        """By the quicker strategy."""
        shape = self.tokens, self.ranks, self.hidden
        return min(case.one_shot_us(*shape), case.two_shot_us(*shape))


_TOKENSPEED = "tokenspeed, pull request 860, 2026-07-31: median of 5 x 50 iterations"
_VLLM = "vLLM, pull request 53318, 2026-08-21, FlashInfer 0.6.15"
_MIB = 1 << 20


def _of_bytes(mib: float) -> int:
    return round(mib * _MIB / HIDDEN / 2)


PUBLISHED = (
    *(
        Published("fused, MNNVL", "GB200, two nodes", 8, HIDDEN, tokens, us, _TOKENSPEED)
        for tokens, us in ((1, 10.9), (64, 19.1), (256, 55.8), (1024, 196.5))
    ),
    Published("fused, one-shot", "GB200", 4, 8192, 128, 37.95, "TensorRT-LLM, pull request 14534, 2026-06-09: events"),
    Published("plain, FlashInfer", "GB300", 4, HIDDEN, _of_bytes(79.994), 209.3, _VLLM),
    Published("plain, FlashInfer", "GB300, two nodes", 8, HIDDEN, _of_bytes(63.998), 180.9, _VLLM),
    Published("plain, FlashInfer", "GB300, four nodes", 16, HIDDEN, _of_bytes(7.998), 36.9, _VLLM),
    Published("plain, NCCL", "GB200", 4, HIDDEN, 1, 5.18, "nccl-tests, issue 333, 2025-07-22: the best seen, 1 KiB"),
    Published("plain, NCCL symmetric", "B200", 8, HIDDEN, 1, 3.0, "NCCL, issue 1940, 2025-12-12: 8 bytes; on H200 2.3"),
)


def section() -> list[str]:
    """Of the page: lines of Markdown."""
    lines = [
        "## What peers have published",
        "",
        "Of public threads, as their authors give it: another kernel, mostly timed a call at a time, some of a plain",
        "AllReduce. They are no figures to beat; beside them, ours fused in a graph of calls, by the quicker strategy.",
        "",
        "| what | GPUs | TP | hidden | tokens | published, us | predicted | source |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in PUBLISHED:
        low, likely, high = (each.predicted(case) for case in (LOW, LIKELY, HIGH))
        lines.append(
            f"| {each.what} | {each.gpus} | {each.ranks} | {each.hidden} | {each.tokens} | {each.us:g} "
            f"| {likely:.1f} ({low:.1f}-{high:.1f}) | {each.source} |"
        )
    return [
        *lines,
        "",
        "Two things to learn. NCCL's smallest call takes 0.7 us longer on 8 B200s than on H200s, both by one author: a",
        "hop, or two, is longer there, by about what the inputs above allow. And FlashInfer's 64 MiB at TP8 arrive at",
        "650 GB/s, its overheads included, sooner than predicted for ours: the paced link above is a cautious guess.",
    ]
