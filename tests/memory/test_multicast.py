"""Multicast against the simulated driver only: when it is refused, how ranks fall back together, that nothing leaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from memory import faults, ranks
from memory.simulated_driver import SimulatedDriver, allow_simulated_multicast
from memory.test_allocate import check_content, check_shared, make
from mnnvl_ar.errors import BringUpError
from mnnvl_ar.memory import MULTICAST_SWITCHES, MulticastRefused, multicast, multicast_refusal
from mnnvl_ar.memory.block import Block
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
        assert not simulated.held()
        return (error.rank, error.step, error.cause), simulated.calls
    assert bool(memory.multicast_pointer) == (memory.transport == "multicast")
    assert bool(simulated.held().get("bound")) == (memory.transport == "multicast")
    check_content(memory)
    check_shared(memory, group)
    memory.close()
    assert not simulated.held()
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
        multicast.bring_up(steps, block, None)  # type: ignore[arg-type]
    assert simulated.calls == []
    real = CudaDriver()  # not opened: it would fail otherwise if it got further
    for call in (
        lambda: real.multicast_granularity(2, 4096, "posix_fd"),
        lambda: real.multicast_create(2, 4096, "posix_fd"),
        lambda: real.multicast_add_device(1),
        lambda: real.multicast_bind(1, 1, 4096),
    ):
        with pytest.raises(MulticastRefused, match="multicast is switched off by"):
            call()
