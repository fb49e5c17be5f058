"""How many SMs calls may count on: simulated drivers say what a context has, all ranks go by the least."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from memory import ranks
from memory.simulated_driver import SimulatedDriver
from memory.test_allocate import make
from mnnvl_ar.memory.processors import agreed


def member(uid: str, here: int, of_device: int = 132) -> dict[str, Any]:
    return {"uid": uid, "processors": here, "device_processors": of_device}


@pytest.mark.parametrize(
    ("members", "wanted"),
    [
        ([member("a", 132), member("b", 132)], 132),
        ([member("a", 132), member("b", 48)], 48),  # a green context, or MPS, on one rank
        ([member("a", 132), member("b", 66, 78)], 66),  # another GPU
        ([member("a", 132), member("a", 132)], 66),  # they share it
        ([member("a", 66), member("a", 66)], 66),  # by MPS, half each: divided already
        ([member("a", 132), member("a", 132), member("a", 132), member("b", 132)], 44),
        ([member("a", 132)] * 200, 1),
        ([member("cpu", 0, 0)] * 3, 0),
    ],
)
def test_the_least_share_of_any_rank(members: list[dict[str, Any]], wanted: int) -> None:
    assert agreed(members) == wanted


def shares_body(rank: int, size: int, store: dist.Store, devices: list[int], here: list[int]) -> tuple[int, str, int]:
    group = ranks.group(store, "first", rank, size)
    driver = SimulatedDriver(devices[rank], processors=(here[rank], 132))
    memory = make(group, device=torch.device("cuda", 0), transport="unicast", driver=driver)
    made, reason = memory.processors, memory.reason
    driver.processors = (24, 132)  # the context that wakes it has fewer
    memory.restore(group, 20.0)
    ranks.meet(store, "restored", size)
    memory.close()
    return made, reason, memory.processors


@pytest.mark.parametrize(
    ("devices", "here", "wanted"),
    [([0, 1, 2], [132, 132, 132], 132), ([0, 1, 2], [132, 64, 132], 64), ([0, 1, 0], [132, 132, 132], 66)],
    ids=["whole", "one rank has less", "two share a GPU"],
)
def test_all_ranks_go_by_it(devices: list[int], here: list[int], wanted: int) -> None:
    for made, reason, restored in ranks.values(ranks.launch(3, shares_body, devices, here)):
        assert made == wanted
        assert (f"; {wanted} of 132 SMs" in reason) == (wanted < 132), reason
        assert restored == 24


def host_body(rank: int, size: int, store: dist.Store) -> int:
    memory = make(ranks.group(store, "first", rank, size))
    memory.close()
    return memory.processors


def test_the_host_has_none() -> None:
    assert ranks.values(ranks.launch(2, host_body)) == [0, 0]
