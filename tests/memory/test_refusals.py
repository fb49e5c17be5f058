"""What the driver has refused a group is not asked for again, and what merely went wrong is."""

from __future__ import annotations

import gc
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from memory import faults, ranks
from memory.simulated_driver import SimulatedDriver, allow_simulated_multicast
from memory.test_allocate import check_content, check_shared, make
from mnnvl_ar.errors import BringUpError
from mnnvl_ar.memory import DriverError, failures
from mnnvl_ar.memory.failures import Refusals

REFUSED = "CUDA_ERROR_NOT_PERMITTED"
Told = tuple[str, str, list[str]]  # transport and handle kind; the reason, or the error; what the driver was asked for


def tried(group: dist.ProcessGroup, fail: dict[str, str], **options: Any) -> Told:
    """One bring-up with a driver that refuses `fail`."""
    allow_simulated_multicast()
    driver = SimulatedDriver(group.rank(), fail=fail, multicast=True)
    try:
        memory = make(group, **{"device": torch.device("cuda", 0), "driver": driver} | options)
    except BringUpError as error:
        told = f"rank {error.rank}, {error.step}", str(error)
    else:
        check_content(memory)
        check_shared(memory, group)
        told = f"{memory.transport} {memory.handle_kind}", memory.reason
        memory.close()
    faults.check_given_back(driver)
    return *told, [call for call in driver.calls if "create" in call]


def body(rank: int, size: int, store: dist.Store, fail: dict[str, str], later: list[dict[str, Any]]) -> list[Told]:
    """A bring-up in which rank 1 is refused `fail`, then others in which nobody is, with the options of `later`, of
    which those of "on rank 1" are for that rank."""
    group = ranks.group(store, "first", rank, size)
    told = [tried(group, fail if rank == 1 else {})]
    for options in later:
        mine = options.pop("on rank 1", {})
        told.append(tried(group, {}, **options | (mine if rank == 1 else {})))
    return told


def launched(fail: dict[str, str], *later: dict[str, Any]) -> list[Told]:
    """What rank 0 has to tell of each; the others say the same."""
    told = ranks.values(ranks.launch(3, body, fail, list(later)))
    for all_ranks in zip(*told, strict=True):
        assert len({answer[:2] for answer in all_ranks}) == 1, all_ranks
    return [told[0][0], *told[1][1:]]  # rank 1 is the one that would have to ask again


def test_a_refused_handle_kind_is_not_asked_for_again() -> None:
    first, second = launched({"create fabric": REFUSED}, {})
    assert first[0] == second[0] == "multicast posix_fd"
    assert first[2][0] == "create fabric"
    assert "create fabric" not in second[2]
    assert "not fabric, since rank 1 failed at allocate (cuMemCreate: CUDA_ERROR_NOT_PERMITTED" in second[1]
    assert "an earlier bring-up over this group found" in second[1]
    assert "an earlier bring-up" not in first[1]


def test_refused_multicast_is_not_asked_for_again() -> None:
    refused = {"multicast_add_device": "CUDA_ERROR_NOT_SUPPORTED"}
    first, second, third = launched(refused, {}, {"transport": "multicast"})
    assert first[0] == second[0] == "unicast fabric"
    assert second[2] == ["create fabric"]
    assert "not multicast, since rank 1 failed at multicast add device (" in second[1]
    assert third[0] == "rank 1, multicast add device"
    assert "an earlier bring-up over this group found" in third[1]
    assert third[2] == []


def test_where_nothing_works_the_error_is_remembered_and_says_how_to_retry() -> None:
    first, second, third, fourth = launched(
        {"map of host-gpu-2": "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED"}, {}, {}, {"retry": True}
    )
    assert first[0] == second[0] == third[0] == "rank 1, map"
    assert second[2] == third[2] == []
    for words in ("cuMemSetAccess: CUDA_ERROR_PEER_ACCESS_UNSUPPORTED", "earlier bring-up", "topo -p2p", "retry=True"):
        assert words in second[1]
    assert second[1] == third[1], "it does not grow"
    assert fourth[0] == "multicast fabric"


def test_one_rank_that_retries_does_so_for_all() -> None:
    _, second, third = launched({"create fabric": REFUSED}, {"on rank 1": {"retry": True}}, {})
    assert second[0] == third[0] == "multicast fabric"
    assert "earlier" not in second[1]


@pytest.mark.parametrize(
    "fail",
    [{"create": "CUDA_ERROR_OUT_OF_MEMORY"}, {"map": "CUDA_ERROR_UNKNOWN"}, {"open": "CUDA_ERROR_NOT_PERMITTED"}],
)
def test_what_may_have_passed_is_tried_again(fail: dict[str, str]) -> None:
    first, second = launched(fail, {})
    assert first[0].startswith("rank 1, ")
    assert second[0] == "multicast fabric"
    assert "not " not in second[1]


def forgetful_body(rank: int, size: int, store: dist.Store, forgetful: int, telling: bool) -> Told:
    """After a refusal one rank remembers nothing, as if it had been interrupted. Unless `telling`, nobody tells, and
    they wait for each other in vain."""
    group = ranks.group(store, "first", rank, size)
    tried(group, {"create fabric": REFUSED} if rank == 1 else {}, transport="unicast")
    if rank == forgetful:
        Refusals.of(group).clear()
    with mock.patch.object(Refusals, "agree", Refusals.agree if telling else lambda self, by_rank: None):
        return tried(group, {}, transport="unicast", timeout=20.0 if telling else 3.0)


@pytest.mark.parametrize("forgetful", [0, 1])
def test_all_go_by_what_any_rank_remembers(forgetful: int) -> None:
    told = ranks.values(ranks.launch(2, forgetful_body, forgetful, True))
    assert told[0][:2] == told[1][:2]
    assert told[0][0] == "unicast posix_fd"
    assert "create fabric" not in told[0][2] + told[1][2]


def test_control_ranks_that_do_not_tell_go_two_ways() -> None:
    told = ranks.values(ranks.launch(2, forgetful_body, 0, False))
    assert "create fabric" in told[0][2]
    assert "create fabric" not in told[1][2]


def groups_body(rank: int, size: int, store: dist.Store) -> None:
    """Another group knows nothing of it, nor does the same memory's restoration; and it goes with its group."""
    world = ranks.group(store, "first", rank, size)
    fail = {"create fabric": REFUSED} if rank == 1 else {}
    pair = dist.new_group([0, 1])
    driver = SimulatedDriver(rank)
    memory = make(pair, device=torch.device("cuda", 0), transport="unicast", driver=driver)
    assert tried(pair, fail, transport="unicast")[0] == "unicast posix_fd"
    assert tried(world, {}, transport="unicast")[0] == "unicast fabric"
    memory.restore(pair, 20.0)
    assert memory.handle_kind == "fabric"
    driver._fail.update(fail)  # a refusal in a restoration is not remembered either
    memory.restore(pair, 20.0)
    assert memory.handle_kind == "posix_fd"
    driver._fail.clear()
    memory.restore(pair, 20.0)
    assert memory.handle_kind == "fabric"
    memory.close()
    assert len(failures._by_group) == 2
    dist.destroy_process_group()
    del world, pair
    gc.collect()
    assert len(failures._by_group) == 0


def test_refusals_belong_to_their_group() -> None:
    ranks.values(ranks.launch(2, groups_body))


def test_only_the_driver_refuses() -> None:
    assert failures.lasts(DriverError("cuMemCreate", REFUSED, ""))
    assert not failures.lasts(PermissionError(REFUSED))
