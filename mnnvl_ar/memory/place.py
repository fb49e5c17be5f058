"""How rank 0 makes known to the others where it listens: a meeting place, of a process group or of any other group.

`GroupStore` is the store that a process group was made with. No collective runs on the group, so it may be gloo, NCCL
or anything else, a subgroup of whatever, with a communicator not even initialised; and nothing of what other users of
the group do can be put out of step (pytorch#196082). `Gathered` is one all-gather over any other kind of group.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from ..errors import BringUpError
from . import hosts
from .failures import Failure
from .group import Members

STEP = "rendezvous"
KEY = "mnnvl_ar/address"  # in the store
_AT_LEAST = 0.3  # seconds for a look: one that begins at the deadline must not pass for a store that is gone
_T = TypeVar("_T")


@dataclass(frozen=True)
class Address:
    """Where rank 0 listens.

    name:  of this listener, random; on rank 0's host, of its abstract unix socket, too.
    token: proves that whoever shows it has read this.
    host:  `hosts.identity` of rank 0.
    tcp:   (address, port), likeliest first, for ranks of other hosts; in a store empty until one of them asks.
    """

    name: str
    token: str
    host: str
    tcp: list[tuple[str, int]]

    @property
    def unix(self) -> str:
        return f"\0mnnvl_ar-{self.name}"

    def from_host(self, host: str) -> list[tuple[int, Any]]:
        """Family and address of the sockets to try from `host`."""
        if host == self.host:
            return [(socket.AF_UNIX, self.unix)]
        return [(socket.AF_INET6 if ":" in at else socket.AF_INET, (at, port)) for at, port in self.tcp]


class Place:
    """Where the ranks of a group look for rank 0. deadline: of all of bring-up (time.monotonic).

    once: what rank 0 publishes is all that it ever can, so it has to have bound its TCP port by then, and publishes why
          it cannot listen if it cannot, since the others wait for it.
    """

    once = False

    def __init__(self, members: Members, timeout: float) -> None:
        self.rank, self.size = members.rank, members.size
        self.deadline = time.monotonic() + timeout

    def publish(self, address: Address) -> None:
        """On rank 0: over whatever was published before, by an earlier bring-up, too."""
        raise NotImplementedError

    def find(self) -> Address | None:
        """What rank 0 published last, if anything; perhaps in an earlier bring-up, and then nobody listens there."""
        raise NotImplementedError

    def ask_for_tcp(self, address: Address) -> None:
        """On a rank of another host: that rank 0 listens on TCP, too, and publishes that."""
        raise NotImplementedError

    def asked_for_tcp(self, address: Address) -> bool:
        """On rank 0."""
        raise NotImplementedError

    def give_up(self, failure: Failure) -> None:
        """On rank 0, which publishes no address."""


def place_of(members: Members, timeout: float) -> Place:
    kind = GroupStore if isinstance(members.group, dist.ProcessGroup) else Gathered
    return kind(members, timeout)


class GroupStore(Place):
    """A process group's store. Each access is bounded by `deadline`, or a moment: one whose host is stopped would block
    for ever inside C++. Raises `BringUpError`, here alone, if it fails."""

    def __init__(self, members: Members, timeout: float) -> None:
        super().__init__(members, timeout)
        self._group = members.group

    def publish(self, address: Address) -> None:
        self._set(KEY, json.dumps(asdict(address)))

    def find(self) -> Address | None:
        text = self._get(KEY)
        return Address(**json.loads(text)) if text else None

    def ask_for_tcp(self, address: Address) -> None:
        self._set(f"{KEY}/tcp", address.name)

    def asked_for_tcp(self, address: Address) -> bool:
        return self._get(f"{KEY}/tcp") == address.name

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
        thread.start()
        thread.join(max(self.deadline - time.monotonic(), _AT_LEAST))
        advice = "The process that hosts it (torchrun's agent, or the first rank) is gone, stopped or out of reach."
        if not box:
            raise BringUpError(-1, STEP, "the process group's store does not answer", advice)
        value, error = box[0]
        if error is not None:
            raise BringUpError(-1, STEP, f"the process group's store failed: {error}", advice) from error
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
        self._gather(failure=asdict(failure))

    def find(self) -> Address | None:
        return self._address or self._gather()

    def asked_for_tcp(self, address: Address) -> bool:
        return self._several_hosts

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
        if "failure" in all_told[0]:
            raise Failure(**all_told[0]["failure"]).error()
        self._address = Address(**all_told[0]["address"])
        return self._address
