"""The vote after every step: each rank says how it went there, one rank decides, and all ranks get the same verdict.

One place decides (the coordinator, group rank 0; the others are participants), so ranks cannot come to different
conclusions from messages that raced a deadline. The coordinator names a rank that died (its connection ends, seen at
once), that is silent (the deadline), or that failed (its message says so). If the coordinator itself dies or is silent,
all others name rank 0. It decides a little before the others stop waiting.

Only this is beyond reach: if rank 0 dies while it sends a verdict, some ranks have it and fail one step later.
"""

from __future__ import annotations

import contextlib
import selectors
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .connection import Connection, ConnectionClosed, DescriptorsLost, Message, close_all
from .failures import Failure, failure_of, lost, silent
from .verbs import LOST, Token

_SEND_SECONDS = 2.0  # longer than any live peer needs to take one small message


@dataclass
class Outcome:
    """How a step went here: a failure, or what this rank sends to all others (JSON-able data, descriptors)."""

    failure: Failure | None = None
    data: Any = None
    fds: list[int] = field(default_factory=list)


@dataclass
class Verdict:
    """How a step went everywhere. Without failure: every rank's data and descriptors, by group rank; ours to close.
    is_announced: rank 0 has told it to all, as far as this rank knows; it is not this rank's own conclusion from an
    answer that did not come.
    all_voted: every rank has been through with the step, whether it failed or not."""

    failure: Failure | None
    data: list[Any] = field(default_factory=list)
    fds: list[list[int]] = field(default_factory=list)
    is_announced: bool = False
    all_voted: bool = False


