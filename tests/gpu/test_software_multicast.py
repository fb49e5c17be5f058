"""Everything of multicast but the switch, on one GPU: stores to the multicast address are a loop over all blocks
(tests/common/virtual.py). The cases are those of unicast: bits, graphs, quantised outputs, each guard switched off.
Beside it: every kernel and form (test_software_multicast_kernels.py), faults and hostile timing (..._faults.py), blocks
mapped twice (..._aliases.py), one GPU a rank (..._ranks.py).

Virtual ranks of a test build, in processes of their own. By `pytest -m gpu -k software`.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from common.cases import own_rows, quantised
from common.cases.calls import Call, check_calls
from common.cases.graphs import check_graphs
from common.cases.many import HIDDENS, TOKENS, calls_of_many
from common.cases.mixed import mixed_calls
from common.cases.rules import GPU_CHECKS
from common.cases.software import in_virtual_ranks
from common.cases.traffic import check_epochs, check_traffic
from common.many_ranks import ManyRanks
from common.ranks import TEST_LIBRARY, RankPool, RanksFailed

pytestmark = [
    pytest.mark.gpu(1),
    pytest.mark.skipif(not TEST_LIBRARY.exists(), reason="needs the test build: make test-build"),
    pytest.mark.skipif(torch.cuda.device_count() > 1, reason="alike on every machine; runs where there is one GPU"),
]
SIZES, UNROLLED = (1, 2, 3, 9), (4, 8)  # 3 and 9 are not unrolled; 1 runs the kernels of 2
WORKSPACE = {"max_tokens": 64, "hidden": 8192, "deadline": 5.0}
PDLS = (0, 1, 2)
of_every_size = pytest.mark.parametrize("run", [*SIZES, *UNROLLED], indirect=True)


@pytest.fixture(scope="module")
def process() -> Iterator[RankPool]:
    pool = RankPool(1, "cuda", library=TEST_LIBRARY)
    yield pool
    pool.discard()


@pytest.fixture(params=SIZES)
def run(process: RankPool, request: pytest.FixtureRequest) -> Any:
    """`run(function, ...)` by virtual ranks of each size."""

    def run(function: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        process.run(in_virtual_ranks, request.param, function, *arguments, timeout=90, **named)

    run.size = request.param  # type: ignore[attr-defined]
    return run


@of_every_size
def test_own_rows_come_too(run: Any) -> None:
    run(own_rows.check_own_rows)


def test_control_by_unicast_they_do_not(run: Any) -> None:
    with pytest.raises(RanksFailed, match="AssertionError"):
        run(own_rows.check_own_rows, multicast="")


def test_a_workspace_that_sleeps_sends_nothing(run: Any) -> None:
    """Nothing is mapped at the multicast address then: no store may come there."""
    run(own_rows.check_nothing_is_sent, asleep=True)


def test_control_one_that_is_awake_does(run: Any) -> None:
    with pytest.raises(RanksFailed, match="was stored to"):
        run(own_rows.check_nothing_is_sent, asleep=False)


@of_every_size
def test_mixed_calls(run: Any) -> None:
    run(check_calls, mixed_calls(64, run.size, 1 << 15, (-1, *PDLS)), WORKSPACE)


@of_every_size
def test_rows_that_queue_up_and_batches(run: Any) -> None:
    calls = [
        Call(op, tokens, hidden, "bf16", strategy=strategy, pdl=pdl, seed=tokens)
        for op in ("all_reduce", "all_reduce_rms_norm")
        for tokens, hidden in ((64, 2880), (64, 7168), (3, 16384), (33, 24), (1, 8))
        for strategy in (0, 1)
        for pdl in PDLS
    ]
    run(check_calls, calls, {**WORKSPACE, "strategy": "one_shot"})


@of_every_size
def test_traffic_and_epochs(run: Any) -> None:
    sizes = {"hiddens": (64, 264, 2880, 7168), "most_tokens": 32, "pdls": (-1, *PDLS)}
    run(check_traffic, 200, [WORKSPACE, {**WORKSPACE, "strategy": "two_shot"}], run.size, **sizes)
    run(check_epochs, 2**32 - 7, 20, {"max_tokens": 16, "hidden": 2880, "deadline": 5.0})


def more_than_sixteen(rank: Any, world_size: int) -> None:
    with ManyRanks(world_size, TOKENS, max(HIDDENS["bf16"]), "bf16", multicast="software") as ranks:
        assert ranks.run(calls_of_many("bf16")[::5], 4) == []


@pytest.mark.parametrize("world_size", [17, 24])
def test_more_ranks_than_are_awaited_at_once(process: RankPool, world_size: int) -> None:
    """Own rows come among the others', in the first sixteen or behind them."""
    process.run(more_than_sixteen, world_size, timeout=120)


GRAPHS = [*itertools.product(SIZES, [(0,), (1,), (2,), PDLS]), *itertools.product(UNROLLED, [PDLS])]


@pytest.mark.parametrize(("run", "pdls"), GRAPHS, indirect=["run"])
def test_graphs_and_eager_calls(run: Any, pdls: tuple[int, ...]) -> None:
    sizes = {"hiddens": (64, 2880, 7168), "most_tokens": 32, "pdls": pdls}
    run(check_graphs, 80, [WORKSPACE, {**WORKSPACE, "strategy": "two_shot"}], run.size + 10 * len(pdls), **sizes)


@pytest.mark.parametrize("kind", list(quantised.KINDS))
@pytest.mark.parametrize("check", list(quantised.CHECKS))
def test_quantised(run: Any, kind: str, check: str) -> None:
    if check == "poison" and run.size == 1:
        pytest.skip("one rank waits for nobody")
    run(quantised.CHECKS[check], kind)


@pytest.mark.parametrize("run", UNROLLED, indirect=True)
@pytest.mark.parametrize("kind", list(quantised.KINDS))
def test_quantised_of_four_and_eight(run: Any, kind: str) -> None:
    for check in ("outputs", "pieces"):
        run(quantised.CHECKS[check], kind)


@pytest.mark.parametrize("rule", list(GPU_CHECKS))
def test_holds_with(rule: str, process: RankPool) -> None:
    process.run(in_virtual_ranks, GPU_CHECKS[rule][1], GPU_CHECKS[rule][0], "", timeout=90)


@pytest.mark.parametrize("rule", list(GPU_CHECKS))
def test_fails_without(rule: str) -> None:
    """In a process of its own, since a control may leave kernels behind that wait for ever."""
    check, world_size, says = GPU_CHECKS[rule]
    pool = RankPool(1, "cuda", library=TEST_LIBRARY)
    try:
        pool.run(warm, timeout=60)
        with pytest.raises(RanksFailed, match=says):
            pool.run(without_a_rule, world_size, check, rule, timeout=10)
    finally:
        pool.discard()


def warm(rank: Any) -> None:
    """What takes long in a new process: CUDA's start, and loading the kernels."""
    in_virtual_ranks(rank, 2, own_rows.check_own_rows)


def without_a_rule(rank: Any, world_size: int, check: Callable[..., None], rule: str) -> None:
    from common.virtual_ranks import VirtualRanks

    VirtualRanks(world_size, multicast="software").run(check, rule, timeout=6)
