"""How rank 0 makes known to the others where it listens: a meeting place, of a process group or of any other group.

`GroupStore` is the store that a process group was made with. No collective runs on the group, so it may be gloo, NCCL
or anything else, a subgroup of whatever, with a communicator not even initialised; and nothing of what other users of
the group do can be put out of step (pytorch#196082). `Gathered` is one all-gather over any other kind of group.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from ..errors import BringUpError
from . import hosts, process
from .descriptors import require
from .failures import Failure, failure_of
from .group import Members

STEP = "rendezvous"
KEY = "mnnvl_ar/address"  # in the store
_AT_LEAST = 0.3  # seconds for a look: one that begins at the deadline must not pass for a store that is gone
_AGAIN = 0.2  # seconds until what may have been written over is written again
_PAUSE = 0.02
_T = TypeVar("_T")


@dataclass(frozen=True)
class Address:
    """Where rank 0 listens.

    name:  of this listener, random; on rank 0's host, of its abstract unix socket, too.
    token: proves that whoever shows it has read this.
    host:  `hosts.identity` of rank 0.
    user:  whose process rank 0 is.
    tcp:   (address, port), likeliest first, for ranks of other hosts; in a store empty until one of them asks.
    """

    name: str
    token: str
    host: str
    user: int
    tcp: list[tuple[str, int]]

    @property
    def unix(self) -> str:
        return f"\0mnnvl_ar-{self.name}"

    def from_host(self, host: str) -> list[tuple[int, Any]]:
        """Family and address of the sockets to try from `host`, best first."""
        near = [(int(socket.AF_UNIX), self.unix)] if hosts.may_share_sockets(host, self.host) else []
        return near + [(socket.AF_INET6 if ":" in at else socket.AF_INET, (at, port)) for at, port in self.tcp]

    def is_near(self, host: str) -> bool:
        """Whether a unix socket has to do from `host`: one that refuses us belongs to an earlier bring-up."""
        return host == self.host and host.split("/")[1] != "" and self.user == os.geteuid()


@dataclass(frozen=True)
class Note:
    """From a rank to rank 0's listener of that `name`, past any connection. trouble: why there is none, or not yet;
    `final` if there will be none."""

    name: str
    rank: int
    trouble: Failure | None = None
    final: bool = False


ONE_STORE = (
    "Two groups go by one store: give each its own, as torch.distributed.new_group does, or wrap it in a "
    "torch.distributed.PrefixStore. Or an earlier process of that rank still lives."
)


class GroupShared(Exception):
    """Another process, or another bring-up of this one, has the place of this one: two groups go by one store."""


class Place:
    """Where the ranks of a group look for rank 0. deadline: of all of bring-up (time.monotonic).

    once: what rank 0 publishes is all that it ever can, so it has to have bound its TCP port by then, and publishes why
          it cannot listen if it cannot, since the others wait for it.
    """

    once = False

    def __init__(self, members: Members, timeout: float) -> None:
        self.rank, self.size = members.rank, members.size
        self.deadline = time.monotonic() + timeout

    def come(self) -> None:
        """Once, before anything else. `GroupShared` if this rank's place is taken."""

    def leave(self) -> None:
        """At the end, if this rank came. Never raises."""

    def contested(self) -> str:
        """Which other process has wanted to be this rank since it came; empty if none has. Never raises."""
        return ""

    def publish(self, address: Address) -> None:
        """On rank 0: over whatever was published before, by an earlier bring-up, too."""
        raise NotImplementedError

    def find(self) -> Address | None:
        """What rank 0 published last, if anything; perhaps in an earlier bring-up, and then nobody listens there.
        Raises what rank 0 gave up for."""
        raise NotImplementedError

    def tell(self, note: Note) -> None:
        """On another rank. One from another host, which asks so that rank 0 listens on TCP, and publishes that."""
        raise NotImplementedError

    def told(self, address: Address) -> Note | None:
        """On rank 0: the newest note to this listener."""
        raise NotImplementedError

    def give_up(self, failure: Failure) -> None:
        """On a rank that cannot go on, before it has published or connected. All ranks are told, as long as there is
        time."""
        raise NotImplementedError

    def answer(self, failure: Failure, missing: Iterable[int], patient: bool, gone: Collection[int] = ()) -> None:
        """On rank 0, which has published: tells ranks that have not connected, as long as there is time. patient: those
        too that have yet to come. gone: ranks that are told should they come all the same."""


