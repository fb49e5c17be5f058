"""A debug mode: with `MNNVL_AR_CHECK=1`, ranks also compare what must be the same bits on all of them.

Ranks sign op, shape and numbers of a call, but not what is in their tensors. A weight that was loaded otherwise on one
rank, or a residual that has drifted apart, gives ranks other outputs without a word. In this mode each eager call is
followed by a second, small one, by which ranks exchange a checksum of every tensor that all must have alike: weight,
residual, scales, and all outputs. `x` is each rank's own share and is not compared.

Contract
  * The variable is read when a workspace is made, and is the same on all ranks, or making it fails.
  * Eager calls only: the host cannot compare what a CUDA graph computes, so nothing is compared while a stream
    captures, nor when a graph is replayed. What torch.compile makes of a call is an eager call.
  * A difference is `RanksDiffer`, on all ranks alike, out of the op that was called. It names argument, ranks and call.
  * Inputs are summed before the call, since an output may be an input's memory; if an input differs, it is named, and
    not the outputs that differ for it.
  * Off, it costs nothing: no op is touched. On, each call waits for its stream twice, and the workspace counts two.

How ops are met: they are called by whoever has their name, so no wrapper in Python would see all calls. The dispatcher
does: a kernel for its key BackendSelect is asked before the device's own, in inference mode too, and passes on. A
meeting of checksums is an all-reduce of rows that are 0 but for the rank's own, on the same workspace: it goes the same
way as the call, in the same order, and needs no other connection.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mnnvl_ar._library import ops
from mnnvl_ar.diagnosis import raise_fault
from mnnvl_ar.errors import RanksDiffer
from mnnvl_ar.ops import NAMES

SWITCH = "MNNVL_AR_CHECK"

_OWN = ("x",)  # a rank's own share
_WORD = 1 << 64
_PARTS = 4  # of a checksum, as numbers that fp32 holds exactly: one row of 16 bytes

_checked: dict[int, Checked] = {}  # by handle
_library: list[torch.library.Library] = []  # kept: a Library that goes takes its kernels along


@dataclass
class Checked:
    """A workspace whose calls are compared."""

    rank: int
    world_size: int
    calls: int = 0  # that were compared


def is_on(environment: Mapping[str, str] = os.environ) -> bool:
    """What the variable says; `ValueError` for what is neither yes nor no."""
    value = environment.get(SWITCH, "").strip()
    if value not in ("", "0", "1"):
        raise ValueError(f"{SWITCH}: is {value!r}, wanted 1 or 0")
    return value == "1"


def is_watching() -> bool:
    """Whether calls on any workspace are compared."""
    return bool(_checked)


def watch(handle: int, rank: int, world_size: int) -> None:
    """From now on calls on this workspace are compared."""
    if not _library:
        library = torch.library.Library("mnnvl_ar", "IMPL")
        for name in NAMES:
            out_name = f"{name.removesuffix('_out')}_out"
            library.impl(name, _Kernel(name, out_name), "BackendSelect", with_keyset=True)
        _library.append(library)
    _checked[handle] = Checked(rank, world_size)


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Of all bytes and their places: an int64 without dimensions, on the tensor's device."""
    octets = tensor.detach().contiguous().view(-1).view(torch.uint8)
    words = torch.zeros(-(-octets.numel() // 8), dtype=torch.int64, device=tensor.device)
    words.view(torch.uint8)[: octets.numel()] = octets
    # Integers wrap. Each word is mixed with its place, and spread over 64 bits, before all are added.
    place = torch.arange(1, words.numel() + 1, device=tensor.device) * _signed(0x9E3779B97F4A7C15)
    mixed = (words ^ place) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> 29)) * _signed(0x94D049BB133111EB)
    return (mixed ^ (mixed >> 32)).sum()


def odd_ranks(values: Sequence[int]) -> list[int]:
    """Ranks whose value is not that of most; none if all have one value; all if no value is that of more than half."""
    value, count = Counter(values).most_common(1)[0]
    if 2 * count <= len(values):
        return list(range(len(values)))
    return [rank for rank, each in enumerate(values) if each != value]


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD // 2 else word


class _Kernel:
    """An op's kernel for the key BackendSelect. `out_name`: of its form that writes into tensors it is given."""

    def __init__(self, name: str, out_name: str) -> None:
        self._op = getattr(ops, name).default
        self._name = name
        schema = self._op._schema.arguments
        self._arguments = [a.name for a in schema]
        self._inputs = [a.name for a in schema if not _is_written(a) and a.name not in _OWN]
        self._outputs = [a.name for a in getattr(ops, out_name).default._schema.arguments if _is_written(a)]

    def __call__(self, keyset: Any, *arguments: Any, **keywords: Any) -> Any:
        below = keyset & torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)
        given = dict(zip(self._arguments, arguments, strict=False)) | keywords
        checked, x = _checked.get(given["workspace"]), given["x"]
        if checked is None or x.numel() == 0 or _captures(x):
            return _run(self._op, below, arguments, keywords)
        sums = _sums({name: given.get(name) for name in self._inputs})
        result = _run(self._op, below, arguments, keywords)
        if self._op._schema.returns:
            outputs = dict(zip(self._outputs, (result,) if isinstance(result, torch.Tensor) else result, strict=True))
        else:
            outputs = {name: given.get(name) for name in self._outputs}
        sums |= _sums(outputs)
        call = f"{self._name}({list(x.shape)}, {str(x.dtype).removeprefix('torch.')})"
        _compare(given["workspace"], checked, below, x.device, call, sums)
        return result


def _run(op: Any, keyset: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    return op.redispatch(keyset, *arguments, **keywords)


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _captures(x: torch.Tensor) -> bool:
    if not x.is_cuda:
        return False
    with torch.cuda.device(x.device):
        return torch.cuda.is_current_stream_capturing()


def _sums(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: checksum(t) for name, t in tensors.items() if isinstance(t, torch.Tensor) and t.numel() > 0}


def _compare(
    handle: int, checked: Checked, keyset: Any, device: torch.device, call: str, sums: Mapping[str, torch.Tensor]
) -> None:
    """Raises `RanksDiffer` for the first tensor that is not the same everywhere."""
    number, checked.calls = checked.calls, checked.calls + 1
    mine = [value % _WORD for value in torch.stack(list(sums.values())).tolist()]
    everyone = _exchange(handle, checked, keyset, device, mine)
    for name, values in zip(sums, zip(*everyone, strict=True), strict=True):
        odd = odd_ranks(values)
        if odd:
            raise RanksDiffer(checked.rank, name, odd, list(values), f"{call}, call number {number}")


def _exchange(handle: int, checked: Checked, keyset: Any, device: torch.device, mine: Sequence[int]) -> list[list[int]]:
    """Every rank's numbers, by rank."""
    # Whole numbers below 2^16 are exact in fp32, and in nothing smaller that a user may have made the default.
    rows = torch.zeros(checked.world_size, len(mine), _PARTS, dtype=torch.float32)
    rows[checked.rank] = torch.tensor([[value >> 16 * part & 0xFFFF for part in range(_PARTS)] for value in mine])
    gathered = _run(ops.all_reduce.default, keyset, (rows.to(device), handle), {}).cpu()
    if gathered.isnan().any():  # this call has failed, or the one before it
        raise_fault(handle)
    return [[sum(int(p) << 16 * n for n, p in enumerate(value)) for value in of_rank] for of_rank in gathered.tolist()]
