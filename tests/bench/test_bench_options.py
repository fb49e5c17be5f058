"""bench/options.py: which runs may replace the record of their machine."""

import argparse

import pytest

from bench import options


def settled(*words: str, device: str = "cuda") -> argparse.Namespace:
    return options.settle(options.parser().parse_args([*words, "--device", device]), world_size=4)


@pytest.mark.parametrize("words", [[], ["--seconds", "600", "--verbose"], ["--resume", "--without", "vllm=hangs"]])
def test_a_run_that_chooses_nothing_is_whole(words: list[str]):
    assert settled(*words).whole


@pytest.mark.parametrize(
    "words",
    [
        "--quick",
        "--tp 4",
        "--op plain",
        "--op fused,plain",
        "--tokens 1",
        "--hidden 7168",
        "--dtype float16",
        "--mode eager",
        "--l2 cold",
        "--strategy one_shot",
        "--context gemm",
        "--skew 0,2",
        "--pdl off",
        "--transport unicast",
        "--peers nccl",
        "--tables build",
    ],
)
def test_a_part_of_the_grid_or_of_the_variants_is_not(words: str):
    assert not settled(*words.split()).whole


def test_the_host_is_never_whole():
    assert not settled(device="cpu").whole