def place_of(members: Members, timeout: float) -> Place:
    kind = GroupStore if isinstance(members.group, dist.ProcessGroup) else Gathered
    return kind(members, timeout)


class GroupStore(Place):
    """A process group's store. Each access is bounded by `deadline`, or a moment: one whose host is stopped would block
    for ever inside C++. Raises `BringUpError`, here alone, if it fails.

    What an earlier bring-up has left in a store must not be taken for this one's. An address is tried. A failure names
    the attempts that it is for, and a rank writes down its attempt when it comes, with its process: another process
    that lives and is the same rank shows that two groups share the store, and so does another bring-up of this process
    that is under way, by whatever store object. Who finds its place taken cannot know which of the ranks that came
    before are of its own group, and neither can they: so it leaves a mark for the one that has the place, who looks for
    it once more before anything is used.
    """

    def __init__(self, members: Members, timeout: float) -> None:
        super().__init__(members, timeout)
        self._members, self._group = members, members.group
        self._attempt = secrets.token_hex(8)

    def come(self) -> None:
        """Writes down who is this rank. `GroupShared` if another process is, or another bring-up of this one."""
        key, mine = f"{KEY}/{self.rank}", {"attempt": self._attempt, "last": self._attempt, **process.this()}
        before, text = self._get(key) or "", json.dumps(mine)

        def take(store: Any) -> str:
            return str(store.compare_set(key, before, text).decode())

        self._members.begins(self._attempt)
        while True:
            other = json.loads(before) if before else {}
            if process.is_another(other) or self._members.is_of_another(other.get("last", "")):
                mark = {"attempt": other.get("last", ""), **process.this()}
                self._set(f"{KEY}/{self.rank}/contested", json.dumps(mark))
                raise GroupShared(f"rank {self.rank} of this group is already {process.name_of(other)}")
            found = self._bounded(take)
            if found == text:
                return
            before = found

    def leave(self) -> None:
        with contextlib.suppress(BringUpError):
            self._set(f"{KEY}/{self.rank}", json.dumps({"attempt": "", "last": self._attempt, **process.this()}))

    def contested(self) -> str:
        with contextlib.suppress(BringUpError):
            text = self._get(f"{KEY}/{self.rank}/contested")
            other = json.loads(text) if text else {"attempt": ""}
            if other["attempt"] == self._attempt:
                return f"{process.name_of(other)} wanted to be rank {self.rank} of this group, too"
        return ""

    def publish(self, address: Address) -> None:
        self._set(KEY, json.dumps(asdict(address)))

    def find(self) -> Address | None:
        text = self._get(KEY)
        found = json.loads(text) if text else None
        if found is None or "failure" not in found:
            return Address(**found) if found else None
        if self._attempt in found["attempts"]:
            raise Failure(**found["failure"]).error()
        return None

    def tell(self, note: Note) -> None:
        self._set(f"{KEY}/note", json.dumps(asdict(note)))

    def told(self, address: Address) -> Note | None:
        text = self._get(f"{KEY}/note")
        note: dict[str, Any] = json.loads(text) if text else {"name": ""}
        if note["name"] != address.name:
            return None
        return Note(**{**note, "trouble": note["trouble"] and Failure(**note["trouble"])})

    def give_up(self, failure: Failure) -> None:
        if self.rank == 0:
            return self.answer(failure, range(1, self.size), patient=True)
        told_at = 0.0
        while time.monotonic() < self.deadline:
            address = self.find()
            if address is not None and time.monotonic() > told_at + _AGAIN:
                self.tell(Note(address.name, self.rank, failure, final=True))
                told_at = time.monotonic()
            time.sleep(_PAUSE)

    def answer(self, failure: Failure, missing: Iterable[int], patient: bool, gone: Collection[int] = ()) -> None:
        waiting, attempts = set(missing).difference(gone), dict[int, str]()
        while True:
            news = False
            for rank in sorted(waiting.union(gone)):
                text = self._get(f"{KEY}/{rank}")
                attempt = json.loads(text)["attempt"] if text else ""
                if attempt and rank not in attempts:
                    news, attempts[rank] = True, attempt
                elif rank in attempts and attempt != attempts[rank]:  # it has heard, and left; or comes again by now
                    waiting.discard(rank)
            if news:
                self._set(KEY, json.dumps({"failure": asdict(failure), "attempts": list(attempts.values())}))
            if not (waiting if patient else waiting & attempts.keys()) or time.monotonic() > self.deadline:
                return
            time.sleep(_PAUSE)

    def _set(self, key: str, value: str) -> None:
        self._bounded(lambda store: store.set(key, value))

    def _get(self, key: str) -> str | None:
        return self._bounded(lambda store: store.get(key).decode() if store.check([key]) else None)

    def _bounded(self, call: Callable[[Any], _T]) -> _T:
        store = _store_of(self._group)
        box: list[Any] = []

        def run() -> None:
            try:
                box.append((call(store), None))
            except Exception as error:
                box.append((None, error))

        thread = threading.Thread(target=run, daemon=True, name="mnnvl_ar-store")
        try:
            thread.start()
        except RuntimeError as error:
            advice = "Look at `ulimit -u`, and at the container's limits of processes and memory."
            raise BringUpError(self.rank, STEP, f"cannot start a thread: {error}", advice) from error
        thread.join(max(self.deadline - time.monotonic(), _AT_LEAST))
        advice = "The process that hosts it (torchrun's agent, or the first rank) is gone, stopped or out of reach."
        waits = " Or another thread of this process waits for a key in it, which locks it for all."
        if not box:
            raise BringUpError(-1, STEP, "the process group's store does not answer", advice + waits)
        value, failed = box[0]
        if failed is not None:
            try:
                require(1)  # a FileStore opens its file for each access
            except OSError as scarce:
                raise failure_of(scarce, self.rank, STEP, "").error() from failed
            raise BringUpError(-1, STEP, f"the process group's store failed: {failed}", advice) from failed
        return value  # type: ignore[no-any-return]


