"""The ops under opcheck, fake tensors and the compiler, on the host."""

import shutil

import pytest

from common.cases.compiled import check_compiles, check_fakes, check_ops, check_wanted_is_traced
from common.ranks import rank_pool


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_opcheck(dtype: str) -> None:
    rank_pool(1).run(check_ops, dtype, timeout=120)


def test_fakes() -> None:
    rank_pool(1).run(check_fakes, timeout=120)


def test_traces_to_one_node() -> None:
    rank_pool(1).run(check_wanted_is_traced, timeout=120)


def test_compiles_whole() -> None:
    rank_pool(1).run(check_compiles, "aot_eager", timeout=180)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_compiles_by_inductor() -> None:
    rank_pool(1).run(check_compiles, "inductor", timeout=240)
