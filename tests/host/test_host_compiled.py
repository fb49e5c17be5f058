"""The ops under opcheck, fake tensors and the compiler, on the host."""

import shutil

import pytest

from common.cases.compiled import (
    ALIASED,
    check_compiles,
    check_compiles_aliased,
    check_fakes,
    check_ops,
    check_wanted_is_traced,
)
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


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@needs_compiler
def test_compiles_by_inductor() -> None:
    rank_pool(1).run(check_compiles, "inductor", timeout=240)


@pytest.mark.parametrize("case", ALIASED)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_calls_in_place_compile(backend: str, case: str) -> None:
    rank_pool(2).run(check_compiles_aliased, backend, case, timeout=240)
