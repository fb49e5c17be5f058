"""What a server answered to prompts, and files of that."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from servers.prompts import Prompt

Logprobs = dict[int, float]  # of the likeliest tokens at a place, the chosen one among them
FEWEST_IDS = 0.25  # of the tokens of a sound answer, distinct ones


@dataclass(frozen=True)
class Answer:
    """tokens, and of each the log-probabilities, if they were asked for."""

    tokens: list[int]
    tops: list[Logprobs]

    def logprob(self, place: int) -> float:
        """Of the token chosen at `place`."""
        return self.tops[place][self.tokens[place]]

    def is_degenerate(self) -> bool:
        """Whether it is a few tokens in turn, whose equality would prove nothing."""
        later = self.tokens[len(self.tokens) // 2 :]
        return len(set(later)) < FEWEST_IDS * len(later)


def release(server: str) -> str:
    try:
        return metadata.version(server)
    except metadata.PackageNotFoundError:
        return "none"


def folder(work: Path, server: str) -> Path:
    """Where answers of the release that is installed are kept: those of others are not compared with them."""
    return work / "outputs" / f"{server}-{release(server)}"


def save(file: Path, prompts: list[Prompt], answers: list[Answer]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    told = {"prompts": prompts, "tokens": [a.tokens for a in answers], "tops": [a.tops for a in answers]}
    file.write_bytes(gzip.compress(json.dumps(told).encode(), mtime=0))


def load(file: Path) -> tuple[list[Prompt], list[Answer]]:
    told = json.loads(gzip.decompress(file.read_bytes()))
    answers = [
        Answer(tokens, [{int(token): value for token, value in top.items()} for top in tops])
        for tokens, tops in zip(told["tokens"], told["tops"], strict=True)
    ]
    return told["prompts"], answers
