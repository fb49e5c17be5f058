"""What a broken workspace says: the fault that a call left behind, as an error that names the rank."""

from __future__ import annotations

import time
from dataclasses import dataclass

from mnnvl_ar._library import named, ops
from mnnvl_ar.errors import CallMismatch, PeerGone, PeerTimeout, WorkspaceBroken

# FaultCode of csrc/protocol/fault.h.
PEER_TIMEOUT, CALL_MISMATCH, PEER_FAULT, OVERLAP, DAMAGED, LAUNCH_SHAPE, TWO_AT_ONCE, ENDED = range(1, 9)
PEER_DIED, PEER_LEFT, ASLEEP = 9, 10, 11
_KINDS = {PEER_TIMEOUT: PeerTimeout, CALL_MISMATCH: CallMismatch, PEER_DIED: PeerGone, PEER_LEFT: PeerGone}


@dataclass(frozen=True)
class Fault:
    """Why a workspace broke, as seen from this rank; attributes as in `WorkspaceBroken`."""

    code: int
    relayed: bool  # a peer found it, and marked this rank's block
    rank: int
    peer: int
    call_number: int
    call: str
    peer_call: str
    waited: float
    when: float  # Unix time of the fault, or of its discovery here
    offset: int  # DAMAGED: of the first control word that was overwritten
    text: str

    def message(self) -> str:
        """One paragraph: what happened, who is at fault, when, and what to do."""
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.when))
        advice = "Workspace.recover() brings the same ranks back; survivors of a lost rank close it and make a new one."
        if self.code == ASLEEP:
            advice = "Replay no graph of it until Workspace.wake() has returned; after close(), never."
        return f"{self.text} Noted {when} on rank {self.rank}. {advice}"

    def error(self) -> WorkspaceBroken:
        kind = _KINDS.get(self.code, WorkspaceBroken)
        return kind(self.message(), self.rank, self.peer, self.call_number, self.call, self.peer_call, self.waited)


def read_fault(handle: int) -> Fault | None:
    """The fault of the workspace, or None. Reads this rank's block, 16 KiB; once it is broken, the peers' too."""
    found = named(ops._workspace_fault, handle)
    if found["code"] == 0:
        return None
    return Fault(waited=found.pop("waited_ns") / 1e9, when=found.pop("when_ns") / 1e9, **found)


def raise_fault(handle: int) -> None:
    """Raises what `read_fault` finds: `PeerTimeout`, `PeerGone`, `CallMismatch` or `WorkspaceBroken`."""
    fault = read_fault(handle)
    if fault is not None:
        raise fault.error()
