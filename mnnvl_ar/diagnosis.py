"""What a broken workspace says: the fault record that a call left behind, as an error that names the rank."""

from __future__ import annotations

from dataclasses import dataclass

from mnnvl_ar._library import ops
from mnnvl_ar.errors import CallMismatch, PeerTimeout, WorkspaceBroken

_OPS = {0: "all_reduce", 1: "all_reduce_rms_norm"}
_DTYPES = {0: ("bfloat16", 2), 1: ("float16", 2), 2: ("float32", 4)}
_STRATEGIES = {0: "one_shot", 1: "two_shot"}
_NO_EPOCH = 0xFFFFFFFF

PEER_TIMEOUT, CALL_MISMATCH, PEER_FAULT, OVERLAP = 1, 2, 3, 4


@dataclass(frozen=True)
class Fault:
    """Why a workspace broke, as seen from this rank."""

    code: int
    rank: int
    epoch: int  # number of the call, on this rank, that failed
    call: str  # what this rank called
    peer: int  # who is waited for, or who differs; -1 when nobody in particular
    peer_call: str  # CALL_MISMATCH: what the peer called
    waited: float  # seconds
    last_epochs: tuple[int | None, ...]  # of the newest call that each rank was seen to begin

    def message(self) -> str:
        seen = ", ".join(f"rank {r}: {'none' if e is None else e}" for r, e in enumerate(self.last_epochs))
        if self.code == CALL_MISMATCH:
            what = f"rank {self.peer} called {self.peer_call} where rank {self.rank} called {self.call}"
        elif self.code == PEER_TIMEOUT:
            who = f"rank {self.peer}" if self.peer >= 0 else "a peer that began the call"
            what = f"rank {self.rank} waited {self.waited:.1f} s for {who} in {self.call}"
        elif self.code == OVERLAP:
            what = f"rank {self.rank}: the previous call did not end within {self.waited:.1f} s of {self.call}"
        else:
            what = f"rank {self.rank} was told of a fault on a peer during {self.call}; the peer's own error names the cause"
        return f"{what} (call number {self.epoch}). Newest call seen from each rank: {seen}."


def _describe(tokens: int, description: int) -> str:
    dtype, size = _DTYPES.get(description >> 4 & 15, ("unknown dtype", 2))
    hidden = (description >> 12) * 16 // size
    op = _OPS.get(description & 15, "unknown op")
    return f"{op}([{tokens}, {hidden}], {dtype}, {_STRATEGIES.get(description >> 8 & 15, 'unknown strategy')})"


def read_fault(handle: int) -> Fault | None:
    """The fault of the workspace, or None."""
    code, rank, epoch, tokens, description, peer, peer_tokens, peer_description, began, ended, *last = ops._workspace_fault(handle)
    if code == 0:
        return None
    return Fault(
        code=code,
        rank=rank,
        epoch=epoch,
        call=_describe(tokens, description),
        peer=peer if peer < len(last) else -1,
        peer_call=_describe(peer_tokens, peer_description),
        waited=(ended - began) / 1e9,
        last_epochs=tuple(None if e == _NO_EPOCH else e for e in last),
    )


def raise_fault(handle: int) -> None:
    """Raises what `read_fault` finds: `PeerTimeout`, `CallMismatch` or `WorkspaceBroken`."""
    fault = read_fault(handle)
    if fault is None:
        return
    kind = {PEER_TIMEOUT: PeerTimeout, CALL_MISMATCH: CallMismatch}.get(fault.code, WorkspaceBroken)
    raise kind(fault.message())
