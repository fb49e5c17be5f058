"""Ops with quantised outputs, on the host and on GPUs: tests/common/cases/quantised.py."""

import shutil
from typing import Any

import pytest

from common.cases import quantised
from common.places import host, once_on_a_gpu, virtual

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.mark.parametrize("ranks", [host(2), host(3), host(4), virtual(2), virtual(3), virtual(8)], indirect=True)
@pytest.mark.parametrize("kind", list(quantised.KINDS))
@pytest.mark.parametrize("check", list(quantised.CHECKS))
def test_outputs(ranks: Any, kind: str, check: str) -> None:
    ranks.run(quantised.CHECKS[check], kind)


@pytest.mark.parametrize("ranks", [host(1), once_on_a_gpu()], indirect=True)
@pytest.mark.parametrize("kind", list(quantised.KINDS))
def test_opcheck(ranks: Any, kind: str) -> None:
    ranks.run(quantised.check_ops, kind, timeout=120)


# What Inductor makes of a world of one differs from that of two in a number: once is enough, and takes the longest.
@pytest.mark.parametrize(
    ("ranks", "backend"),
    [
        host(1, "aot_eager"),
        host(2, "aot_eager"),
        pytest.param(("host", 2), "inductor", id="host-2-inductor", marks=needs_compiler),
        once_on_a_gpu("aot_eager"),
        once_on_a_gpu("inductor"),
    ],
    indirect=["ranks"],
)
@pytest.mark.parametrize("kind", list(quantised.KINDS))
def test_compiles(ranks: Any, kind: str, backend: str) -> None:
    ranks.run(quantised.check_compiles, kind, backend, timeout=240)
