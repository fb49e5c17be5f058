"""What a group has been refused, so that it is not asked for again: each try costs every rank the attempt, seconds
where the driver waits for an IMEX daemon, and of multicast also objects that a whole machine shares.

Only what is a property of the machine is remembered: that a driver refuses a handle kind, or multicast. Not that memory
ran out, that a service is not ready yet, that a peer is late, slow or dead: the next try may well succeed.

It is kept by process group and goes with it. All ranks go by what any of them remembers, as they tell each other when
they meet; so they go the same way even if one of them was interrupted before it could note what the others did.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from .verbs import DriverError
from .vote import Failure

MULTICAST = "multicast"
_LASTING = (
    "CUDA_ERROR_INVALID_DEVICE",
    "CUDA_ERROR_NOT_PERMITTED",
    "CUDA_ERROR_NOT_SUPPORTED",
    "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED",
    "TOO_OLD",
)

# By way: a handle kind, or MULTICAST.
Refusals = dict[str, Failure]

_by_group: WeakKeyDictionary[dist.ProcessGroup, Refusals] = WeakKeyDictionary()


def of(group: dist.ProcessGroup) -> Refusals:
    """What is remembered here; the caller adds to it."""
    return _by_group.setdefault(group, {})


def lasts(error: BaseException) -> bool:
    return isinstance(error, DriverError) and error.code in _LASTING


def agree(mine: Refusals, told: Iterable[Mapping[str, Any]]) -> None:
    """Makes it what all ranks remember together. `told` is theirs, by rank: of each way the fields of its failure."""
    everyone: Refusals = {}
    for refusals in told:
        for way, failure in refusals.items():
            everyone.setdefault(way, Failure(**failure))
    mine.clear()
    mine.update(everyone)


def again(failure: Failure) -> Failure:
    """The failure as one that is remembered, not met."""
    cause = f"{failure.cause.rstrip('.')}; so an earlier bring-up over this group found, and it was not tried again"
    advice = f"{failure.advice} If that has changed since, pass retry=True, or make a new group.".lstrip()
    return replace(failure, cause=cause, advice=advice)
