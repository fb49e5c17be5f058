"""FlashInfer as far as the front sees it, made from the committed facts of a release: signatures, codes, classes.

with standing_in("0.6.14") as comm:      # flashinfer.comm, and all that it takes to import it
    comm.allreduce_fusion(...)           # notes the call in comm.calls and returns ORIGINAL
"""

from __future__ import annotations

import abc
import contextlib
import enum
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch.distributed as dist

from tools.contracts import record

COMMITTED = {name: record.load(name) for name in ("flashinfer", "vllm", "sglang")}
VERSIONS = [*COMMITTED["flashinfer"]]
ORIGINAL = "what FlashInfer's own function returns"
FUNCTIONS = ("create_allreduce_fusion_workspace", "allreduce_fusion")


def parameters(version: str, function: str) -> list[str]:
    found: list[str] = COMMITTED["flashinfer"][version][f"function {function} in flashinfer/comm/allreduce.py"]
    return found


def codes(version: str, name: str = "AllReduceFusionPattern") -> dict[str, int]:
    found: dict[str, int] = COMMITTED["flashinfer"][version][f"enum {name} in flashinfer/comm/trtllm_ar.py"]
    return found


def module(version: str) -> ModuleType:
    """`flashinfer.comm`."""
    comm = ModuleType("flashinfer.comm")
    calls: list[tuple[str, dict[str, Any]]] = []
    for name in FUNCTIONS:
        setattr(comm, name, function(name, parameters(version, name), calls))
    vars(comm).update(
        calls=calls,
        AllReduceFusionPattern=type("AllReduceFusionPattern", (), codes(version)),
        QuantizationSFLayout=enum.IntEnum("QuantizationSFLayout", codes(version, "QuantizationSFLayout")),
        AllReduceFusionWorkspace=type("AllReduceFusionWorkspace", (AllReduceFusionWorkspace,), {}),
        TorchDistBackend=TorchDistBackend,
        __path__=[],
    )
    return comm


def function(name: str, takes: list[str], calls: list[tuple[str, dict[str, Any]]]) -> Any:
    """One that takes these parameters, and notes what it was called with."""
    space: dict[str, Any] = {"note": lambda given: (calls.append((name, given)), ORIGINAL)[1]}
    exec(f"def {name}({', '.join(takes)}):\n    'FlashInfer.'\n    return note(dict(locals()))", space)
    return space[name]


class AllReduceFusionWorkspace(abc.ABC):
    @property
    @abc.abstractmethod
    def backend(self) -> str: ...

    @abc.abstractmethod
    def destroy(self) -> None: ...

    @abc.abstractmethod
    def is_buffer_size_sufficient(self, *arguments: Any) -> bool: ...


class TorchDistBackend:
    """Object collectives over a process group, as FlashInfer's class of this name."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.gathered = 0

    def Get_rank(self) -> int:
        return dist.get_rank(self._group)

    def Get_size(self) -> int:
        return dist.get_world_size(self._group)

    def allgather(self, data: Any) -> list[Any]:
        self.gathered += 1
        told = [None] * self.Get_size()
        dist.all_gather_object(told, data, self._group)
        return told

    def bcast(self, data: Any, root: int) -> Any:
        raise AssertionError("not needed")

    barrier = Split = bcast


@contextlib.contextmanager
def standing_in(version: str) -> Iterator[Any]:
    comm = module(version)
    parent = ModuleType("flashinfer")
    home = ModuleType("flashinfer.comm.allreduce")
    home.__dict__.update({name: getattr(comm, name) for name in FUNCTIONS})
    vars(parent).update(comm=comm, __version__=version, __path__=[])
    vars(comm)["allreduce"] = home
    mnnvl = ModuleType("flashinfer.comm.mnnvl")
    vars(mnnvl).update(TorchDistBackend=TorchDistBackend, CommBackend=object)
    vars(comm)["mnnvl"] = mnnvl
    modules = {each.__name__: each for each in (parent, comm, home, mnnvl)}
    with mock.patch.dict(sys.modules, modules):
        yield comm
