"""All that bring-up needs of a group: a rank, a size, and a way for rank 0 to make known where it can be reached.

`GroupStore` has them from a `torch.distributed` process group, through the store that the group was made with. No
collective runs on the group, so it may be gloo, NCCL or anything else, a subgroup of whatever, with a communicator not
even initialised; and nothing of what other users of the group do can be put out of step (pytorch#196082). Another way
for ranks to find each other would have the same attributes and methods, and belongs here.
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

STEP = "rendezvous"
KEY = "mnnvl_ar/address"  # in the store
_T = TypeVar("_T")


@dataclass(frozen=True)
class Address:
    """Where rank 0 listens.

    name:  of this listener, random; on rank 0's host, of its abstract unix socket, too.
    token: proves that whoever shows it has read this.
    host:  `hosts.identity` of rank 0.
    tcp:   (address, port), likeliest first, for ranks of other hosts; empty until one of them asks.
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


class GroupStore:
    """A process group's rank, size and store. Each access to the store is bounded by `deadline` (time.monotonic): one
    whose host is stopped would block for ever inside C++. Raises `BringUpError`, here alone, if it fails."""

    def __init__(self, group: dist.ProcessGroup, deadline: float) -> None:
        self.rank, self.size = group.rank(), group.size()
        self.deadline, self._group = deadline, group

    def publish(self, address: Address) -> None:
        """On rank 0: over whatever was published before, by an earlier bring-up, too."""
        self._set(KEY, json.dumps(asdict(address)))

    def find(self) -> Address | None:
        """What rank 0 published last, if anything; perhaps in an earlier bring-up, and then nobody listens there."""
        text = self._get(KEY)
        return Address(**json.loads(text)) if text else None

    def ask_for_tcp(self, address: Address) -> None:
        """On a rank of another host: that rank 0 listens on TCP, too, and publishes that."""
        self._set(f"{KEY}/tcp", address.name)

    def asked_for_tcp(self, address: Address) -> bool:
        """On rank 0."""
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
        thread.join(max(self.deadline - time.monotonic(), 0.0))
        advice = "The process that hosts it (torchrun's agent, or the first rank) is gone, stopped or out of reach."
        if not box:
            raise BringUpError(-1, STEP, "the process group's store does not answer", advice)
        value, error = box[0]
        if error is not None:
            raise BringUpError(-1, STEP, f"the process group's store failed: {error}", advice) from error
        return value  # type: ignore[no-any-return]


def _store_of(group: dist.ProcessGroup) -> Any:
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
