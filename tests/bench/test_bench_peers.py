"""What of the unfused peers needs no GPU: names, places in a window, and reasons to be left out."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import plots
from bench.cells import Cell
from bench.peers import nccl
from bench.peers.add_norm import forms
from bench.peers.nccl_library import SYMMETRIC, Communicator
from bench.variant import Unavailable

FUSED, PLAIN = (Cell(op, 2, 8, 256, "bfloat16") for op in ("fused", "plain"))


def test_only_a_fused_cell_has_a_norm_that_pdl_may_start_early() -> None:
    assert forms("nccl", FUSED) == [("nccl", False), ("nccl/pdl_norm", True)]
    assert forms("nccl", PLAIN) == [("nccl", False)]


@pytest.mark.parametrize(("switch", "name"), [(None, "nccl"), ("1", "nccl"), ("0", "nccl/unmixed")])
def test_nccl_is_named_by_its_switch(monkeypatch: pytest.MonkeyPatch, switch: str | None, name: str) -> None:
    monkeypatch.setattr(nccl, "require", lambda: None)
    monkeypatch.setattr(nccl, "Communicator", lambda team: None)
    monkeypatch.delenv("NCCL_GRAPH_MIXING_SUPPORT", raising=False)
    if switch is not None:
        monkeypatch.setenv("NCCL_GRAPH_MIXING_SUPPORT", switch)
    nothing: Any = None
    names = [variant.name for variant in nccl.Nccl(nothing, nothing).variants(FUSED)]
    assert names == [name, f"{name}/pdl_norm"]
    assert {*names} <= plots.COLOURS.keys()


def test_places_in_a_window_do_not_overlap_and_end_within_it() -> None:
    likes = [torch.zeros(3, 100, dtype=torch.bfloat16) for _ in range(4)]
    memory = torch.zeros(3 * 1024 + 600, dtype=torch.uint8)
    places = nccl.placed(memory, likes)
    for number, place in enumerate(places):
        place.fill_(number + 1)
    assert all(bool((place == number + 1).all()) for number, place in enumerate(places))
    assert all((place.data_ptr() - memory.data_ptr()) % nccl.ALIGNMENT == 0 for place in places)
    with pytest.raises(Unavailable, match="too small"):
        nccl.placed(memory[:-1], likes)


def test_windows_are_refused_where_they_might_use_multicast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNNVL_AR_DISABLE_MULTICAST", "1")
    monkeypatch.delenv("NCCL_NVLS_ENABLE", raising=False)
    team: Any = SimpleNamespace(size=2)
    nothing: Any = None
    with pytest.raises(Unavailable, match="NCCL_NVLS_ENABLE"):
        nccl.NcclSymmetric(team, nothing)


class Library:
    """Stands in for libnccl."""

    def __init__(self, handle: int) -> None:
        self.handle, self.told = handle, []  # type: ignore[var-annotated]

    def ncclMemAlloc(self, pointer: Any, nbytes: Any) -> int:
        pointer._obj.value = 4096
        return 0

    def ncclCommWindowRegister(self, comm: Any, pointer: Any, nbytes: Any, handle: Any, flags: int) -> int:
        self.told.append((pointer.value, nbytes.value, flags))
        handle._obj.value = self.handle
        return 0


def communicator(library: object) -> Communicator:
    made = Communicator.__new__(Communicator)
    made._library, made._comm = library, ctypes.c_void_p()  # type: ignore[assignment]
    return made


def test_a_window_is_symmetric_or_there_is_none() -> None:
    library = Library(7)
    window = communicator(library).window(512)
    assert library.told == [(4096, 512, SYMMETRIC)]
    assert (window.pointer, window.handle, window.nbytes) == (4096, 7, 512)
    with pytest.raises(Unavailable, match="made no window"):
        communicator(Library(0)).window(512)
    with pytest.raises(Unavailable, match="no symmetric windows"):
        communicator(object()).window(512)