class Voter:
    """One rank's end of the votes of one bring-up. `deadline` (time.monotonic) bounds all of them together. `host`:
    equal to rank 0's exactly if descriptors can be passed to it. `contested`: as `Place.contested`."""

    def __init__(self, rank: int, world_size: int, timeout: float, deadline: float, host: str) -> None:
        self.rank, self.world_size, self.timeout, self.deadline, self.host = rank, world_size, timeout, deadline, host
        self.last_words: dict[int, Message] = {}  # of ranks that left in place of a vote (`lifeline.py`)
        self.contested: Callable[[], str] = str

    def vote(self, step: str, outcome: Outcome) -> Verdict:
        """Collective. Takes the outcome's descriptors over; those in the verdict belong to the caller."""
        raise NotImplementedError

    def hand_over(self) -> dict[int, Connection]:
        """The connections, by the rank at the other end: they are the caller's, and stay open. No vote comes after."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class Participant(Voter):
    """Every rank but 0."""

    def __init__(
        self, connection: Connection, rank: int, world_size: int, timeout: float, deadline: float, *, host: str
    ) -> None:
        super().__init__(rank, world_size, timeout, deadline, host)
        self._connection, self._is_ours = connection, True

    def vote(self, step: str, outcome: Outcome) -> Verdict:
        late = time.monotonic() > self.deadline  # then the others stopped waiting for us, whatever we find now
        try:
            message = {"step": step, "failure": _plain(outcome.failure), "data": outcome.data}
            self._connection.send(message, time.monotonic() + _SEND_SECONDS, outcome.fds)
        except (ConnectionClosed, TimeoutError):
            pass  # the verdict that ended it may lie in our buffer
        except OSError as error:
            return Verdict(failure_of(error, self.rank, step, ""))
        finally:
            close_all(outcome.fds)
        try:
            message, fds = self._connection.receive(self.deadline)
        except TimeoutError:
            return Verdict(silent([self.rank if late else 0], step, self.timeout))
        except ConnectionClosed:
            return Verdict(silent([self.rank], step, self.timeout) if late else lost(0, step))
        except DescriptorsLost as error:  # the others have all; the next vote tells them that we have not
            message, fds = error.message, []
        except OSError as error:
            return Verdict(failure_of(error, self.rank, step, ""))
        if "failure" not in message:
            self.last_words[0] = message
            return Verdict(lost(0, step))
        if message["failure"]:
            return Verdict(Failure(**message["failure"]), is_announced=True, all_voted=message.get("all_voted", False))
        if len(fds) != sum(message["fds"]):
            close_all(fds)
            return Verdict(None, message["data"], [[LOST] * count for count in message["fds"]], all_voted=True)
        left = iter(fds)
        by_rank = [[next(left) for _ in range(count)] for count in message["fds"]]
        return Verdict(None, message["data"], by_rank, all_voted=True)

    def hand_over(self) -> dict[int, Connection]:
        self._is_ours = False
        return {0: self._connection}

    def close(self) -> None:
        if self._is_ours:
            self._connection.close()


class Coordinator(Voter):
    """Rank 0: gathers all outcomes, decides, sends the verdict. The others wait for `margin` seconds longer."""

    def __init__(
        self,
        peers: Mapping[int, Connection],
        world_size: int,
        timeout: float,
        deadline: float,
        margin: float = 0.0,
        *,
        host: str,
    ) -> None:
        """`peers[r]` is connected to rank r."""
        super().__init__(0, world_size, timeout, deadline, host)
        self._margin = margin
        self._peers = dict(peers)
        self._cut: dict[int, str] = {}  # ranks that the last verdict could not be sent to, and why

    def vote(self, step: str, outcome: Outcome) -> Verdict:
        outcomes: dict[int, Outcome] = {0: outcome}
        try:
            return self._vote(step, outcomes)
        except BaseException:
            for received in outcomes.values():
                close_all(received.fds)
            raise

    def _vote(self, step: str, outcomes: dict[int, Outcome]) -> Verdict:
        failure = self._gather(step, outcomes)
        ranks = range(self.world_size)
        if failure is None:
            failures = [f for r in ranks if (f := outcomes[r].failure) is not None]
            failure = min(failures, key=lambda f: (not f.fatal, f.rank)) if failures else None
        if failure is not None:
            verdict = Verdict(failure, all_voted=len(outcomes) == self.world_size)
        else:
            verdict = Verdict(None, [outcomes[r].data for r in ranks], [outcomes[r].fds for r in ranks], all_voted=True)
        self._announce(verdict)
        verdict.is_announced = not self._cut and time.monotonic() < self.deadline  # else some have left before
        if failure is not None:
            for received in outcomes.values():
                close_all(received.fds)
        return verdict

    def hand_over(self) -> dict[int, Connection]:
        peers, self._peers = self._peers, {}
        return peers

    def close(self) -> None:
        for connection in self._peers.values():
            connection.close()

    def _gather(self, step: str, outcomes: dict[int, Outcome]) -> Failure | None:
        """Fills `outcomes`; ends early, with a fatal failure, when there is nothing more to wait for."""
        own = outcomes[0].failure
        if own is not None and own.fatal:
            return own
        if self._peers and time.monotonic() > self.deadline + self._margin:
            return silent([0], step, self.timeout)  # we were too late; so the others say, who have left
        for rank, why in self._cut.items():
            return lost(rank, step, why)
        with selectors.PollSelector() as selector:
            for rank, connection in self._peers.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while len(outcomes) < self.world_size:
                left = self.deadline - time.monotonic()
                ready = selector.select(min(max(left, 0), 1e6))
                if not ready and left <= 0:
                    return silent([r for r in range(self.world_size) if r not in outcomes], step, self.timeout)
                for key, _ in ready:
                    failure = self._receive(step, key.data, outcomes)
                    if failure is not None and failure.fatal:
                        return failure
        return None

    def _receive(self, step: str, rank: int, outcomes: dict[int, Outcome]) -> Failure | None:
        try:
            got = self._peers[rank].poll()
        except ConnectionClosed:
            return lost(rank, step)
        except OSError as error:
            cause = f"cannot receive from rank {rank}: {error}"
            return replace(failure_of(error, 0, step, ""), cause=cause, fatal=True)
        if got is None:
            return None
        message, fds = got
        if "failure" not in message:
            self.last_words[rank] = message
            return lost(rank, step)
        failure = Failure(**message["failure"]) if message["failure"] else None
        outcomes[rank] = Outcome(failure, message["data"], fds)
        if message["step"] != step:  # cannot happen unless the ranks run different versions
            return Failure(rank, step, f"rank {rank} is at step '{message['step']}' while rank 0 is at '{step}'")
        return failure

    def _announce(self, verdict: Verdict) -> None:
        message: Message = {"failure": _plain(verdict.failure), "data": verdict.data, "all_voted": verdict.all_voted}
        message["fds"] = [len(fds) for fds in verdict.fds]
        everything = [fd for fds in verdict.fds for fd in fds]
        for rank, connection in self._peers.items():
            try:
                connection.send(message, time.monotonic() + _SEND_SECONDS, everything)
            except OSError as error:
                connection.close()  # so that it finds out at once, too
                self._cut[rank] = str(error)


@dataclass
class Hooks:
    """For tests only. `enter` is called before each step; without `voting` a step that only votes does not vote."""

    enter: Callable[[str], None] | None = None
    voting: bool = True


hooks = Hooks()


class StepFailed(Exception):
    """A vote failed: on every rank, with an equal `failure`. Its __cause__ is set on the rank that it happened on.
    is_announced, all_voted: as in `Verdict`."""

    def __init__(self, failure: Failure, is_announced: bool = False, all_voted: bool = False) -> None:
        super().__init__(failure.cause)
        self.failure, self.is_announced, self.all_voted = failure, is_announced, all_voted


class Steps:
    """Runs steps: each is done here, then voted on everywhere."""

    def __init__(self, voter: Voter) -> None:
        self.voter = voter
        self.kind = ""  # the handle kind in use, for the advice

    def run(self, step: str, body: Callable[[], Outcome | None], needs_peers: bool = False) -> Verdict:
        """`needs_peers`: the caller uses what the peers sent. Raises `StepFailed` alike on all ranks."""
        rank = self.voter.rank
        trouble: Exception | None = None
        outcome = Outcome()
        try:
            if hooks.enter is not None:
                hooks.enter(step)
            outcome = body() or outcome
        except Exception as error:
            trouble = error
            outcome = Outcome(failure_of(error, rank, step, self.kind))
        voting = hooks.voting or needs_peers
        verdict = self.voter.vote(step, outcome) if voting else Verdict(outcome.failure)
        if verdict.failure is not None:
            cause = trouble if verdict.failure.rank == rank else None
            raise StepFailed(verdict.failure, verdict.is_announced, verdict.all_voted) from cause
        return verdict

    @contextlib.contextmanager
    def exchange(self, step: str, export: Callable[[], Token | None]) -> Iterator[list[Token | None]]:
        """Every rank's token (None where a rank has none to give), at every rank. Descriptors live until the end of
        `with`."""

        def body() -> Outcome:
            token = export()
            if isinstance(token, int):
                return Outcome(fds=[token])
            return Outcome(data=None if token is None else token.hex())

        verdict = self.run(step, body, needs_peers=True)
        try:
            pairs = zip(verdict.data, verdict.fds, strict=True)
            yield [fds[0] if fds else None if data is None else bytes.fromhex(data) for data, fds in pairs]
        finally:
            for fds in verdict.fds:
                close_all([fd for fd in fds if fd != LOST])


def _plain(failure: Failure | None) -> dict[str, Any] | None:
    return asdict(failure) if failure else None
