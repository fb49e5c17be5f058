"""The comparison with fp32, of answers that are made from the truth itself, and of others that are a little off."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from servers import against_fp32, answers
from servers.answers import Answer
from servers.models.architectures import tiny
from servers.models.reference import Reference
from servers.models.weights import written
from servers.prompts import prompts

MODEL = tiny("llama")
SUBJECT = "vllm/tiny"


def answered(truth: Reference, asked: list[list[int]], off: float, tokens: int = 6) -> list[Answer]:
    """Greedy answers, whose log-probabilities are off by so much."""
    draw, texts = random.Random(off), [list(each) for each in asked]
    tops: list[list[dict[int, float]]] = [[] for _ in asked]
    for _ in range(tokens):
        for text, top, right in zip(texts, tops, truth.logprobs(texts), strict=True):
            best = right[-1].topk(5)
            values = [float(value) + draw.uniform(-off, off) for value in best.values]
            top.append(dict(zip(best.indices.tolist(), values, strict=True)))
            text.append(int(best.indices[0]))
    return [Answer(text[len(a) :], top) for text, a, top in zip(texts, asked, tops, strict=True)]


def compared(tmp_path: Path, off: dict[str, float]) -> dict[str, Any]:
    torch.set_num_threads(1)
    folder = written(MODEL, tmp_path, "cpu")
    truth, asked = Reference(folder), prompts(8, 4, 20, MODEL.vocabulary)
    for mode, much in off.items():
        file = tmp_path / "outputs" / f"vllm.tiny.{mode}.json.gz"
        answers.save(file, asked, answered(truth, asked, much))
    return against_fp32.compared(folder, SUBJECT, tmp_path / "outputs", "cpu")


def test_ours_is_nearer(tmp_path: Path) -> None:
    told = compared(tmp_path, {"ours": 0.0, "as_is": 0.01, "trtllm": 0.0})
    assert told["to_fp32"]["ours"]["logprob_apart_mean"] < 1e-5
    assert 0.002 < told["to_fp32"]["as_is"]["logprob_apart_mean"] < 0.01
    assert told["to_fp32"]["ours"]["first_choice"] == 1.0
    assert told["no_farther_than_as_is"]["no_farther"]
    assert told["no_farther_than_trtllm"]["no_farther"]
    assert told["ours_and_as_is"]["equal_tokens"] == 1.0


def test_ours_is_farther(tmp_path: Path) -> None:
    told = compared(tmp_path, {"ours": 0.02, "as_is": 0.01})
    assert not told["no_farther_than_as_is"]["no_farther"]
    assert "no_farther_than_trtllm" not in told


def test_without_answers_there_is_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no answers of vllm/tiny"):
        against_fp32.compared(written(MODEL, tmp_path, "cpu"), SUBJECT, tmp_path / "outputs", "cpu")
