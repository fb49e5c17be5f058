"""What is refused, and that nothing is broken by it; and the ops under opcheck, fakes and the compiler."""

import shutil
from typing import Any

import pytest

from common.cases.bad_input import check_bad_input, check_bad_workspaces
from common.cases.compiled import (
    ALIASED,
    check_compiles,
    check_compiles_aliased,
    check_fakes,
    check_ops,
    check_wanted_is_traced,
)
from common.places import gpus, host, once_on_a_gpu, virtual

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
BACKENDS = ["aot_eager", pytest.param("inductor", marks=needs_compiler)]


@pytest.mark.parametrize(
    ("ranks", "least"), [host(3, 30), virtual(2, 34), gpus(1, 30), gpus(2, 30)], indirect=["ranks"]
)
def test_calls_are_refused(ranks: Any, least: int) -> None:
    assert len(ranks.run(check_bad_input, timeout=120)[0]) >= least


@pytest.mark.parametrize("ranks", [host(3), gpus(1), gpus(2)], indirect=True)
def test_workspaces_are_refused(ranks: Any) -> None:
    ranks.run(check_bad_workspaces)


@pytest.mark.parametrize("ranks", [host(1), once_on_a_gpu()], indirect=True)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_opcheck(ranks: Any, dtype: str) -> None:
    ranks.run(check_ops, dtype, timeout=120)


@pytest.mark.parametrize("ranks", [host(1), once_on_a_gpu()], indirect=True)
def test_fakes(ranks: Any) -> None:
    ranks.run(check_fakes, timeout=120)


@pytest.mark.parametrize("ranks", [host(1), once_on_a_gpu()], indirect=True)
def test_traces_to_one_node(ranks: Any) -> None:
    ranks.run(check_wanted_is_traced, timeout=120)


@pytest.mark.parametrize("ranks", [host(1), once_on_a_gpu()], indirect=True)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles(ranks: Any, backend: str) -> None:
    ranks.run(check_compiles, backend, timeout=240)


@pytest.mark.parametrize("ranks", [host(2)], indirect=True)
@pytest.mark.parametrize("case", ALIASED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_in_place_compile(ranks: Any, backend: str, case: str) -> None:
    ranks.run(check_compiles_aliased, backend, case, timeout=240)
