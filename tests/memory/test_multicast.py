"""Multicast against the simulated driver only: when it is refused, how ranks fall back together, that nothing leaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from memory import faults, ranks
from memory.simulated_driver import GRAIN, SimulatedDriver, allow_simulated_multicast
from memory.test_allocate import check_content, check_shared, make
from mnnvl_ar.errors import BringUpError
from mnnvl_ar.memory import MULTICAST_SWITCHES, DriverError, MulticastRefused, multicast, multicast_refusal
from mnnvl_ar.memory.block import Block, Handshake
from mnnvl_ar.memory.cuda_driver import CudaDriver
from mnnvl_ar.memory.vote import Coordinator, Steps

SWITCHES = [
    ("MNNVL_AR_DISABLE_MULTICAST", "1"),
    ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1"),
    ("NCCL_NVLS_ENABLE", "0"),
    ("NVSHMEM_DISABLE_NVLS", "1"),
]


def test_the_switches_are_these() -> None:
    assert dict(SWITCHES) == MULTICAST_SWITCHES


def body(rank: int, size: int, store: dist.Store, per_rank: list[dict[str, Any]], transport: str) -> Any:
    options = {"device": rank, "multicast": True} | per_rank[rank]
    allow_simulated_multicast(options.pop("environment", None))
    group = ranks.group(store, "first", rank, size)
    simulated = SimulatedDriver(**options)
    try:
        memory = make(group, device=torch.device("cuda", 0), transport=transport, driver=simulated)
    except BringUpError as error:
        faults.check_given_back(simulated)
        return (error.rank, error.step, error.cause), simulated.calls
    assert bool(memory.multicast_pointer) == (memory.transport == "multicast")
    assert bool(simulated.held().get("bound")) == (memory.transport == "multicast")
    check_content(memory)
    check_shared(memory, group)
    memory.close()
    faults.check_given_back(simulated)
    return (memory.transport, memory.reason), simulated.calls


def one(told: list[Any]) -> Any:
    answers = {answer for answer, _ in told}
    assert len(answers) == 1, answers
    return answers.pop()


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("fabric", [True, False])
def test_multicast(size: int, fabric: bool) -> None:
    options: dict[str, Any] = {} if fabric else {"fail": {"create fabric": "CUDA_ERROR_NOT_PERMITTED"}}
    transport, reason = one(ranks.values(ranks.launch(size, body, [options] * size, "auto")))
    assert transport == "multicast"
    assert reason.startswith(f"multicast over {'fabric' if fabric else 'posix_fd'}, {size} ranks")


@pytest.mark.parametrize("refuser", [0, 2])
@pytest.mark.parametrize(("name", "value"), SWITCHES)
def test_one_rank_that_refuses_is_enough(name: str, value: str, refuser: int) -> None:
    options: list[dict[str, Any]] = [{}, {}, {}]
    options[refuser] = {"environment": {name: value}}
    told = ranks.values(ranks.launch(3, body, options, "auto"))
    transport, reason = one(told)
    assert transport == "unicast"
    assert f"multicast is switched off on rank {refuser} by {name}={value}" in reason
    assert not [call for _, calls in told for call in calls if call.startswith("multicast")]
    told = ranks.values(ranks.launch(3, body, options, "multicast"))
    rank, step, cause = one(told)
    assert (rank, step) == (refuser, "multicast probe")
    assert f"{name}={value}" in cause
    assert not [call for _, calls in told for call in calls if call.startswith("multicast")]


@pytest.mark.parametrize("refuser", [0, 1])
@pytest.mark.parametrize("verb", ["granularity", "create", "add_device", "bind"])
def test_a_failure_on_one_rank_takes_all_back_to_unicast(verb: str, refuser: int) -> None:
    if verb == "create" and refuser == 1:
        pytest.skip("only rank 0 creates")
    options: list[dict[str, Any]] = [{}, {}, {}]
    options[refuser] = {"fail": {f"multicast_{verb}": "CUDA_ERROR_OUT_OF_MEMORY"}}
    transport, reason = one(ranks.values(ranks.launch(3, body, options, "auto")))
    assert transport == "unicast"
    assert f"not multicast, since rank {refuser} failed at multicast" in reason
    rank, step, cause = one(ranks.values(ranks.launch(3, body, options, "multicast")))
    assert rank == refuser
    assert step.startswith("multicast")
    assert "CUDA_ERROR_OUT_OF_MEMORY" in cause


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ([{}, {"multicast": False}], "the device of rank 1 (host-gpu-1) has no multicast"),
        ([{}, {"device": 0}], "ranks 0 and 1 share a device"),
        ([{}], "multicast needs more than one rank"),
    ],
)
def test_where_there_is_none(options: list[dict[str, Any]], why: str) -> None:
    told = ranks.values(ranks.launch(len(options), body, options, "auto"))
    assert one(told)[0] == "unicast"
    assert why in one(told)[1]
    told = ranks.values(ranks.launch(len(options), body, options, "multicast"))
    assert why in one(told)[2]
    assert not [call for _, calls in told for call in calls if call.startswith("multicast")]


def fallback_body(rank: int, size: int, store: dist.Store) -> list[tuple[str, str]]:
    """transport="auto" at each multicast step: a failure falls back, an exception is an error."""
    allow_simulated_multicast()
    group = ranks.group(store, "first", rank, size)
    told = []
    for step in faults.MULTICAST_STEPS:

        def enter(name: str, step: str = step) -> None:
            if rank == 1 and name == step:
                faults.go_wrong("failure", 0)

        faults.hooks.enter = enter
        simulated = SimulatedDriver(rank, multicast=True)
        memory = make(group, device=torch.device("cuda", 0), driver=simulated)
        check_content(memory)
        held = simulated.held()
        assert "bound" not in held
        assert held["handles"] == 1
        assert held["maps"] == size
        check_shared(memory, group)
        memory.close()
        assert not simulated.held()
        told.append((memory.transport, memory.reason))
    return told


def test_fallback_at_every_step() -> None:
    told = ranks.values(ranks.launch(3, fallback_body))
    assert told[0] == told[1] == told[2]
    for step, (transport, reason) in zip(faults.MULTICAST_STEPS, told[0], strict=True):
        assert transport == "unicast"
        assert f"not multicast, since rank 1 failed at {step} (" in reason


@pytest.mark.parametrize(("name", "value"), SWITCHES)
def test_every_door_refuses_before_the_driver_is_asked(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert multicast_refusal({}) == ""
    assert multicast_refusal({name: value}) == f"{name}={value}"
    monkeypatch.setenv(name, value)  # set, never unset: another may be set here for good
    assert multicast_refusal()
    simulated = SimulatedDriver(0, multicast=True)
    steps, block = Steps(Coordinator({}, 1, 1.0, float("inf"), host="")), Block(0, 1)
    block.driver = simulated
    with pytest.raises(Exception, match="multicast is switched off by"):
        multicast.granularity(steps, block, 4096, "posix_fd")
    with pytest.raises(Exception, match="multicast is switched off by"):
        multicast.bring_up(steps, block, None, 4096)  # type: ignore[arg-type]
    assert simulated.calls == []
    real = CudaDriver()  # not opened: it would fail otherwise if it got further
    for call in (
        lambda: real.multicast_granularity(2, 4096, "posix_fd"),
        lambda: real.multicast_create(2, 4096, "posix_fd"),
        lambda: real.multicast_add_device(1),
        lambda: real.multicast_bind(1, 1, 4096),
        lambda: real.multicast_store(4096, 1),
    ):
        with pytest.raises(MulticastRefused, match="multicast is switched off by"):
            call()


def sizes_body(rank: int, size: int, store: dist.Store, grains: list[tuple[int, int]], nbytes: int) -> Any:
    """What a workspace of `nbytes` takes where multicast has these granularities; and again after it was put away."""
    allow_simulated_multicast()
    group = ranks.group(store, "first", rank, size)
    driver = SimulatedDriver(rank, multicast=True, grains=grains[rank])
    memory = make(group, device=torch.device("cuda", 0), nbytes=nbytes, transport="multicast", driver=driver)
    told = memory.nbytes, driver.sizes, memory.multicast_pointer % max(large for _, large in grains)
    first = {verb: list(sizes) for verb, sizes in driver.sizes.items()}
    memory.drop()
    memory.restore(group, 20.0)
    check_content(memory)
    again = {verb: sizes[len(first[verb]) :] for verb, sizes in driver.sizes.items()}
    assert again == {**first, "reserve": []}  # the addresses are still there
    dist.barrier(group)
    memory.close()
    faults.check_given_back(driver)
    return told[0], first, told[2]


@pytest.mark.parametrize(
    ("grains", "nbytes", "taken", "span"),
    [
        ([(GRAIN, 512 << 20)] * 2, 100_000, 2 << 20, 512 << 20),  # an NVL72, as TensorRT-LLM has found it
        ([(GRAIN, 512 << 20)] * 2, (2 << 20) + 1, 4 << 20, 512 << 20),
        ([(4 << 20, 512 << 20)] * 2, 100_000, 4 << 20, 512 << 20),  # the MINIMUM counts, above what memory asks for
        ([(4096, 4096)] * 2, 100_000, 2 << 20, 2 << 20),  # and below
        ([(GRAIN, GRAIN), (2 * GRAIN, 64 << 20)], 100_000, 4 << 20, 64 << 20),  # all ranks as the one that needs most
    ],
)
def test_memory_is_taken_in_small_steps(grains: list[tuple[int, int]], nbytes: int, taken: int, span: int) -> None:
    for mapped, sizes, misaligned in ranks.values(ranks.launch(2, sizes_body, grains, nbytes)):
        assert mapped == taken
        assert sizes["create"] == sizes["multicast_bind"] == [taken]
        assert sizes["reserve"] == [2 * taken, span]
        assert sizes.get("multicast_create", [span]) == [span]
        assert misaligned == 0


def what_is_forbidden_body(rank: int, size: int, store: dist.Store) -> list[str]:
    """A rank misuses a multicast address; the other one waits."""
    allow_simulated_multicast()
    group = ranks.group(store, "first", rank, size)
    driver = SimulatedDriver(rank, multicast=True)
    memory = make(group, device=torch.device("cuda", 0), transport="multicast", driver=driver)
    told = []

    def refused(call: Callable[[], object]) -> None:
        with pytest.raises(DriverError) as caught:
            call()
        told.append(str(caught.value))

    there = memory.multicast_pointer + 90_400
    if rank == 0:
        driver.multicast_store(there, 1)
        refused(lambda: driver.fill(there, 16, 1))
        refused(lambda: driver.read(there, 16))
        refused(lambda: driver.multicast_store(memory.pointers[0] + 90_400, 1))
        refused(lambda: driver.multicast_store(memory.multicast_pointer + memory.nbytes, 1))  # addresses, and no memory
    dist.barrier(group)
    if rank == 1:
        memory._block.team.run()  # has unbound its memory, and rank 0 does not know
    dist.barrier(group)
    if rank == 0:
        refused(lambda: driver.multicast_store(there, 1))
    dist.barrier(group)
    memory.close()
    return told


def test_what_ptx_and_the_driver_forbid_is_refused() -> None:
    told, _ = ranks.values(ranks.launch(2, what_is_forbidden_body))
    assert [error.partition(": ")[2] for error in told] == [
        "CUDA_ERROR_INVALID_VALUE (touches memory that is not mapped)",
        "CUDA_ERROR_INVALID_VALUE (touches memory that is not mapped)",
        "CUDA_ERROR_INVALID_VALUE (no multicast address of a vector)",
        "CUDA_ERROR_INVALID_VALUE (a member of the team is not bound there)",
        "CUDA_ERROR_INVALID_VALUE (a member of the team is not bound there)",
    ]


def test_what_one_rank_may_not_do_is_refused() -> None:
    driver, other = SimulatedDriver(0, multicast=True), SimulatedDriver(1, multicast=True)
    address, memory = driver.reserve(3 * GRAIN, GRAIN), driver.create(2 * GRAIN, "posix_fd")
    driver.map(address, 2 * GRAIN, memory)
    for place, why in ((address + GRAIN, "mapped already"), (address + 8, "not a multiple of the granularity")):
        with pytest.raises(DriverError, match=why):
            driver.map(place, GRAIN, memory)
    object_ = driver.multicast_create(1, 2 * GRAIN, "posix_fd")
    with pytest.raises(DriverError, match="would wait for devices"):
        driver.multicast_bind(object_, memory, 2 * GRAIN)
    driver.multicast_add_device(object_)
    for again, why in ((driver, "device added twice"), (other, "all devices that it is for are there")):
        with pytest.raises(DriverError, match=why):
            again.multicast_add_device(object_)
    driver.multicast_bind(object_, memory, 2 * GRAIN)
    with pytest.raises(DriverError, match="bound already"):
        driver.multicast_bind(object_, memory, 2 * GRAIN)
    driver.multicast_unbind(object_, 2 * GRAIN)
    driver.unmap(address, 2 * GRAIN)
    driver.free(address, 3 * GRAIN)
    driver.release(object_)
    driver.release(memory)
    assert driver.held() == {}


def memset_body(rank: int, size: int, store: dist.Store) -> str:
    """The handshake as it once was: a memset through the multicast address."""

    def write(self: Handshake) -> None:
        self._block.driver.fill(self._block.multicast_pointer + self._request.probe_offset, 16, 1)

    Handshake.write_multicast = write  # type: ignore[method-assign]
    return body(rank, size, store, [{}] * size, "auto")[0][1]


def test_control_a_handshake_by_memset_is_refused() -> None:
    reason = ranks.values(ranks.launch(2, memset_body))[0]
    assert "not multicast, since rank 0 failed at multicast write (simulated fill" in reason


def early_body(rank: int, size: int, store: dist.Store) -> str:
    """Rank 1 leaves out its bind: what a step between bind and store without a vote would come to."""
    driver = SimulatedDriver
    if rank == 1:
        driver.multicast_bind = driver.multicast_unbind = lambda *_: None  # type: ignore[method-assign,assignment]
    allow_simulated_multicast()
    group = ranks.group(store, "first", rank, size)
    memory = make(group, device=torch.device("cuda", 0), driver=driver(rank, multicast=True))
    memory.close()
    return memory.reason


def test_control_a_store_before_all_are_bound_is_refused() -> None:
    reason = ranks.values(ranks.launch(2, early_body))[0]
    assert "failed at multicast write (simulated multicast_store: CUDA_ERROR_INVALID_VALUE (a member of" in reason
