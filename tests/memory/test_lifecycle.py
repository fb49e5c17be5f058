"""Closing, dropping and restoring: any time, any number of times, leaving nothing."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from memory import faults, ranks
from memory.simulated_driver import SimulatedDriver, allow_simulated_multicast
from memory.test_allocate import check_content, check_shared, make
from mnnvl_ar.errors import BringUpError, MnnvlArError
from mnnvl_ar.memory import Fill, Request, allocate

REPOSITORY = Path(__file__).parents[2]


def leaks_body(rank: int, size: int, store: dist.Store) -> None:
    before = ranks.census()
    mine, local = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_INET)
    mine.bind(f"\0mnnvl_ar-{os.getpid()}-leak")
    local.bind(("127.0.0.1", 0))
    for sock in (mine, local):
        unheard = ranks.census()
        sock.listen(1)
        assert ranks.census() == {**unheard, "sockets": unheard["sockets"] + 1, "MiB": mock.ANY}
        with pytest.raises(AssertionError, match="'sockets'"):
            faults.check_census(unheard, "a listener", patience=0.0)
    mine.close()
    local.close()
    faults.check_census(before, "listeners that were closed", patience=0.0)
    fd = os.memfd_create("leak")
    os.ftruncate(fd, 4096)
    with pytest.raises(AssertionError, match=r"'fds'.*memfd:leak"):
        faults.check_census(before, "a descriptor", patience=0.0)
    view = mmap.mmap(fd, 4096)
    os.close(fd)
    with pytest.raises(AssertionError, match="'mapped'"):
        faults.check_census(before, "a mapping", patience=0.0)
    view.close()
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    with pytest.raises(AssertionError, match="'threads'"):
        faults.check_census(before, "a thread", patience=0.0)
    end.set()
    thread.join()
    faults.check_census(before, "all of it given back")


def test_the_census_sees_each_kind_of_leak() -> None:
    """The control of every test that counts leaks."""
    ranks.values(ranks.launch(1, leaks_body))


def rounds_body(rank: int, size: int, store: dist.Store, rounds: int) -> None:
    group = ranks.group(store, "first", rank, size)

    def once() -> None:
        big = 2 << 20  # of two ranks: 200 leaks are 800 MiB, where a thread's first malloc may reserve 64 MiB
        allocate(group, Request(big, [Fill(0, 4096, 1)], 0, torch.device("cpu")), timeout=20.0).close()

    for _ in range(5):
        once()
    ranks.meet(store, "warm", size)
    before = ranks.census()
    for _ in range(rounds):
        once()
    ranks.meet(store, "done", size)
    faults.check_census(before, f"{rounds} rounds")
    after = ranks.census()
    assert after["MiB"] < before["MiB"] + 2 * rounds, (before, after)


def test_200_rounds_leak_nothing() -> None:
    ranks.values(ranks.launch(2, rounds_body, 200))


def close_body(rank: int, size: int, store: dist.Store) -> None:
    group = ranks.group(store, "first", rank, size)
    one, two = make(group), make(group)
    if rank == 0:
        one.close()  # not collective: the peers still use its block
    ranks.meet(store, "closed", size)
    if rank == 1:
        ctypes.memset(one.pointers[0], 7, 4096)
        assert ctypes.string_at(one.pointers[0], 1) == b"\7"
    one.close()
    one.close()
    for verb in (one.drop, lambda: one.restore(group)):
        with pytest.raises(MnnvlArError, match="closed"):
            verb()
    dist.destroy_process_group()
    two.drop()
    two.close()
    two.close()
    assert ranks.census()["mapped"] == 0


def test_close_needs_nobody() -> None:
    ranks.values(ranks.launch(2, close_body))


def restore_body(rank: int, size: int, store: dist.Store, kind: str) -> None:
    group = ranks.group(store, "first", rank, size)
    driver = SimulatedDriver(rank, multicast=True)
    allow_simulated_multicast()
    if kind == "host":
        memory = make(group)
    else:
        memory = make(group, device=torch.device("cuda", 0), transport=kind, driver=driver)
    pointers, multicast, held = memory.pointers, memory.multicast_pointer, driver.held()
    assert bool(multicast) == (kind == "multicast")
    for round_ in range(3):
        ctypes.memset(memory.pointers[rank], 0xFF, 4096)
        memory.drop()
        memory.drop()
        assert ranks.census()["mapped"] == 0
        faults.check_given_back(driver, wanted={name: held[name] for name in ("reservations", "context") if held})
        if round_ == 1:  # a process group may have come and gone meanwhile
            group = ranks.group(store, "second", rank, size)
        memory.restore(group, 20.0)
        assert (memory.pointers, memory.multicast_pointer) == (pointers, multicast)
        assert driver.held() == held
        check_content(memory)
        check_shared(memory, group)
        if multicast:
            driver.multicast_store(multicast + 90_400 + 16 * rank, rank + 1)
            dist.barrier(group)
            assert ctypes.string_at(memory.pointers[rank] + 90_400, 16 * size)[::16] == bytes(range(1, size + 1))
    memory.restore(group, 20.0)  # without a drop before it
    check_content(memory)
    ranks.meet(store, "checked", size)
    memory.close()
    faults.check_given_back(driver)


@pytest.mark.parametrize("kind", ["host", "unicast", "multicast"])
def test_restored_at_the_same_addresses(kind: str) -> None:
    ranks.values(ranks.launch(3, restore_body, kind))


def failing_restore_body(rank: int, size: int, store: dist.Store) -> None:
    group = ranks.group(store, "first", rank, size)
    memory = make(group)
    pointers = memory.pointers
    memory.drop()

    def enter(step: str) -> None:
        if rank == 1 and step == "import":
            faults.go_wrong("exception", 0)

    faults.hooks.enter = enter
    with pytest.raises(BringUpError) as caught:
        memory.restore(group, 20.0)
    faults.hooks.enter = None
    assert (caught.value.rank, caught.value.step) == (1, "import")
    assert ranks.census()["mapped"] == 0
    memory.restore(group, 20.0)
    assert memory.pointers == pointers
    check_content(memory)
    with pytest.raises(ValueError, match="rank 0 of 1"):
        memory.restore(dist.new_group([rank], use_local_synchronization=True))
    ranks.meet(store, "checked", size)
    memory.close()


def test_a_failed_restore_can_be_tried_again() -> None:
    ranks.values(ranks.launch(2, failing_restore_body))


def busy_body(rank: int, size: int, store: dist.Store) -> tuple[int, str, str]:
    """Rank 1 cannot end its use of the memory."""
    group = ranks.group(store, "first", rank, size)
    memory = make(group)
    pointers, mapped = memory.pointers, ranks.census()["mapped"]
    began = time.monotonic()

    def quiesce() -> None:
        if rank == 1:
            raise RuntimeError("a graph is being captured")

    with pytest.raises(BringUpError) as caught:
        memory.restore(group, 20.0, quiesce)
    assert time.monotonic() - began < 10, "nobody waits for the timeout"
    assert ranks.census()["mapped"] == (mapped if rank == 1 else 0)
    if rank == 1:
        check_content(memory)  # what may still use it finds all of it
    memory.restore(group, 20.0)
    assert memory.pointers == pointers
    check_content(memory)
    check_shared(memory, group)
    memory.close()
    assert ranks.census()["mapped"] == 0
    return caught.value.rank, caught.value.step, caught.value.cause


def test_a_rank_that_is_busy_keeps_its_memory_and_all_hear_of_it() -> None:
    told = ranks.values(ranks.launch(3, busy_body))
    assert told == [(1, "prepare", "RuntimeError: a graph is being captured")] * 3


def fork_body(rank: int, size: int, store: dist.Store) -> None:
    memory = make(ranks.group(store, "first", rank, size))
    child = os.fork()
    if child == 0:
        memory.close()  # must not touch what the parent shares with its peers
        try:
            memory.drop()
        except MnnvlArError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    check_content(memory)
    memory.close()


def test_a_forked_child_has_no_part_in_it() -> None:
    ranks.values(ranks.launch(1, fork_body))


def test_close_at_interpreter_exit_is_quiet(tmp_path: Path) -> None:
    script = f"""
        import torch, torch.distributed as dist
        from mnnvl_ar.memory import Request, allocate
        dist.init_process_group("gloo", store=dist.FileStore({str(tmp_path / "store")!r}, 1), rank=0, world_size=1)

        class Owner:
            def __init__(self):
                group = dist.group.WORLD
                self.memory = allocate(group, Request(4096, [], 0, torch.device("cpu")))

            def __del__(self):
                self.memory.close()

        owner = Owner()
        dist.destroy_process_group()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=REPOSITORY, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_nothing_in_any_file_system() -> None:
    before = set(os.listdir("/dev/shm"))
    ranks.launch(3, faults.last_words_body, "host", "write", 1, 20.0)
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "mnnvl" in name}
