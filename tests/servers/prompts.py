"""Prompts as token ids, seeded: no tokenizer, no network."""

from __future__ import annotations

import random

Prompt = list[int]
FIRST = 3  # ids below are special


def prompts(count: int, shortest: int, longest: int, vocabulary: int, seed: int = 0) -> list[Prompt]:
    """`count` prompts of random length and random ids."""
    draw = random.Random(f"{seed} {count} {shortest} {longest}")
    return [[draw.randrange(FIRST, vocabulary) for _ in range(draw.randint(shortest, longest))] for _ in range(count)]


def repetitive(count: int, shortest: int, longest: int, vocabulary: int, seed: int = 0) -> list[Prompt]:
    """The same of two dozen ids each, so that n-grams come back and are proposed."""
    draw = random.Random(f"{seed} repetitive {count}")
    found = []
    for _ in range(count):
        few = [draw.randrange(FIRST, vocabulary) for _ in range(24)]
        found.append([draw.choice(few) for _ in range(draw.randint(shortest, longest))])
    return found


def lengths(count: int, shortest: int, longest: int, seed: int = 0) -> list[int]:
    """How many tokens to ask for, for each of `count` requests."""
    draw = random.Random(f"{seed} lengths {count}")
    return [draw.randint(shortest, longest) for _ in range(count)]
