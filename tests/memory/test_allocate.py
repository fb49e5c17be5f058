"""Memory that is really shared: every transport, any group, any order."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from memory import ranks
from memory.simulated_driver import SimulatedDriver
from mnnvl_ar.memory import Fill, Request, SymmetricMemory, allocate
from mnnvl_ar.memory.block import Block
from mnnvl_ar.memory.bringup import Use
from mnnvl_ar.memory.verbs import Token, Verbs

NBYTES = 100_000
FILLS = [Fill(0, 50_000, 0x80000000), Fill(50_000, 40_000, 0x01020304)]
PROBE = 49_968  # 16-aligned, and across the border of both fills
CPU = torch.device("cpu")


def words(memory: SymmetricMemory, rank: int, offset: int, count: int) -> tuple[int, ...]:
    return struct.unpack(f"<{count}I", ctypes.string_at(memory.pointers[rank] + offset, 4 * count))


def check_content(memory: SymmetricMemory) -> None:
    """Every block, seen from here, is as the fills say, the probe area included."""
    for rank in range(memory.world_size):
        assert set(words(memory, rank, 0, 12_500)) == {0x80000000}
        assert set(words(memory, rank, 50_000, 10_000)) == {0x01020304}


def check_shared(memory: SymmetricMemory, group: dist.ProcessGroup) -> None:
    """What each rank writes to each block is what its owner finds there."""
    rank, size = memory.rank, memory.world_size
    dist.barrier(group)
    for peer in range(size):
        ctypes.memmove(memory.pointers[peer] + 90_000 + 4 * rank, struct.pack("<I", 1000 * rank + peer), 4)
    dist.barrier(group)
    assert words(memory, rank, 90_000, size) == tuple(1000 * peer + rank for peer in range(size))
    dist.barrier(group)


def make(
    group: dist.ProcessGroup,
    *,
    timeout: float = 20.0,
    use: Use | None = None,
    driver: Verbs | None = None,
    **asked: Any,
) -> SymmetricMemory:
    """`asked` are fields of the request other than the usual."""
    request = Request(**{"nbytes": NBYTES, "fills": FILLS, "probe_offset": PROBE, "device": CPU} | asked)
    return allocate(group, request, timeout=timeout, use=use, driver=driver)


def host_body(rank: int, size: int, store: dist.Store) -> str:
    group = ranks.group(store, "first", rank, size)
    memory = make(group)
    assert (memory.rank, memory.world_size) == (rank, size)
    assert memory.nbytes >= NBYTES
    assert memory.pointers[rank] % 16 == 0
    assert (memory.transport, memory.handle_kind, memory.multicast_pointer) == ("host", "memfd", 0)
    check_content(memory)
    check_shared(memory, group)
    memory.close()
    return memory.reason


@pytest.mark.parametrize("size", [1, 2, 3, 8, pytest.param(16, marks=pytest.mark.slow)])
def test_host(size: int) -> None:
    reasons = ranks.values(ranks.launch(size, host_body))
    assert set(reasons) == {f"host over memfd, {size} ranks on 1 host"}


def cuda_body(rank: int, size: int, store: dist.Store, per_rank: list[dict[str, Any]], transport: str) -> Any:
    group = ranks.group(store, "first", rank, size)
    driver = SimulatedDriver(**({"device": rank} | per_rank[rank]))
    memory = make(group, device=torch.device("cuda", rank), transport=transport, driver=driver)
    check_content(memory)
    check_shared(memory, group)
    if memory.multicast_pointer:
        driver.multicast_store(memory.multicast_pointer + 90_400 + 16 * rank, rank + 1)
        dist.barrier(group)
        assert words(memory, rank, 90_400, 4 * size)[::4] == tuple(range(1, size + 1))
        dist.barrier(group)
    assert memory.nbytes % (2 << 20) == 0
    memory.close()
    assert not driver.held()
    return memory.transport, memory.handle_kind, memory.reason, driver.calls


@pytest.mark.parametrize("size", [1, 2, 4])
def test_fabric(size: int) -> None:
    told = ranks.values(ranks.launch(size, cuda_body, [{}] * size, "unicast"))
    assert {t[:3] for t in told} == {("unicast", "fabric", f"unicast over fabric, {size} ranks on 1 host")}
    for *_, calls in told:
        check_content_comes_first(calls)


def check_content_comes_first(calls: list[str]) -> None:
    """All of the content is in place before any peer can have the handle (H10, tvm#16797)."""
    created, exported = calls.index("create fabric"), calls.index("export fabric")
    assert calls[created:exported].count("fill") == len(FILLS), calls
    proof = calls.index("read")  # each write of the proof is read back: all before it but one are content
    assert calls[exported:proof].count("fill") == 1, calls


def content_last_body(rank: int, size: int, store: dist.Store, per_rank: list[dict[str, Any]]) -> Any:
    """`cuda_body` with the steps `fill` and `exchange` exchanged."""
    fill, import_peers, late = Block.fill, Block.import_peers, []

    def put_off(block: Block, fills: Sequence[Fill]) -> None:
        if late:
            fill(block, fills)
        late.append(fills)

    def fill_first(block: Block, tokens: Sequence[Token | None]) -> None:
        fill(block, late[0])
        import_peers(block, tokens)

    with mock.patch.multiple(Block, fill=put_off, import_peers=fill_first):
        return cuda_body(rank, size, store, per_rank, "unicast")


def test_control_content_after_the_handle_is_seen() -> None:
    for *_, calls in ranks.values(ranks.launch(2, content_last_body, [{}] * 2)):
        with pytest.raises(AssertionError):
            check_content_comes_first(calls)


@pytest.mark.parametrize("refuser", [0, 2])
@pytest.mark.parametrize("verb", ["create fabric", "export fabric", "import fabric"])
def test_one_rank_without_fabric_takes_all_to_posix_fd(verb: str, refuser: int) -> None:
    options: list[dict[str, Any]] = [{}, {}, {}]
    options[refuser] = {"fail": {verb: "CUDA_ERROR_NOT_PERMITTED"}}
    told = ranks.values(ranks.launch(3, cuda_body, options, "unicast"))
    assert {t[:2] for t in told} == {("unicast", "posix_fd")}
    (reason,) = {t[2] for t in told}
    assert f"not fabric, since rank {refuser} failed at" in reason
    assert "CUDA_ERROR_NOT_PERMITTED" in reason


def test_ranks_may_share_a_device_and_devices_need_not_follow_ranks() -> None:
    devices: list[dict[str, Any]] = [{"device": 5}, {"device": 2}, {"device": 5}]
    told = ranks.values(ranks.launch(3, cuda_body, devices, "auto"))
    assert {t[:2] for t in told} == {("unicast", "fabric")}


def groups_body(rank: int, size: int, store: dist.Store) -> None:
    world = ranks.group(store, "first", rank, size)
    pairs = [dist.new_group([0, 2]), dist.new_group([3, 1])]  # PyTorch keeps [3, 1] as given or sorts it: ask the group
    mine = pairs[rank % 2]
    one, two = make(mine), make(mine)  # several over the same peers
    assert (one.rank, one.world_size) == (mine.rank(), 2)
    for memory in (one, two):
        check_content(memory)
        check_shared(memory, mine)
    everyone = make(world)  # another group at the same time, after unequal histories
    check_shared(everyone, world)
    one.close()
    check_shared(two, mine)
    two.close()
    everyone.close()


def test_subgroups_several_workspaces_two_groups_at_once() -> None:
    ranks.values(ranks.launch(4, groups_body))


def not_a_member_body(rank: int, size: int, store: dist.Store) -> None:
    ranks.group(store, "first", rank, size)
    alone = dist.new_group([0])
    if rank == 0:
        make(alone).close()
    else:
        with pytest.raises(ValueError, match="member"):
            make(alone)


def test_only_members_allocate() -> None:
    ranks.values(ranks.launch(2, not_a_member_body))


def late_body(rank: int, size: int, store: dist.Store) -> None:
    import time

    group = ranks.group(store, "first", rank, size)
    time.sleep(0.5 * rank if rank else 1.0)
    make(group).close()


def test_late_ranks_are_waited_for() -> None:
    ranks.values(ranks.launch(3, late_body))
