"""One vote on its own, for what comes before or after a bring-up and must go the same way on all ranks."""

from __future__ import annotations

import contextlib
from typing import Any

from .group import AnyGroup, Members
from .rendezvous import meet
from .vote import Outcome, StepFailed, Steps


def agree(
    group: AnyGroup, told: Any = None, *, step: str, trouble: Exception | None = None, timeout: float = 60.0
) -> list[Any]:
    """What every rank of `group` told, by rank, at every rank. Collective.

    told:    what JSON can hold
    step:    what is voted on, for messages
    trouble: what went wrong here, instead of `told`: then all ranks raise

    Raises `BringUpError`, alike on every surviving rank, naming the rank that is in trouble or did not come within
    `timeout` seconds.
    """
    members = Members(group)

    def body() -> Outcome:
        if trouble is not None:
            raise trouble
        return Outcome(data=told)

    with members.alone(), contextlib.closing(meet(members, timeout)) as voter:
        try:
            return Steps(voter).run(step, body, needs_peers=True).data
        except StepFailed as failed:
            raise failed.failure.error() from failed.__cause__
