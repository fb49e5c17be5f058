"""The twin (mnnvl_ar/dsl) on a GPU: the reference's bits, beside the library call by call and rank by rank, and its
faults as the library's.

Virtual ranks in processes of their own, one for what may fail and one for all else. The kernels are brought along: they
were built by `python -m mnnvl_ar.dsl.build` on a machine that has the DSL (`make dsl`).
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from common.cases import twin
from common.cases.diagnosis import check_different_in
from common.ranks import RankPool, RanksFailed
from common.twin import in_virtual_ranks, rounds_of_faults
from common.wrong_twins import FOLDER, WRONG, folder_of
from mnnvl_ar.dsl import constants, cubins

EPILOGUE = "common.relu_squared:relu_squared"
HALF, END = 2**31 - 2**31 % 3 - 3, constants.EPOCHS


def architecture() -> str:
    if not torch.cuda.is_available():
        return "none"
    return constants.ARCHITECTURES.get(torch.cuda.get_device_capability(0), "none")


def is_built(epilogue: str = "") -> bool:
    return cubins.find(2, architecture(), epilogue, cubins.FOLDER) is not None


pytestmark = [
    pytest.mark.gpu(1),
    pytest.mark.skipif(torch.cuda.device_count() > 1, reason="alike on every machine; runs where there is one GPU"),
    pytest.mark.skipif(not is_built(), reason=f"no kernels of these sources for {architecture()}: make dsl"),
]
WORLDS = pytest.mark.parametrize("world", constants.WORLD_SIZES)
MIXED = pytest.mark.parametrize("side", ["both", "one", "other", "random"])
FAULTY = pytest.mark.parametrize("side", ["both", "one", "other"])


@pytest.fixture(scope="module")
def process() -> Iterator[RankPool]:
    with RankPool(1, "cuda") as pool:
        yield pool


@pytest.fixture
def own_process() -> Iterator[RankPool]:
    """For a test of faults, which may leave kernels behind that wait until their deadline."""
    pool = RankPool(1, "cuda")
    yield pool
    pool.discard()


def calls_of_twin(pool: RankPool, world: int, function: Any, side: str, *arguments: Any, timeout: float = 90.0) -> int:
    (made,) = pool.run(in_virtual_ranks, world, function, side, *arguments, timeout=timeout)
    assert (made > 0) == (side != "none"), "who made the calls?"
    return int(made)


@MIXED
@WORLDS
def test_bits(process: RankPool, world: int, side: str) -> None:
    """Every size and option, against the reference."""
    calls = twin.all_kinds(100 * world)
    made = calls_of_twin(process, world, twin.check_kinds, side, calls)
    assert side != "both" or made == world * len(calls)


@pytest.mark.parametrize("side", ["none", "both", "one"])
@WORLDS
def test_rest(process: RankPool, world: int, side: str) -> None:
    calls_of_twin(process, world, twin.check_rest, side)


@pytest.mark.parametrize("side", ["both", "one", "random"])
@WORLDS
def test_alternating(process: RankPool, world: int, side: str) -> None:
    """In graphs and eager, with calls of other ops between them."""
    calls_of_twin(process, world, twin.check_alternating, side, 400, random.Random(side).randrange(1000))


@pytest.mark.parametrize("first", [HALF, END - 3, END - 6])
@pytest.mark.parametrize("side", ["both", "random"])
def test_epochs(process: RankPool, side: str, first: int) -> None:
    """Past 2^31, where a signed remainder would turn over, and past the wrap."""
    calls_of_twin(process, 2, twin.check_epochs, side, first, 12)


@pytest.mark.parametrize("side", ["both", "random"])
@WORLDS
def test_pieces(process: RankPool, world: int, side: str) -> None:
    calls_of_twin(process, world, twin.check_pieces, side, 8)


@pytest.mark.parametrize("side", ["both", "one"])
def test_overlapping_calls(process: RankPool, side: str) -> None:
    calls_of_twin(process, 2, twin.check_overlapping, side)


@pytest.mark.parametrize(("side", "world", "tokens"), [("both", 2, 1), ("one", 2, 3), ("random", 4, 2)])
def test_soak(process: RankPool, side: str, world: int, tokens: int) -> None:
    """10^5 calls, every one of them replayed."""
    calls_of_twin(process, world, twin.check_soak, side, 100_000, tokens, 4096, timeout=150)


def test_refusals(process: RankPool) -> None:
    calls_of_twin(process, 2, twin.check_refusals, "both")


@pytest.mark.parametrize("world", [3])
def test_a_world_size_that_it_does_not_have(process: RankPool, world: int) -> None:
    process.run(twin.check_world, world, timeout=60)


@pytest.mark.parametrize("side", ["both", "none"])
def test_sentinels_in_data(process: RankPool, side: str) -> None:
    calls_of_twin(process, 2, twin.check_sentinels, side)


def test_torn_store(process: RankPool) -> None:
    process.run(in_virtual_ranks, 2, twin.check_torn, "both", timeout=60)


@pytest.mark.skipif(not (FOLDER / "clear").exists(), reason="the wrong twins are not built: make dsl")
@pytest.mark.parametrize("rule", WRONG)
def test_fails_without(rule: str) -> None:
    """The controls: a twin without this rule fails the check that the right one passes. One that is merely slow does
    not, and shows that two calls at once are noticed."""
    wrong = WRONG[rule]
    check = getattr(twin, wrong.check)
    pool = RankPool(1, "cuda", env={"MNNVL_AR_CUBINS": str(folder_of(rule))})
    try:
        with pytest.raises(RanksFailed, match=wrong.says) if wrong.says else contextlib.nullcontext():
            pool.run(in_virtual_ranks, wrong.ranks, check, wrong.side, *wrong.arguments, timeout=40)
    finally:
        pool.discard()


@pytest.mark.skipif(not is_built(EPILOGUE), reason="the tutorial's epilogue is not built: make dsl")
def test_an_epilogue_of_your_own(process: RankPool) -> None:
    """The tutorial's (docs/tutorials/epilogue_in_python.md)."""
    process.run(in_virtual_ranks, 2, twin.check_epilogue, "none", EPILOGUE, timeout=60)


@FAULTY
@pytest.mark.parametrize(("world", "absent"), [(2, 0), (2, 1), (4, 2)])
def test_absent_rank(process: RankPool, world: int, absent: int, side: str) -> None:
    calls_of_twin(process, world, twin.check_absent, side, absent)


@FAULTY
@pytest.mark.parametrize("what", ["", "eps", "weight bias", "weight dtype", "tag"])
def test_a_call_that_differs(process: RankPool, what: str, side: str) -> None:
    calls_of_twin(process, 2, check_different_in, side, what)


@pytest.mark.parametrize("side", ["both", "one"])
def test_two_at_once(own_process: RankPool, side: str) -> None:
    calls_of_twin(own_process, 2, twin.check_two_at_once, side)


@pytest.mark.parametrize(
    ("sizes", "side"),
    [("matrix", "both"), ("matrix", "one"), ("twin", "both"), ("twin", "one"), ("twin", "other")],
)
def test_fault_matrix(own_process: RankPool, sizes: str, side: str) -> None:
    """The library's own, as it is, but for kinds that kill a process, or that are heard of by connections, of which
    virtual ranks have none. With the matrix's sizes some of the calls are the twin's; with the twin's, all are."""
    (problems,) = own_process.run(rounds_of_faults, side, sizes == "twin", timeout=150)
    assert problems == []
