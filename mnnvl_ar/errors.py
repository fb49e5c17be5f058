"""Every error the library raises on purpose.

Contract: each is a `MnnvlArError`; each can be pickled (an engine hands errors from worker to server); each `str` is
one paragraph that names the rank and says what to do next.
"""

from __future__ import annotations

from typing import Any


class MnnvlArError(RuntimeError):
    """Base of all errors of this library."""


class BringUpError(MnnvlArError):
    """A workspace could not be made. Raised with the same four attributes on every rank that survives.

    rank:   rank *in the group* that failed first, -1 if that cannot be known.
    step:   name of the bring-up step that it failed in.
    cause:  what went wrong there.
    advice: what an operator can do about it.
    """

    def __init__(self, rank: int, step: str, cause: str, advice: str = "") -> None:
        self.rank, self.step, self.cause, self.advice = rank, step, cause, advice
        who = f"rank {rank}" if rank >= 0 else "an unknown rank"
        text = f"symmetric memory bring-up failed on {who} at step '{step}': {cause.rstrip('.')}."
        super().__init__(f"{text} {advice}".rstrip())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.rank, self.step, self.cause, self.advice)


class WorkspaceBroken(MnnvlArError):
    """The workspace can no longer be used: an earlier call on it failed, here or on a peer.

    rank:      this rank, in the group.
    peer:      the rank at fault: that did not come, or made another call. May be `rank` itself; -1 if it is not known.
    call_number: of the call that failed, from 0, on the rank that found out; -1 before the first.
    call:      what that rank called, as text.
    peer_call: what `peer` called: its other call, or the newest it is known to have begun.
    waited:    seconds that the rank which found out had waited.
    """

    def __init__(
        self,
        message: str,
        rank: int = -1,
        peer: int = -1,
        call_number: int = -1,
        call: str = "",
        peer_call: str = "",
        waited: float = 0.0,
    ) -> None:
        self.rank, self.peer, self.call_number = rank, peer, call_number
        self.call, self.peer_call, self.waited = call, peer_call, waited
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        known = (str(self), self.rank, self.peer, self.call_number, self.call, self.peer_call, self.waited)
        return type(self), known


class PeerTimeout(WorkspaceBroken):
    """A peer did not send its share within the deadline. What to do, and where in the source it is found:
    docs/operations.md."""


class PeerGone(PeerTimeout):
    """A peer's process has died; or it has left (closed, put to sleep, recovers, ended its process), and this rank made
    a call that it will not make."""


class CallMismatch(WorkspaceBroken):
    """A peer made another call (op, shape, dtype or strategy) than this rank did."""


class RanksDiffer(MnnvlArError):
    """With `MNNVL_AR_CHECK=1`: what must be the same bits on all ranks is not. The workspace is as it was.

    rank:      this rank, in the group.
    argument:  "weight", "residual", a scale, or an output, by its name in the op that writes into tensors ("norm_out").
    peers:     the ranks that have other bits than most. All ranks, where no bits are those of more than half: of two
               ranks, either may be the odd one.
    checksums: of each rank, by rank.
    call:      the call, as text.
    """

    def __init__(self, rank: int, argument: str, peers: list[int], checksums: list[int], call: str) -> None:
        self.rank, self.argument, self.peers, self.checksums, self.call = rank, argument, peers, checksums, call
        names = f"rank{'s' if len(peers) > 1 else ''} {', '.join(map(str, peers))}"
        where = f"{names} and not on the others" if len(peers) < len(checksums) else f"{names}: no majority has one"
        sums = "; ".join(f"rank {each}: {value:016x}" for each, value in enumerate(checksums))
        text = (
            f"{argument} differs between ranks in {call}, by MNNVL_AR_CHECK: other bits on {where}. Checksums: {sums}. "
        )
        advice = (
            "Inputs were the same: something else has written to an output, or that GPU or its memory is at fault."
            if argument.endswith("out")
            else "Look at how that rank loaded or computed it, and whether all ranks are in the same layer and batch."
        )
        super().__init__(text + advice)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.rank, self.argument, self.peers, self.checksums, self.call)
