"""Which calls of a server's tensor-parallel group go to our ops, where it comes to us without FlashInfer.

Whether one does depends on shapes, dtypes and what was agreed at the start, never on a rank's own state, so all ranks
decide alike. What is declined is the server's own, as if we were not there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mnnvl_ar.compat.workspace import FusionWorkspace
from mnnvl_ar.workspace import DTYPES

ALIGNMENT = 16  # bytes, of a call's first byte and size


@dataclass(frozen=True)
class GroupCalls:
    """workspace: the group's. most_bytes: of the largest call that is ours; infinity: all that fit, in pieces."""

    workspace: FusionWorkspace
    most_bytes: float

    def takes_sum(self, x: torch.Tensor) -> bool:
        """Whether the sum of `x`, of any shape, is ours."""
        begins = x.storage_offset() * x.dtype.itemsize
        aligned = x.nbytes % ALIGNMENT == 0 and begins % ALIGNMENT == 0
        return x.dtype in DTYPES and aligned and x.is_contiguous() and 0 < x.nbytes <= self.most_bytes

    def takes_norm(self, rows: int, hidden: int, dtype: torch.dtype) -> bool:
        """Whether the sum and norm of [rows, hidden] are ours."""
        return rows * hidden * dtype.itemsize <= self.most_bytes and self.workspace.has_room_for(hidden, dtype)
