"""What the answers of two servers to the same prompts have in common, and how far each is from fp32."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from servers.answers import Answer


def agreement(ours: Sequence[Answer], theirs: Sequence[Answer]) -> dict[str, Any]:
    """Tokens until two answers part, since after that they answer to different texts; and the log-probabilities of the
    tokens that both name until then, the place where they part included."""
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} answers and {len(theirs)}")
    equal = places = 0
    apart: list[float] = []
    for a, b in zip(ours, theirs, strict=True):
        until = parting(a.tokens, b.tokens)
        equal += until
        places += max(len(a.tokens), len(b.tokens))
        for left, right in zip(a.tops[: until + 1], b.tops[: until + 1], strict=False):
            apart += [abs(left[token] - right[token]) for token in left.keys() & right.keys()]
    same = sum(a.tokens == b.tokens for a, b in zip(ours, theirs, strict=True))
    return {
        "answers": len(ours),
        "same_answers": same,
        "equal_tokens": equal / places if places else 0.0,
        "logprobs_compared": len(apart),
        "logprob_apart_mean": statistics.fmean(apart) if apart else None,
        "logprob_apart_max": max(apart, default=None),
    }


def parting(a: Sequence[int], b: Sequence[int]) -> int:
    """The first place where they differ."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def same_bits(a: Sequence[Answer], b: Sequence[Answer]) -> bool:
    """Tokens, and every bit of the log-probabilities."""
    return [x.tokens for x in a] == [x.tokens for x in b] and [x.tops for x in a] == [x.tops for x in b]


def no_farther(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Distances to fp32, one a prompt. Ours are no farther if their mean is at most theirs, or exceeds it by less than
    twice the standard error of the differences, which is what chance does."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return {
        "ours": statistics.fmean(ours),
        "theirs": statistics.fmean(theirs),
        "difference": mean,
        "standard_error": error,
        "no_farther": mean <= 2 * error,
    }


def wrong_tokens(answered: dict[int, list[int]], right: Sequence[Sequence[int]]) -> list[str]:
    """Of answers that came while something failed, those that are not the beginning of the right ones."""
    lines = []
    for number, tokens in sorted(answered.items()):
        place = parting(tokens, right[number])
        if place < len(tokens):
            lines.append(
                f"request {number}: token {place} is {tokens[place]}, right was {list(right[number])[place:][:1]}"
            )
    return lines
