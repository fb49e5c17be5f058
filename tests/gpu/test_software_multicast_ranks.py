"""Software multicast of real ranks, one a GPU (tests/common/cases/software.py): as on one GPU, but stores to peers go
over NVLink, workspaces are the library's own, and ranks are processes. It takes two GPUs.
"""

from collections.abc import Callable
from typing import Any

import pytest

from common.cases import diagnosis, lifecycle, own_pieces, own_rows, pieces, quantised
from common.cases.calls import check_calls
from common.cases.graphs import check_graphs
from common.cases.mixed import mixed_calls
from common.cases.software import by_software, by_unicast
from common.cases.traffic import check_epochs, check_traffic
from common.gpu_ranks import REAL
from common.ranks import TEST_LIBRARY, rank_pool
from tools.replay.gpu import serve
from tools.replay.host import total
from tools.replay.script import Profile, vllm

pytestmark = pytest.mark.skipif(not TEST_LIBRARY.exists(), reason="needs the test build: make test-build")
WORKSPACE = {"max_tokens": 64, "hidden": 8192, "deadline": 5.0}
PDLS = (-1, 0, 1, 2)
SIZES = {"hiddens": (64, 264, 2880, 7168), "most_tokens": 32, "pdls": PDLS}


@pytest.fixture(params=[pytest.param(n, marks=pytest.mark.gpu(n)) for n in REAL])
def size(request: pytest.FixtureRequest) -> int:
    found: int = request.param
    return found


def run(size: int, function: Callable[..., Any], *arguments: Any, by: Any = by_software, **named: Any) -> list[Any]:
    return rank_pool(size, "cuda", library=TEST_LIBRARY).run(by, function, *arguments, timeout=120, **named)


def test_own_rows_come_too(size: int) -> None:
    run(size, own_rows.check_own_rows)


def test_control_by_unicast_they_do_not(size: int) -> None:
    run(size, check_rows_of_others, by=by_unicast)


def check_rows_of_others(rank: Any) -> None:
    others = [source for source in range(rank.world_size) if source != rank.rank]
    assert own_rows.rows_in_slot(rank) == [[source + 1.0] for source in others for _ in range(own_rows.TOKENS)]


def test_bits(size: int) -> None:
    run(size, check_calls, mixed_calls(64, size, 1 << 15, PDLS), WORKSPACE)
    run(size, check_traffic, 200, [WORKSPACE, {**WORKSPACE, "strategy": "two_shot"}], size, **SIZES)
    run(size, check_epochs, 2**32 - 7, 20, {"max_tokens": 16, "hidden": 2880, "deadline": 5.0})


def test_graphs_and_eager_calls(size: int) -> None:
    run(size, check_graphs, 80, [WORKSPACE, {**WORKSPACE, "strategy": "two_shot"}], size, **SIZES)


@pytest.mark.parametrize("kind", list(quantised.KINDS))
def test_quantised(size: int, kind: str) -> None:
    run(size, quantised.check_outputs, kind)
    run(size, quantised.check_pieces, kind)


@pytest.mark.parametrize("strategy", [0, 1])
def test_pieces(size: int, strategy: int) -> None:
    run(size, pieces.check_boundaries, strategy, 7, by=own_pieces.by_software)


def test_delays_in_kernels(size: int) -> None:
    sizes: dict[str, Any] = {"hidden": 4096, "layers": 8, "max_tokens": 128, "forwards": 80}
    script = vllm(Profile(size, 11, late=0.005, impatient=True, **sizes))
    figures = total(run(size, serve, script, delay_ns=20_000))
    assert figures["wrong_rows"] == 0, figures


def test_faults_are_named(size: int) -> None:
    run(size, diagnosis.check_absent, size - 1)
    run(size, diagnosis.check_different, 1)


def test_workspaces_that_sleep_and_recover(size: int) -> None:
    """At the addresses that kernels send to there is nothing in between, and then other memory."""
    run(size, lifecycle.check_sleep, 2)
    run(size, lifecycle.check_recover, 2)
