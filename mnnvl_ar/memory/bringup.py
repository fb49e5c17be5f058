"""The way from a group to memory that every rank can write to, one voted step after another.

    prepare     all ranks have met and know what they need     exchange  every handle has reached every rank
    rendezvous  ... and ask for the same                       import    the peers' handles are opened
    probe       driver, device, granularity                    map       ... and mapped
    reserve     address space for all blocks                   write     a nonce into every peer's block, read back
    allocate    our physical memory, mapped                    verify    every peer's nonce is in ours; content restored
    fill        its initial content                            ready     what the memory is for is made

From `allocate` to `verify` is one attempt with one kind of handle. If it fails for a reason that another kind may not
have, all ranks give back what they took and try the next kind together. Multicast comes last, see `multicast.py`. What
the driver refuses is not tried again over the same group, see `failures.py`.
Content is in place before any peer can see the block (tvm#16797), and nothing uses a block before all are `ready`.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from . import hosts, multicast, processors
from .block import Block, Handshake, Undo
from .descriptors import require
from .failures import MULTICAST, Failure, Refusals
from .place import ONE_STORE
from .request import Request
from .verbs import multicast_refusal
from .vote import Outcome, StepFailed, Steps, Voter

# Of each rank's block, the address here; the multicast address, or 0. Returns how to undo it.
Use = Callable[[tuple[int, ...], int], Callable[[], object]]

_ACROSS_HOSTS = ("fabric",)  # the other handle kinds travel as file descriptors


class BringUp:
    """One bring-up (or restoration) of one `Block`. `prepare` says what this rank asks for; that it depends on the
    machine and may fail on one rank alone is why it is a step. `refused` is what this group was refused before, and is
    added to. `met` is called once all ranks have come, and use no memory of an earlier bring-up any more. After `run`,
    `request` is its answer, `transport` and `reason` say what was chosen, and `processors` on
    how many SMs calls may count (`processors.py`). in_use: this rank cannot restore its memory now, and goes on with
    what it has."""

    request: Request

    def __init__(
        self,
        block: Block,
        voter: Voter,
        prepare: Callable[[], Request],
        refused: Refusals,
        use: Use | None = None,
        met: Callable[[], object] | None = None,
    ) -> None:
        self._block, self._prepare, self._refused, self._use, self._met = block, prepare, refused, use, met
        self.in_use = block.is_exposed
        self._made = Undo()
        self._steps = Steps(voter)
        self._notes: list[str] = []
        self._members: list[dict[str, Any]] = []  # what each rank said of itself
        self.transport = self.reason = ""
        self.processors = 0  # that calls may count on

    def run(self) -> None:
        """Collective. On failure raises `BringUpError` alike on all ranks; what was taken is the block's to close."""
        try:
            self._steps.run("prepare", self._ask)
            if self._met is not None:
                self._met()
            self._rendezvous()
            kinds, alignment = self._probe()
            grain, span = self._consider_multicast(kinds)
            alignment = max(alignment, grain)
            if self.request.purpose == "allocate":
                stride = -(-self.request.nbytes // alignment) * alignment
                self._steps.run("reserve", lambda: self._block.reserve(stride, alignment))
            self._attempt_each(kinds)
            if span:
                self._multicast(span)
            self._block.is_exposed = self.transport == "multicast"
            self._steps.run("ready", self._ready)
        except BaseException as error:
            self._made.run()  # while the memory is still there, interrupted or not
            if not isinstance(error, StepFailed):
                raise
            self._heard_of(error)
            before = f" (before that: {'; '.join(self._notes)})" if self._notes else ""
            raise error.failure.error(before) from error.__cause__
        names = list(dict.fromkeys(hosts.name_of(member["host"]) for member in self._members))
        where = f"{len(self._members)} ranks on {len(names)} host{'s' if len(names) > 1 else ''}"
        most = max(member["device_processors"] for member in self._members)
        part = [f"{self.processors} of {most} SMs"] if self.processors < most else []
        self.reason = "; ".join([f"{self.transport} over {self._block.kind}, {where}", *part, *self._notes])

    def undo(self) -> None:
        """What `use` has made: for whoever fails behind `run`, while the memory is still there."""
        self._made.run()

    def _ask(self) -> None:
        self.request = self._prepare()
        self.transport = "host" if self.request.device.type == "cpu" else "unicast"

    def _ready(self) -> Outcome | None:
        if self._use is not None:
            self._made.push(self._use(self._block.pointers, self._block.multicast_pointer))
        voter = self._steps.voter
        why = voter.contested()  # last, so that as many as can be have come by then
        return Outcome(Failure(voter.rank, "ready", why, ONE_STORE)) if why else None

    def _rendezvous(self) -> None:
        """Every rank says who it is and what it asks for; then all that must be equal is."""
        request = self.request

        def body() -> Outcome:
            request.check(self._block.world_size)
            on_gpu = request.device.type == "cuda" and torch.cuda.is_available()
            if on_gpu and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("the current CUDA stream is capturing; make workspaces before a capture begins")
            about: dict[str, Any] = {
                "alike": request.compared(),
                "host": self._steps.voter.host,
                "refusal": multicast_refusal(),
            }
            about |= {"identity": hosts.identity(), "user": os.geteuid()}
            about |= {"refused": self._refused.plain()}
            return Outcome(data=about | {"retry": request.retry, "salt": secrets.token_hex(8)})

        self._members = self._steps.run("rendezvous", body, needs_peers=True).data
        first = self._members[0]["alike"]
        for rank, member in enumerate(self._members):
            for name in {**first, **member["alike"]}:
                value, wanted = member["alike"].get(name), first.get(name)
                if value != wanted:
                    cause = f"{name} differs: rank {rank} has {value!r}, rank 0 has {wanted!r}"
                    advice = "All ranks of a group must make the same workspaces in the same order."
                    raise _agreed(rank, "rendezvous", cause, advice)
        retry = any(member["retry"] for member in self._members)
        self._refused.agree([] if retry else [member["refused"] for member in self._members])

    def _probe(self) -> tuple[list[str], int]:
        """The handle kinds worth an attempt, and the alignment that suits all ranks and all kinds."""
        driver = self._block.driver

        def body() -> Outcome:
            traits = driver.open(self.request.device.index or 0)
            if self.request.purpose == "allocate":
                self._block.opened()
            return Outcome(data={"grain": max(map(driver.granularity, driver.kinds)), **asdict(traits)})

        for member, traits in zip(self._members, self._steps.run("probe", body, needs_peers=True).data, strict=True):
            member.update(traits)
        self.processors = processors.agreed(self._members)
        kinds = list(driver.kinds)
        away = [r for r, m in enumerate(self._members) if m["host"] != self._members[0]["host"]]
        if away:
            kinds = [kind for kind in kinds if kind in _ACROSS_HOSTS]
            note = _apart(self._members[0], self._members[away[0]], away[0])
            if not kinds:
                raise _agreed(away[0], "probe", note, "The host transport joins processes of one host only.")
            self._notes.append(note)
        return kinds, max(member["grain"] for member in self._members)

    def _consider_multicast(self, kinds: Sequence[str]) -> tuple[int, int]:
        """What multicast needs memory and its objects to be multiples of; zeros if it is not to be tried."""
        if self.request.transport not in ("auto", "multicast") or self.request.device.type == "cpu":
            return 0, 0
        rank, why = multicast.obstacle(self._members)
        if why and self.request.transport == "multicast":
            raise _agreed(rank, "multicast probe", why, 'transport="auto" or "unicast" does without it.')
        if why:
            self._notes.append(why)
            return 0, 0
        try:
            self._check_not_refused(MULTICAST)
            return multicast.granularity(self._steps, self._block, self.request.nbytes, kinds[-1])
        except StepFailed as failed:
            self._without_multicast(failed)
            return 0, 0

    def _attempt_each(self, kinds: Sequence[str]) -> None:
        for kind in kinds:
            try:
                self._check_not_refused(kind)
                return self._attempt(kind)
            except StepFailed as failed:
                self._refused.note(kind, failed.failure)
                if failed.failure.fatal or kind == kinds[-1]:
                    raise
                self._block.drop()
                self._note_without(kind, failed.failure)

    def _attempt(self, kind: str) -> None:
        block, steps = self._block, self._steps
        steps.kind = kind
        handshake = self._handshake(kind)
        steps.run("allocate", lambda: self._create(kind))
        steps.run("fill", lambda: block.fill(self.request.fills))
        with steps.exchange("exchange", lambda: block.driver.export(block.handle, kind)) as tokens:
            steps.run("import", lambda: block.import_peers(tokens))
        steps.run("map", block.map_peers)
        steps.run("write", handshake.write)
        steps.run("verify", handshake.verify)

    def _create(self, kind: str) -> None:
        if kind not in _ACROSS_HOSTS:  # ours and its copy to send; all ranks', as they come and as they are opened
            require(2 + 2 * self._block.world_size)
        self._block.create(kind)

    def _multicast(self, grain: int) -> None:
        handshake = self._handshake(MULTICAST)
        try:
            multicast.bring_up(self._steps, self._block, handshake, grain)
            self.transport = "multicast"
        except StepFailed as failed:
            self._without_multicast(failed)
            self._steps.run("multicast undo", handshake.restore)  # all had voted, so nobody writes nonces any more

    def _heard_of(self, failed: StepFailed) -> None:
        """Where all ranks have said how a step went that failed, none stores through a multicast any more. A rank that
        is late may."""
        if failed.all_voted and not self.in_use:
            self._block.is_exposed = False

    def _without_multicast(self, failed: StepFailed) -> None:
        """All ranks go on without it, or none does."""
        self._heard_of(failed)
        self._refused.note(MULTICAST, failed.failure)
        if failed.failure.fatal or self._block.is_exposed or self.request.transport == "multicast":
            raise failed
        self._block.drop_multicast()
        self._note_without(MULTICAST, failed.failure)

    def _check_not_refused(self, way: str) -> None:
        failure = self._refused.recall(way)
        if failure is not None:
            raise StepFailed(failure)

    def _note_without(self, way: str, found: Failure) -> None:
        self._notes.append(f"not {way}, since rank {found.rank} failed at {found.step} ({found.cause})")

    def _handshake(self, way: str) -> Handshake:
        return Handshake(self._block, self.request, self._members[0]["salt"] + way)


def _apart(first: Mapping[str, Any], other: Mapping[str, Any], rank: int) -> str:
    """Why no file descriptors can be passed between rank 0 and `rank`."""
    if hosts.may_share_sockets(first["identity"], other["identity"]) and first["user"] != other["user"]:
        return f"no file descriptors to other users, and rank {rank} is user {other['user']}, rank 0 {first['user']}"
    return f"no file descriptors to other hosts, and rank {rank} is not on the host of rank 0"


def _agreed(rank: int, step: str, cause: str, advice: str) -> StepFailed:
    """A failure that every rank concludes alike from the same data, without another vote."""
    return StepFailed(Failure(rank, step, cause, advice))
