"""Addresses whose memory is gone, and to which captured graphs may still come: one small piece stands in for all."""

from __future__ import annotations

import ctypes
import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist

from memory import faults, ranks
from memory.simulated_driver import GRAIN, SimulatedDriver, allow_simulated_multicast
from memory.test_allocate import check_content, check_shared, make
from mnnvl_ar.errors import BringUpError
from mnnvl_ar.memory import Fill, SymmetricMemory
from mnnvl_ar.memory.verbs import DriverError

BLOCK = 3 * GRAIN + 100_000  # of four pieces
INSTEAD = (Fill(0, 4096, 7), Fill(64, 4, 11))


class Counting(SimulatedDriver):
    """Notes the sizes of all memory that is made, and which is not given back."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.made: list[tuple[int, str]] = []

    def create(self, nbytes: int, kind: str) -> int:
        self.made.append((nbytes, kind))
        return super().create(nbytes, kind)


def make_large(group: dist.ProcessGroup, driver: SimulatedDriver, kind: str) -> SymmetricMemory:
    if kind == "host":
        return make(group, nbytes=BLOCK)
    return make(group, nbytes=BLOCK, device=torch.device("cuda", 0), transport=kind, driver=driver)


def word(address: int) -> int:
    return int.from_bytes(ctypes.string_at(address, 4), "little")


def stand_in_body(rank: int, size: int, store: dist.Store, kind: str) -> None:
    group = ranks.group(store, "first", rank, size)
    driver = Counting(rank, multicast=True)
    allow_simulated_multicast()
    memory = make_large(group, driver, kind)
    pointers, held, fds = memory.pointers, driver.held(), ranks.census()["fds"]
    assert bool(memory.multicast_pointer) == (kind == "multicast")
    for round_ in range(3):
        memory.stand_in = tuple if round_ == 1 else lambda: INSTEAD
        driver.made.clear()
        memory.drop()
        memory.drop()  # leaves what stands in
        assert memory.is_dropped
        if round_ == 1:  # the control: nothing is asked for
            assert ranks.census()["mapped"] == 0
            faults.check_given_back(driver, wanted={name: held[name] for name in ("reservations", "context") if held})
            if kind != "host":
                with pytest.raises(DriverError, match="not mapped"):
                    driver.read(pointers[rank], 4)
        else:
            check_stands_in(memory, driver if kind != "host" else None)
            assert ranks.census()["fds"] < fds, "no descriptor is left, nor a connection"
        memory.restore(group, 20.0)
        assert memory.pointers == pointers
        assert driver.held() == held
        check_content(memory)
        check_shared(memory, group)
    ranks.meet(store, "restored", size)
    memory.stand_in = lambda: INSTEAD
    memory.drop()
    memory.close()  # while something stands in
    faults.check_given_back(driver)
    assert ranks.census()["mapped"] == 0


def check_stands_in(memory: SymmetricMemory, driver: Counting | None) -> None:
    """Each block begins with the fills, every byte can be touched, and all of it is one piece. At the multicast address
    there is nothing: what is there, if not a multicast, must not be stored to as to one."""
    blocks = memory.pointers
    assert [(word(p), word(p + 64), word(p + 68)) for p in blocks] == [(7, 11, 7)] * len(blocks)
    for block in blocks:
        for offset in (4096, GRAIN, memory.nbytes - 4):
            ctypes.memmove(block + offset, offset.to_bytes(4, "little"), 4)
            assert word(block + offset) == offset
    assert {word(block) for block in blocks} == {GRAIN}, "one piece, again and again"
    if driver is None:
        return
    assert driver.made == [(GRAIN, "")], "one piece, that no peer can have"
    per_place = -(-memory.nbytes // GRAIN)
    spaces = 1 + bool(memory.multicast_pointer)
    wanted = {"context": 1, "reservations": spaces, "maps": per_place * len(blocks)}
    faults.check_given_back(driver, wanted=wanted)
    assert sorted(driver._maps) == sorted(place + n * GRAIN for place in blocks for n in range(per_place))
    assert not driver._multicast_maps
    if memory.multicast_pointer:
        with pytest.raises(DriverError, match="no multicast address"):
            driver.multicast_store(memory.multicast_pointer, 1)


@pytest.mark.parametrize("kind", ["host", "unicast", "multicast"])
def test_one_piece_stands_in_for_all_blocks(kind: str) -> None:
    ranks.values(ranks.launch(3, stand_in_body, kind))


def failing_body(rank: int, size: int, store: dist.Store, step: str) -> None:
    """A restoration that fails leaves what stood in before it."""
    group = ranks.group(store, "first", rank, size)
    driver = Counting(rank)
    memory = make_large(group, driver, "unicast")
    memory.stand_in = lambda: INSTEAD
    memory.drop()
    maps = driver.held()["maps"]

    def enter(name: str) -> None:
        if rank == 1 and name == step:
            faults.go_wrong("exception", 0)

    faults.hooks.enter = enter
    with pytest.raises(BringUpError):
        memory.restore(group, 20.0)
    faults.hooks.enter = None
    assert driver.held()["maps"] == maps
    assert all((word(p), word(p + 64)) == (7, 11) for p in memory.pointers)
    memory.restore(group, 20.0)
    check_content(memory)
    ranks.meet(store, "checked", size)
    memory.close()
    assert not driver.held()


@pytest.mark.parametrize("step", ["rendezvous", "allocate", "map", "verify"])
def test_a_restoration_that_fails(step: str) -> None:
    ranks.values(ranks.launch(2, failing_body, step))


def scarce_body(rank: int, size: int, store: dist.Store, verb: str) -> str:
    """There is no memory for what stands in: the memory is given back all the same, and a warning says so."""
    group = ranks.group(store, "first", rank, size)
    driver, texts = Counting(rank), list[str]()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mnnvl_ar").addHandler(handler)
    memory = make_large(group, driver, "unicast")
    memory.stand_in = lambda: INSTEAD
    driver._fail = {verb: "CUDA_ERROR_OUT_OF_MEMORY"}
    memory.drop()
    driver._fail = {}
    assert driver.held() == {"context": 1, "reservations": 1}
    memory.restore(group, 20.0)
    check_content(memory)
    ranks.meet(store, "checked", size)
    memory.close()
    (text,) = texts
    return text


@pytest.mark.parametrize("verb", ["create", "map"])
def test_no_memory_for_it(verb: str) -> None:
    for text in ranks.values(ranks.launch(2, scarce_body, verb)):
        assert "no graph may be replayed now" in text
        assert "CUDA_ERROR_OUT_OF_MEMORY" in text
