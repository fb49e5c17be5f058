"""The vote after every step: each rank says how it went, one rank (group rank 0, the hub) decides, all hear the same.

One place decides, so ranks cannot come to different conclusions from messages that raced a deadline. The hub names a
rank that died (its connection ends, seen at once), that is silent (the deadline), or that failed (it said so). If the
hub itself dies or is silent, all others name rank 0. The hub decides a little before the others stop listening.

Only this is beyond reach: if rank 0 dies while it tells a verdict, some ranks have heard it and fail one step later.
"""

from __future__ import annotations

import selectors
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .line import Line, LineClosed, Message, close_all

_DIED = "its process died or gave up: its connection closed"
_SEND_SECONDS = 2.0  # longer than any live peer needs to take one small message


@dataclass(frozen=True)
class Failure:
    """What a vote agrees on when it fails. `fatal`: there is no use in trying another way. `lasting`: nor in trying
    this one again, see `refusals.py`."""

    rank: int
    step: str
    cause: str
    advice: str = ""
    fatal: bool = True
    lasting: bool = False


@dataclass
class Outcome:
    """How a step went here: a failure, or what this rank tells all others about it (JSON-able data, descriptors)."""

    failure: Failure | None = None
    data: Any = None
    fds: list[int] = field(default_factory=list)


@dataclass
class Verdict:
    """How a step went everywhere. Without failure: every rank's data and descriptors, by group rank; ours to close."""

    failure: Failure | None
    data: list[Any] = field(default_factory=list)
    fds: list[list[int]] = field(default_factory=list)


class Ballot:
    """One rank's end of the votes of one bring-up. `deadline` (time.monotonic) bounds all of them together."""

    def __init__(self, rank: int, world_size: int, timeout: float, deadline: float) -> None:
        self.rank, self.world_size, self.timeout, self.deadline = rank, world_size, timeout, deadline

    def vote(self, step: str, outcome: Outcome) -> Verdict:
        """Collective. Takes the outcome's descriptors over; those in the verdict belong to the caller."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class Spoke(Ballot):
    """Every rank but 0."""

    def __init__(self, line: Line, rank: int, world_size: int, timeout: float, deadline: float) -> None:
        super().__init__(rank, world_size, timeout, deadline)
        self._line = line

    def vote(self, step: str, outcome: Outcome) -> Verdict:
        late = time.monotonic() > self.deadline  # then the others stopped waiting for us, whatever we find now
        try:
            self._line.send(_pack(step, outcome), time.monotonic() + _SEND_SECONDS, outcome.fds)
        except (LineClosed, TimeoutError):
            pass  # the verdict that ended it may lie in our buffer
        except OSError as error:
            return Verdict(Failure(self.rank, step, f"cannot send to rank 0: {error}"))
        finally:
            close_all(outcome.fds)
        try:
            message, fds = self._line.receive(self.deadline)
        except TimeoutError:
            return Verdict(silent([self.rank if late else 0], step, self.timeout))
        except LineClosed:
            return Verdict(silent([self.rank], step, self.timeout) if late else lost(0, step))
        except OSError as error:
            return Verdict(Failure(self.rank, step, f"cannot receive from rank 0: {error}"))
        return _unpack_verdict(message, fds)

    def close(self) -> None:
        self._line.close()


class Hub(Ballot):
    """Rank 0: gathers, decides, tells. `lines[r]` leads to rank r. The others listen for `margin` seconds longer."""

    def __init__(
        self, lines: Mapping[int, Line], world_size: int, timeout: float, deadline: float, margin: float = 0.0
    ) -> None:
        super().__init__(0, world_size, timeout, deadline)
        self._margin = margin
        self._lines = dict(lines)
        self._cut: dict[int, str] = {}  # ranks that could not be told the last verdict, and why

    def vote(self, step: str, outcome: Outcome) -> Verdict:
        votes: dict[int, Outcome] = {0: outcome}
        failure = self._gather(step, votes)
        ranks = range(self.world_size)
        if failure is None:
            failures = [f for r in ranks if (f := votes[r].failure) is not None]
            failure = min(failures, key=lambda f: (not f.fatal, f.rank)) if failures else None
        if failure is not None:
            verdict = Verdict(failure)
        else:
            verdict = Verdict(None, [votes[r].data for r in ranks], [votes[r].fds for r in ranks])
        self._tell(verdict)
        if failure is not None:
            for cast in votes.values():
                close_all(cast.fds)
        return verdict

    def close(self) -> None:
        for line in self._lines.values():
            line.close()

    def _gather(self, step: str, votes: dict[int, Outcome]) -> Failure | None:
        """Fills `votes`; ends early, with a fatal failure, when there is nothing more to wait for."""
        own = votes[0].failure
        if own is not None and own.fatal:
            return own
        if self._lines and time.monotonic() > self.deadline + self._margin:
            return silent([0], step, self.timeout)  # we were too late; so the others say, who have left
        for rank, why in self._cut.items():
            return Failure(rank, step, f"{_DIED} ({why})")
        with selectors.PollSelector() as selector:
            for rank, line in self._lines.items():
                selector.register(line, selectors.EVENT_READ, rank)
            while len(votes) < self.world_size:
                left = self.deadline - time.monotonic()
                ready = selector.select(max(left, 0))
                if not ready and left <= 0:
                    return silent([r for r in range(self.world_size) if r not in votes], step, self.timeout)
                for key, _ in ready:
                    failure = self._hear(step, key.data, votes)
                    if failure is not None and failure.fatal:
                        return failure
        return None

    def _hear(self, step: str, rank: int, votes: dict[int, Outcome]) -> Failure | None:
        try:
            got = self._lines[rank].poll()
        except LineClosed:
            return lost(rank, step)
        except OSError as error:
            return Failure(0, step, f"cannot receive from rank {rank}: {error}")
        if got is None:
            return None
        message, fds = got
        failure = Failure(**message["failure"]) if message["failure"] else None
        votes[rank] = Outcome(failure, message["data"], fds)
        if message["step"] != step:  # cannot happen unless the ranks run different versions
            return Failure(rank, step, f"rank {rank} is at step '{message['step']}' while rank 0 is at '{step}'")
        return failure

    def _tell(self, verdict: Verdict) -> None:
        message: Message = {"failure": asdict(verdict.failure) if verdict.failure else None, "data": verdict.data}
        message["fds"] = [len(fds) for fds in verdict.fds]
        everything = [fd for fds in verdict.fds for fd in fds]
        for rank, line in self._lines.items():
            try:
                line.send(message, time.monotonic() + _SEND_SECONDS, everything)
            except OSError as error:
                line.close()  # so that it finds out at once, too
                self._cut[rank] = str(error)


def silent(ranks: list[int], step: str, timeout: float) -> Failure:
    """The failure that names ranks which did not answer in time."""
    names = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    return Failure(
        min(ranks),
        step,
        f"no answer from {names} within the timeout of {timeout:g} s",
        "Look at what that process is doing (py-spy dump); if it is merely slow to start, give a longer timeout.",
    )


def lost(rank: int, step: str) -> Failure:
    return Failure(rank, step, _DIED, f"Look at the log of rank {rank}, and for an out-of-memory kill on its host.")


def _pack(step: str, outcome: Outcome) -> Message:
    return {"step": step, "failure": asdict(outcome.failure) if outcome.failure else None, "data": outcome.data}


def _unpack_verdict(message: Message, fds: list[int]) -> Verdict:
    if message["failure"]:
        return Verdict(Failure(**message["failure"]))
    left = iter(fds)
    return Verdict(None, message["data"], [[next(left) for _ in range(count)] for count in message["fds"]])
