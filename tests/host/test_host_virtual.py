"""Virtual ranks, threads of one process, pass what real ones pass. On GPUs much rests on them, so they are held to it
here.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from common.cases import forms, lost_rows, own_rows, quantised
from common.cases.bad_input import check_bad_input
from common.cases.calls import check_calls
from common.cases.mixed import check_empty_calls, mixed_calls
from common.cases.rules import HOST_CHECKS
from common.cases.traffic import check_epochs, check_traffic
from common.ranks import TEST_LIBRARY, Rank, RankPool, RanksFailed
from common.virtual import VirtualGroup
from common.virtual_ranks import VirtualRank, VirtualRanks

WORKSPACE = {"max_tokens": 64, "hidden": 8192}


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_mixed_calls(ranks: int) -> None:
    VirtualRanks(ranks, "cpu").run(check_calls, mixed_calls(40, ranks, 1 << 15), WORKSPACE)


def test_traffic_epochs_and_refusals() -> None:
    ranks = VirtualRanks(3, "cpu")
    ranks.run(check_traffic, 200, [WORKSPACE, {**WORKSPACE, "strategy": "two_shot"}], hiddens=(64, 264), most_tokens=8)
    ranks.run(check_epochs, 2**32 - 4, 12, WORKSPACE)
    ranks.run(check_bad_input)
    ranks.run(check_empty_calls, WORKSPACE)
    ranks.close()


def test_a_build_for_release_has_the_calls_of_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that tests/gpu/test_gpu_bits.py captures. On the host they are launched twice, and there are no kernels."""
    monkeypatch.setattr(forms, "captured", lambda rank, work, before: SimpleNamespace(replay=work))
    monkeypatch.setattr(forms, "kernels_built", lambda world_size: 0)
    VirtualRanks(2, "cpu").run(forms.check_every_kernel)


def test_failure_names_the_rank() -> None:
    with pytest.raises(RanksFailed, match=r"(?s)rank 1: Traceback.*only here") as failed:
        VirtualRanks(3, "cpu").run(fails_on_rank_1)
    assert "gave up" in failed.value.problems[0]


def fails_on_rank_1(rank: VirtualRank) -> None:
    if rank.rank == 1:
        raise ValueError("only here")
    rank.barrier()


# ---- slots as multicast lays them out, own rows among the others; on GPUs: tests/gpu/test_software_multicast.py


@pytest.fixture(params=[1, 2, 3, 9])
def software(request: pytest.FixtureRequest) -> Iterator[VirtualRanks]:
    ranks = VirtualRanks(request.param, "cpu", multicast="software")
    yield ranks
    ranks.close()


def test_software_multicast_brings_own_rows(software: VirtualRanks) -> None:
    software.run(own_rows.check_own_rows)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_control_unicast_brings_none(ranks: int) -> None:
    with pytest.raises(RanksFailed, match="AssertionError"):
        VirtualRanks(ranks, "cpu").run(own_rows.check_own_rows)


def test_software_multicast_gives_the_same_bits(software: VirtualRanks) -> None:
    software.run(check_calls, mixed_calls(40, software.world_size, 1 << 15), WORKSPACE)
    workspaces = [WORKSPACE, {**WORKSPACE, "strategy": "two_shot"}]
    software.run(check_traffic, 100, workspaces, hiddens=(64, 264), most_tokens=8)
    software.run(check_epochs, 2**32 - 4, 12, WORKSPACE)


@pytest.mark.parametrize("kind", list(quantised.KINDS))
@pytest.mark.parametrize("check", list(quantised.CHECKS))
def test_software_multicast_with_quantised_outputs(software: VirtualRanks, check: str, kind: str) -> None:
    if check == "poison" and software.world_size == 1:
        pytest.skip("one rank waits for nobody")
    software.run(quantised.CHECKS[check], kind)


@pytest.mark.parametrize("multicast", ["", "software"])
def test_rows_that_do_not_come_after_a_signature(multicast: str) -> None:
    VirtualRanks(1, "cpu", multicast=multicast).run(lost_rows.check_lost_rows)


def test_software_multicast_is_the_only_other_kind() -> None:
    with pytest.raises(ValueError, match="wanted '' or 'software'"):
        VirtualGroup(2, 1, 8, torch.float32, multicast="hardware")


def in_software(rank: Rank, world_size: int, rule: str, off: str) -> None:
    VirtualRanks(world_size, "cpu", multicast="software").run(HOST_CHECKS[rule][0], off, timeout=10)


@pytest.mark.skipif(not TEST_LIBRARY.exists(), reason="needs the test build: make test-build")
@pytest.mark.parametrize("rule", list(HOST_CHECKS))
def test_software_multicast_holds_with_a_rule_and_fails_without(rule: str) -> None:
    """In a process that loads the test build, and is left with what broke."""
    _, world_size, says = HOST_CHECKS[rule]
    with RankPool(1, library=TEST_LIBRARY) as pool:
        pool.run(in_software, world_size, rule, "", timeout=30)
        with pytest.raises(RanksFailed, match=says):
            pool.run(in_software, world_size, rule, rule, timeout=30)
        pool.discard()


@pytest.mark.parametrize("multicast", ["", "software"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_workspace_that_sleeps_sends_nothing(ranks: int, multicast: str) -> None:
    VirtualRanks(ranks, "cpu", multicast=multicast).run(own_rows.check_nothing_is_sent, True)


def test_control_one_that_is_awake_does() -> None:
    with pytest.raises(RanksFailed, match="was stored to"):
        VirtualRanks(2, "cpu", multicast="software").run(own_rows.check_nothing_is_sent, False)
