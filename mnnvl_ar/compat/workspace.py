"""What `create_allreduce_fusion_workspace` hands out: FlashInfer's view of a workspace, on one of ours."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from mnnvl_ar._library import named, ops
from mnnvl_ar.compat.settings import Settings
from mnnvl_ar.compat.shared import Shared, Unique
from mnnvl_ar.errors import MnnvlArError
from mnnvl_ar.memory import AnyGroup
from mnnvl_ar.ops import Pdl
from mnnvl_ar.workspace import DTYPES


class FusionWorkspace(Unique):
    """As FlashInfer's `AllReduceFusionWorkspace`, which it is registered with. `copy` and `deepcopy` give the workspace
    itself, and it cannot be pickled.

    backend:           as was asked for, "mnnvl" or "trtllm"
    world_size, rank, tp_size: of the group, in the group
    promised:          bytes of the largest input: max_token_num x hidden_dim x the size of dtype, of any shape
    buffer_size_bytes: memory taken of each GPU; shared with the group's other workspaces
    metadata:          what FlashInfer's trtllm workspace says of itself, as far as anybody reads it
    mc_ptr:            not 0, which is all that is asked of it; no address
    handle:            for `mnnvl_ar.ops`; 0 once it is destroyed
    """

    def __init__(
        self, shared: Shared, backend: str, tokens: int, hidden: int, dtype: torch.dtype, pdl: str = "auto"
    ) -> None:
        inner = shared.take().workspace
        self.backend, self.world_size, self.rank = backend, inner.world_size, inner.rank
        self.tp_size, self.handle, self.mc_ptr = inner.world_size, inner.handle, inner.handle
        self.promised = tokens * hidden * dtype.itemsize
        self.buffer_size_bytes = inner.nbytes
        self.metadata: dict[str, Any] = {
            "tp_rank": self.rank,
            "tp_size": self.tp_size,
            "max_token_num": tokens,
            "hidden_dim": hidden,
            "use_fp32_lamport": dtype is torch.float32,
        }
        self._shared, self._inner_handle, self._pdl = shared, inner.handle, pdl
        self._early: dict[tuple[torch.Size, torch.dtype], bool] = {}
        self._give_back = weakref.finalize(self, shared.give_back)  # at exit and for garbage, too

    @property
    def _destroyed(self) -> bool:
        return not self.handle

    def is_buffer_size_sufficient(
        self,
        tp_size: int,
        num_tokens: int,
        hidden_dim: int,
        dtype: torch.dtype,
        use_oneshot: bool | None = None,
        strategy: object = None,
    ) -> bool:
        """Whether a call of [num_tokens, hidden_dim] of `dtype` will be taken. Depends on its arguments and on what was
        promised alone, so all ranks hear the same, whatever state their workspaces are in. `use_oneshot` and `strategy`
        change nothing: there is room for either."""
        if tp_size != self.world_size or not self.has_room_for(hidden_dim, dtype):
            return False
        return num_tokens * hidden_dim * dtype.itemsize <= self.promised

    def has_room_for(self, hidden: int, dtype: torch.dtype) -> bool:
        """Whether rows of this kind can be normed, any number of them, in pieces if need be; alike on all ranks."""
        # Not `Workspace.fits`, which raises where the workspace is closed or asleep.
        return dtype in DTYPES and bool(ops._workspace_fits(self._inner_handle, 1, hidden * dtype.itemsize))

    def lets_begin_early(self, x: torch.Tensor) -> bool:
        """Whether a call on `x` whose mode is left to the workspace lets the next kernel begin before its end."""
        if self._pdl != "auto":
            return self._pdl == "early"
        key = x.shape, x.dtype
        if key not in self._early:
            row_bytes = x.shape[-1] * x.dtype.itemsize if x.dim() else 0
            try:
                choice = named(ops._workspace_choice, self._inner_handle, x.nbytes // max(1, row_bytes), row_bytes)
            except RuntimeError:  # no rows that there is a call for: which says so
                return False
            self._early[key] = choice["pdl"] == Pdl.EARLY
        return self._early[key]

    def destroy(self) -> None:
        """May be called twice, at exit, after the group is gone; not collective. Calls on it raise from then on."""
        self.handle = 0
        self._give_back()

    def checkpoint_prepare(self) -> None:
        """Gives the memory back and keeps the addresses, captured graphs included. Not collective."""
        self._held("checkpoint_prepare").sleep()

    def checkpoint_restore(self, comm_backend: AnyGroup) -> None:
        """New memory at the same addresses. Collective over the same ranks."""
        self._held("checkpoint_restore").wake(comm_backend, Settings.read().timeout)

    def _held(self, verb: str) -> Shared:
        if self._destroyed:
            raise MnnvlArError(f"{verb}: this workspace was destroyed")
        return self._shared
