"""What a rank lacks is named as such, alike on all ranks: descriptors, memory, permission; and nothing is left."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import time
from typing import Any

import pytest
import torch.distributed as dist

from memory import faults, ranks
from memory.test_allocate import make
from memory.test_rendezvous import one
from mnnvl_ar.errors import BringUpError

SIZE = 3
SPARE = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12)


def attempt(group: Any, timeout: float = 20.0, **asked: Any) -> tuple[int, str, str, str] | None:
    try:
        make(group, timeout=timeout, **asked).close()
    except BringUpError as error:
        return error.rank, error.step, error.cause, error.advice
    return None


def descriptors_body(rank: int, size: int, store: dist.Store, short: list[int]) -> list[Any]:
    """Every number of spare descriptors, on each of `short` by turns; after each, a bring-up that has enough."""
    if rank == 0:  # one that opens nothing to be looked at, as a server's
        own = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        store.set("port", str(own.port))
    else:
        own = dist.TCPStore("127.0.0.1", int(store.get("port")), is_master=False)
    group = dist.ProcessGroup(own, rank, size)
    make(group).close()
    last = fill_up()
    limit, before, told = resource.getrlimit(resource.RLIMIT_NOFILE), ranks.census(), list[Any]()
    for victim in short:
        for spare in SPARE:
            ranks.meet(store, f"begin {victim} {spare}", size)
            if rank == victim:
                resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1 + spare, limit[1]))
            began, busy = time.monotonic(), time.process_time()
            found = attempt(group)
            told.append((found, time.monotonic() - began, time.process_time() - busy))
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
            make(group).close()
            ranks.meet(store, f"end {victim} {spare}", size)
            faults.check_census(before, f"rank {victim} had {spare} descriptors left")
    return told


def fill_up() -> int:
    """The last descriptor in use; there are no free ones before it any more."""
    last = max(int(fd) for fd in os.listdir("/proc/self/fd"))
    while (free := os.open(os.devnull, os.O_RDONLY)) < last:
        pass
    os.close(free)
    return free - 1


def test_out_of_descriptors() -> None:
    """The matrix of limits and ranks."""
    victims = list(range(SIZE))
    told = ranks.values(ranks.launch(SIZE, descriptors_body, victims, seconds=280))
    cases = [(victim, spare) for victim in victims for spare in SPARE]
    failed = 0
    for (victim, spare), *results in zip(cases, *told, strict=True):
        found = one([result[0] for result in results])
        if found is not None:
            failed += 1
            assert found[0] == victim, (spare, found)
            assert "Too many open files" in found[2] or "no room for" in found[2], (spare, found)
            assert "ulimit -n" in found[3], (spare, found)
        assert max(result[2] for result in results) < 2.0, "no rank spins"
    assert SIZE * 5 <= failed < len(cases), f"{failed} of {len(cases)}: the matrix covers both"


def limits_body(rank: int, size: int, store: dist.Store) -> list[Any]:
    group = ranks.group(store, "first", rank, size)
    make(group).close()
    told = []
    for name, value in (("RLIMIT_FSIZE", 16384), ("RLIMIT_AS", None)):
        kind = getattr(resource, name)
        before = resource.getrlimit(kind)
        if rank == 1:
            with open("/proc/self/statm") as file:
                now = int(file.read().split()[0]) * resource.getpagesize()
            # Room for threads, for each of which malloc may set 64 MiB aside. Python waits for ever for one without.
            resource.setrlimit(kind, (value or now + (160 << 20), before[1]))
        told.append(attempt(group, nbytes=256 << 20 if value is None else 100_000))
        resource.setrlimit(kind, before)
        assert attempt(group) is None
    return told


def test_out_of_memory_and_of_file_size() -> None:
    told = ranks.values(ranks.launch(SIZE, limits_body))
    assert told[0] == told[1] == told[2]
    (rank, step, cause, advice), (other_rank, other_step, other_cause, other_advice) = told[0]
    assert (rank, step) == (1, "allocate")
    assert "EFBIG" in cause
    assert "ulimit -f" in advice
    assert (other_rank, other_step) == (1, "reserve")
    assert "ENOMEM" in other_cause
    assert "Not enough memory" in other_advice


NUMBERS = {  # of the machine, and of its calls; "none" is no call
    "x86_64": (0xC000003E, {"memfd_create": 319, "socket": 41, "none": 0xFFFF}),
    "aarch64": (0xC00000B7, {"memfd_create": 279, "socket": 198, "none": 0xFFFF}),
}


def forbid(call: str, error: int = 1) -> None:
    """As a seccomp profile does: `call` fails with EPERM in this thread and those it starts, for good."""
    machine, numbers = NUMBERS[platform.machine()]
    load, jump, end = 0x20, 0x15, 0x06  # of BPF: load a word, jump if equal, return
    program = [
        (load, 0, 0, 4),  # seccomp_data.arch
        (jump, 0, 2, machine),
        (load, 0, 0, 0),  # seccomp_data.nr
        (jump, 1, 0, numbers[call]),
        (end, 0, 0, 0x7FFF0000),  # allowed
        (end, 0, 0, 0x00050000 | error),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in program))
    head = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, head) == 0, os.strerror(ctypes.get_errno())  # PR_SET_SECCOMP, a filter


def seccomp_body(rank: int, size: int, store: dist.Store, call: str, victim: int) -> Any:
    group = ranks.group(store, "first", rank, size)
    make(group).close()
    ranks.meet(store, "made", size)
    if rank == victim:
        forbid(call)
    return attempt(group)


@pytest.mark.skipif(platform.machine() not in NUMBERS, reason="no call numbers for this machine")
@pytest.mark.parametrize(
    ("call", "victim", "step"),
    [("memfd_create", 1, "allocate"), ("socket", 0, "rendezvous"), ("socket", 2, "rendezvous")],
)
def test_a_call_that_is_not_permitted(call: str, victim: int, step: str) -> None:
    rank, where, cause, advice = one(ranks.values(ranks.launch(SIZE, seccomp_body, call, victim)))
    assert (rank, where) == (victim, step)
    assert "EPERM" in cause or "Operation not permitted" in cause
    assert "seccomp" in advice


def test_control_a_call_that_is_permitted() -> None:
    """The same filter, of a call that no bring-up makes."""
    assert ranks.values(ranks.launch(2, seccomp_body, "none", 1)) == [None, None]


def threads_body(rank: int, size: int, store: dist.Store) -> Any:
    """Rank 1 can start no thread: the store cannot be looked at. Only that rank can say so."""
    group = ranks.group(store, "first", rank, size)
    if rank == 1:
        import threading

        def start(self: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        threading.Thread.start = start  # type: ignore[method-assign]
    return attempt(group, timeout=3.0)


def test_out_of_threads() -> None:
    told = ranks.values(ranks.launch(2, threads_body))
    assert told[0][:2] == told[1][:2] == (1, "rendezvous")
    assert "cannot start a thread" in told[1][2]


def alone_body(rank: int, size: int, store: dist.Store) -> Any:
    group = ranks.group(store, "first", rank, size)
    told = attempt(group, timeout=1.0) if rank == 0 else None
    ranks.meet(store, "told", size)
    return told


def test_control_a_rank_that_is_merely_late_lacks_nothing() -> None:
    told = ranks.values(ranks.launch(2, alone_body))
    assert told[0][:2] == (1, "rendezvous")
    assert "no answer from rank 1" in told[0][2]
    assert "ulimit" not in told[0][3]
