"""Symmetric memory: one block on every rank of a group, each mapped into all ranks, made by a voted bring-up.

`allocate` is the way in, `allocate_prepared` where a rank has yet to find out what it needs. What they need from a
GPU or from the host is in `verbs.py`, the order of things in `bringup.py`.
"""

from .block import Fill
from .request import Need
from .symmetric import SymmetricMemory, allocate, allocate_prepared
from .verbs import MULTICAST_SWITCHES, DriverError, MulticastRefused, forbid_multicast, multicast_refusal

__all__ = [
    "MULTICAST_SWITCHES",
    "DriverError",
    "Fill",
    "MulticastRefused",
    "Need",
    "SymmetricMemory",
    "allocate",
    "allocate_prepared",
    "forbid_multicast",
    "multicast_refusal",
]
