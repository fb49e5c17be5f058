"""What the fault tests share: the steps, the ways to go wrong at one, and what a rank tells afterwards."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from memory import ranks
from memory.simulated_driver import SimulatedDriver, allow_simulated_multicast
from mnnvl_ar.errors import BringUpError
from mnnvl_ar.memory import AnyGroup, DriverError, Fill, Members, Request, SymmetricMemory, allocate, lifeline, parting
from mnnvl_ar.memory.vote import hooks

STEPS = [
    "prepare",
    "rendezvous",
    "probe",
    "reserve",
    "allocate",
    "fill",
    "exchange",
    "import",
    "map",
    "write",
    "verify",
    "ready",
]
MULTICAST_STEPS = [
    f"multicast {step}" for step in ("probe", "create", "import", "add device", "bind", "map", "write", "verify")
]
RESTORE_STEPS = [step for step in STEPS if step != "reserve"]  # the addresses are still there
Told = tuple[int, str, str, str]  # rank, step, cause, advice
WORD = 0x80000000
CONTENT = WORD.to_bytes(4, "little") * 16_384
STORES = [(0, "multicast map"), (0, "multicast write")]  # lost there: others may store, or have yet to
_LEAKABLE = ("fds", "mapped", "threads", "sockets")


def make(group: AnyGroup, kind: str, timeout: float, driver: SimulatedDriver | None = None) -> SymmetricMemory:
    """`kind`: "host", "cuda", "multicast" or "auto"."""
    request = Request(65_536, [Fill(0, 65_536, WORD)], 1024, torch.device("cpu"))
    if kind == "host":
        return allocate(group, request, timeout=timeout)
    driver = driver or SimulatedDriver(Members(group).rank, multicast=True)
    allow_simulated_multicast()
    request = replace(request, device=torch.device("cuda", 0), transport="unicast" if kind == "cuda" else kind)
    return allocate(group, request, timeout=timeout, driver=driver)


def go_wrong(mode: str, seconds: float) -> None:
    if mode == "failure":
        raise DriverError("cuSimulated", "CUDA_ERROR_SIMULATED", "injected")
    if mode == "exception":
        raise KeyError("injected")
    if mode == "stall":
        time.sleep(seconds)
    elif mode == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif mode == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)


def attempt(
    group: AnyGroup, kind: str, timeout: float, wrong: Mapping[str, str], memory: SymmetricMemory | None = None
) -> tuple[Told | None, float]:
    """One bring-up, or restoration of `memory`, in which this rank goes wrong as `wrong` says (mode by step): its error
    if any, and seconds."""

    def enter(step: str) -> None:
        if step in wrong:
            go_wrong(wrong[step], timeout * 1.4)

    hooks.enter = enter
    driver = SimulatedDriver(Members(group).rank, multicast=True)
    start = time.monotonic()
    try:
        if memory is None:
            make(group, kind, timeout, driver).close()
        else:
            memory.restore(group, timeout)
        told = None
    except BringUpError as error:
        told = (error.rank, error.step, error.cause, error.advice)
    finally:
        hooks.enter = None
    seconds = time.monotonic() - start
    if memory is not None or told is None or told[:2] not in STORES or "died" not in told[2]:
        check_given_back(driver, f"leaked after {wrong}")
    else:  # without rank 0 nobody knows when the others have given up storing
        assert driver.held()["bound"] == 1
    if memory is not None and told is not None:
        assert ranks.census()["mapped"] == 0, f"memory is left after {wrong}"
    return told, seconds


def check_given_back(driver: SimulatedDriver, what: str = "is kept", wanted: Mapping[str, int] | None = None) -> None:
    """What a multicast was bound to goes when all ranks have left, which takes a moment."""
    until = time.monotonic() + 20.0
    while driver.held() != (wanted or {}):
        assert time.monotonic() < until, f"{what}: {driver.held()}"
        time.sleep(0.005)


def wrongs(kind: str, mode: str, step: str, here: bool, rank: int) -> dict[str, str]:
    """What goes wrong on this rank. With "auto", multicast is given up, since rank 1 fails in it."""
    first = {"multicast bind": "failure"} if kind == "auto" and rank == 1 else {}
    return first | ({step: mode} if here else {})


def check_census(before: ranks.Census, what: str, patience: float = 5.0) -> None:
    """Nothing has grown since `before`. A thread that has been joined may still be on its way out of the kernel's list:
    Python's `join` returns when the thread has done its last Python, so what has grown gets a while to shrink."""
    until = time.monotonic() + patience
    while True:
        now = ranks.census()
        grown = {name: (before[name], now[name]) for name in _LEAKABLE if now[name] > before[name]}
        if not grown:
            return
        assert time.monotonic() < until, f"{what}: grew from, to: {grown}, opened: {now.opened_since(before)}"
        time.sleep(0.01)


def check_nothing_kept() -> None:
    until = time.monotonic() + 20.0
    while parting._kept:
        assert time.monotonic() < until, "something is kept for ranks that have left"
        time.sleep(0.005)


def loop_body(
    rank: int,
    size: int,
    store: dist.Store,
    kind: str,
    mode: str,
    cases: list[tuple[str, int]],
    timeout: float,
    purpose: str = "allocate",
) -> list[Any]:
    """Goes through many cases (step, victim) in one process; after each, the same over the same ranks must work."""
    group = ranks.group(store, "first", rank, size)
    for _ in range(3):
        make(group, kind, 20.0).close()
    check_nothing_kept()
    memory = make(group, kind, 20.0) if purpose == "restore" else None
    pointers = memory.pointers if memory else ()
    before = ranks.census()
    results = []
    for number, (step, victim) in enumerate(cases):
        wrong = wrongs(kind, mode, step, rank == victim, rank)
        results.append(attempt(group, kind, timeout, wrong, memory))
        if mode == "stall":  # the others give up earlier than the one that sleeps
            ranks.meet(store, f"case{number}", size)
        if memory is None:
            make(group, kind, 20.0).close()
        else:
            memory.restore(group, 20.0)
            assert memory.pointers == pointers
            for pointer in pointers:
                assert ctypes.string_at(pointer, 65_536) == CONTENT
        ranks.meet(store, f"after{number}", size)
        check_census(before, f"{mode} at {step} on rank {victim}, seen from rank {rank}")
    if memory is not None:
        memory.close()
    return results


def last_words_body(
    rank: int,
    size: int,
    store: dist.Store,
    kind: str,
    step: str,
    victim: int,
    timeout: float,
    purpose: str = "allocate",
) -> tuple[Told | None, float]:
    """The victim is killed at `step`; the survivors then bring up memory over a new group of their own."""
    lifeline._LAST_SECONDS = 0.2
    group = ranks.group(store, "first", rank, size)
    make(group, kind, 20.0).close()
    check_nothing_kept()
    before = ranks.census()
    memory = make(group, kind, 20.0) if purpose == "restore" else None
    told = attempt(group, kind, timeout, wrongs(kind, "kill", step, rank == victim, rank), memory)
    if memory is not None:
        memory.close()
    if kind != "multicast" or (victim, step) not in STORES:
        check_census(before, f"kill at {step}")
    again = ranks.group(store, "second", rank - (rank > victim), size - 1)
    dist.barrier(again)  # gloo's own descriptors are there now
    before = ranks.census()
    make(again, kind, 20.0).close()
    check_census(before, f"bring-up after a kill at {step}")
    return told
