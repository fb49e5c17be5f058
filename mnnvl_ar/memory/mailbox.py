"""The store that a process group was made with, as the place where its ranks leave a note for each other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ..errors import BringUpError

STEP = "rendezvous"
_T = TypeVar("_T")


class Mailbox:
    """The group's store, each access bounded: a store whose host is stopped would block for ever inside C++."""

    def __init__(self, group: dist.ProcessGroup, deadline: float) -> None:
        self._store, self._deadline = _store_of(group), deadline

    def put(self, key: str, value: str) -> None:
        self._bounded(lambda: self._store.set(key, value))

    def get(self, key: str) -> str | None:
        return self._bounded(lambda: self._store.get(key).decode() if self._store.check([key]) else None)

    def _bounded(self, call: Callable[[], _T]) -> _T:
        box: list[Any] = []

        def run() -> None:
            try:
                box.append((call(), None))
            except Exception as error:
                box.append((None, error))

        thread = threading.Thread(target=run, daemon=True, name="mnnvl_ar-store")
        thread.start()
        thread.join(max(self._deadline - time.monotonic(), 0.0))
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
