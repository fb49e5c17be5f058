"""Symmetric memory: one block on every rank of a group, each mapped into all ranks, made by a voted bring-up.

`allocate` is the way in; what it needs from a GPU or from the host is in `verbs.py`, the order of things in
`bringup.py`.
"""

from .block import Fill
from .symmetric import SymmetricMemory, allocate
from .verbs import DriverError, MulticastRefused, multicast_refusal

__all__ = ["DriverError", "Fill", "MulticastRefused", "SymmetricMemory", "allocate", "multicast_refusal"]