def _store_of(group: Any) -> Any:
    try:
        return group.get_group_store()
    except (AttributeError, RuntimeError):
        pass
    try:  # older PyTorch
        return dist.distributed_c10d._world.pg_map[group][1]
    except (AttributeError, KeyError) as error:
        raise BringUpError(
            group.rank(), STEP, "this process group has no store", "Make it with torch.distributed.new_group."
        ) from error


class Gathered(Place):
    """One all-gather, in the calling thread: a communicator may be of that thread alone (MPI), or move tensors of its
    current device (NCCL). The time limit counts from its end, when all ranks are known to be there."""

    once = True

    def __init__(self, members: Members, timeout: float) -> None:
        super().__init__(members, timeout)
        self._members, self._timeout = members, timeout
        self._address: Address | None = None
        self._several_hosts = False

    def publish(self, address: Address) -> None:
        self._gather(address=asdict(address))

    def give_up(self, failure: Failure) -> None:
        if self._address is None:  # else all have gathered, and nobody will again: rank 0 says that we do not come
            self._gather(failure=asdict(failure))

    def tell(self, note: Note) -> None:
        pass  # rank 0 knows of other hosts by the all-gather

    def find(self) -> Address | None:
        return self._address or self._gather()

    def told(self, address: Address) -> Note | None:
        return Note(address.name, -1) if self._several_hosts else None

    def _gather(self, **told: Any) -> Address | None:
        """Rank 0's address; raises `BringUpError`, alike on all ranks if the group does what it should."""
        mine = {"rank": self.rank, "size": self.size, "host": hosts.identity(), **told}
        try:
            all_told = [json.loads(text) for text in self._members.all_gather(json.dumps(mine))]
            places = [(each["rank"], each["size"]) for each in all_told]
        except Exception as error:
            cause = f"the group's all-gather failed: {type(error).__name__}: {error}"
            raise BringUpError(-1, STEP, cause, "It is the group's own; look at what it is made of.") from error
        self.deadline = time.monotonic() + self._timeout
        if places != [(rank, self.size) for rank in range(self.size)]:
            cause = f"all-gather gave (rank, size) {places} on a group of {self.size}, wanted every rank, in order"
            raise BringUpError(-1, STEP, cause, "Every rank has to give the same group.")
        self._several_hosts = len({each["host"] for each in all_told}) > 1
        for each in all_told:
            if "failure" in each:
                raise Failure(**each["failure"]).error()
        self._address = Address(**all_told[0]["address"])
        return self._address
