"""Ops with quantised outputs by every launch, and in worlds whose kernels nothing else runs: four ranks, and real ones.

tests/ranks/test_quantised_ops.py has the ops themselves, on the host and by 2, 3 and 8 virtual ranks.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from common.cases import quantised, quantised_launches
from common.places import gpus, pool_of, virtual
from common.ranks import RankPool

KINDS = list(quantised.KINDS)
OPS = ("outputs", "arguments", "pieces", "poison", "control")


def check(place: tuple[str, int], function: Any, kind: str) -> None:
    pool_of(place).run(function, kind, timeout=90)


@pytest.mark.parametrize("place", [virtual(4), gpus(2)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPS)
def test_outputs(place: tuple[str, int], kind: str, name: str) -> None:
    check(place, quantised.CHECKS[name], kind)


@pytest.mark.parametrize("place", [virtual(2), virtual(4), virtual(8), gpus(2)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(quantised_launches.LAUNCHES))
def test_launches(place: tuple[str, int], kind: str, name: str) -> None:
    check(place, quantised_launches.LAUNCHES[name], kind)


@pytest.mark.parametrize("kind", KINDS)
def test_every_form(kind: str) -> None:
    check(("virtual", 2), quantised_launches.check_forms, kind)


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="alike on every machine; runs where there is one GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_a_launch_that_is_refused(kind: str) -> None:
    with RankPool(1, "cuda") as pool:
        pool.run(quantised_launches.check_refused, kind, timeout=60)
