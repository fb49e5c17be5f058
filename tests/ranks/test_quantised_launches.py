"""Ops with quantised outputs by every launch, and in worlds whose kernels test_quantised_ops.py does not run: of four
ranks, and of real ones.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from common.cases import quantised, quantised_launches
from common.places import gpus, host, virtual
from common.ranks import RankPool

KINDS = pytest.mark.parametrize("kind", list(quantised.KINDS))


@pytest.mark.parametrize("ranks", [virtual(4), gpus(2)], indirect=True)
@KINDS
@pytest.mark.parametrize("check", ["outputs", "arguments", "pieces", "poison", "control"])
def test_outputs(ranks: Any, kind: str, check: str) -> None:
    ranks.run(quantised.CHECKS[check], kind, timeout=90)


@pytest.mark.parametrize("ranks", [host(2), virtual(2), virtual(4), virtual(8), gpus(2)], indirect=True)
@KINDS
@pytest.mark.parametrize("check", [quantised_launches.check_grids, quantised_launches.check_arguments])
def test_launches(ranks: Any, kind: str, check: Any) -> None:
    ranks.run(check, kind, timeout=90)


@pytest.mark.parametrize("ranks", [virtual(2), virtual(4), virtual(8), gpus(2)], indirect=True)
@KINDS
def test_graphs(ranks: Any, kind: str) -> None:
    ranks.run(quantised_launches.check_graphs, kind, timeout=90)


@pytest.mark.parametrize("ranks", [virtual(2)], indirect=True)
@KINDS
def test_every_form(ranks: Any, kind: str) -> None:
    ranks.run(quantised_launches.check_forms, kind, timeout=90)


@pytest.mark.gpu(1)
@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="alike on every machine; runs where there is one GPU")
@KINDS
def test_a_launch_that_is_refused(kind: str) -> None:
    with RankPool(1, "cuda") as pool:
        pool.run(quantised_launches.check_refused, kind, timeout=60)
