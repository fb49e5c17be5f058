"""One step of a bring-up: do it here, vote on it everywhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..errors import BringUpError
from .advice import advise
from .line import close_all
from .refusals import lasts
from .verbs import DriverError, Token
from .vote import Ballot, Failure, Outcome, Verdict


@dataclass
class Hooks:
    """For tests only. `enter` is called before each step; without `voting` a step that only votes does not vote."""

    enter: Callable[[str], None] | None = None
    voting: bool = True


hooks = Hooks()


class StepFailed(Exception):
    """A vote failed: on every rank, with an equal `failure`. Its __cause__ is set on the rank that it happened on."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.cause)
        self.failure = failure

    def error(self, before: str = "") -> BringUpError:
        """What the user gets; `before` says which other ways failed earlier."""
        found = self.failure
        return BringUpError(found.rank, found.step, found.cause + before, found.advice)


class Steps:
    """Runs steps. A driver's or the system's error is a reason to try another way, any other exception is not."""

    def __init__(self, ballot: Ballot) -> None:
        self.ballot = ballot
        self.kind = ""  # the handle kind in use, for the advice

    def run(self, step: str, body: Callable[[], Outcome | None], needs_peers: bool = False) -> Verdict:
        """`needs_peers`: the caller uses what the peers told. Raises `StepFailed` alike on all ranks."""
        rank = self.ballot.rank
        trouble: Exception | None = None
        outcome = Outcome()
        try:
            if hooks.enter is not None:
                hooks.enter(step)
            outcome = body() or outcome
        except Exception as error:
            trouble = error
            soft = isinstance(error, (DriverError, OSError))
            cause = str(error) if soft else f"{type(error).__name__}: {error}"
            failure = Failure(rank, step, cause, advise(error, self.kind), fatal=not soft, lasting=lasts(error))
            outcome = Outcome(failure)
        voting = hooks.voting or needs_peers
        verdict = self.ballot.vote(step, outcome) if voting else Verdict(outcome.failure)
        if verdict.failure is not None:
            raise StepFailed(verdict.failure) from (trouble if verdict.failure.rank == rank else None)
        return verdict

    @contextlib.contextmanager
    def exchange(self, step: str, export: Callable[[], Token | None]) -> Iterator[list[Token | None]]:
        """Every rank's token (None where a rank has none to give), at every rank. Descriptors live until the end of
        `with`.
        """

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
                close_all(fds)
