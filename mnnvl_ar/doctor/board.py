"""What ranks tell each other: one note of each kind and rank, in the store that torchrun, or rank 0, keeps.

A note can be read without its writer's help, so a rank that dies or hangs costs the others only its own note; a
collective would cost them all of it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

_TICK = 0.05


class Board:
    """Any call may block for long if the host of the store stands still: not for a thread that must go on."""

    def __init__(self, rank: int, timeout: float) -> None:
        """Connects; rank 0 opens the store if there is no agent of torchrun that has. `ConnectionError` says where to,
        and why not, after `timeout` seconds or, as PyTorch tries again, a little more than twice as many."""
        address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        if not address or not port.isdigit():
            raise ConnectionError(f"MASTER_ADDR is {address!r} and MASTER_PORT is {port!r}; start with torchrun")
        opens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        limit = timedelta(seconds=timeout)
        try:
            tcp = TCPStore(address, int(port), None, opens, limit, wait_for_workers=False, multi_tenant=True)
        except (RuntimeError, ValueError) as error:
            why = str(error).split("\n")[0]
            verb = "open" if opens else "reach"
            raise ConnectionError(
                f"cannot {verb} the store at MASTER_ADDR:MASTER_PORT {address}:{port}: {why}"
            ) from error
        self.store = PrefixStore("mnnvl_ar-doctor", tcp)

    def another_store(self) -> Store:
        """Of a connection of its own: a wait in one locks it for all threads."""
        return self.store.clone()  # type: ignore[attr-defined,no-any-return]

    def tell(self, kind: str, rank: int, note: Any) -> None:
        self.store.set(f"{kind}/{rank}", json.dumps(note))

    def hear(
        self, kind: str, ranks: Iterable[int], into: dict[int, Any], until: float, stop: Callable[[], bool]
    ) -> None:
        """Puts the notes of `ranks` into `into` as they come; ends when all are there, at `until` (monotonic seconds),
        or when `stop()`. What was there by then is in: the last look is after the end was seen."""
        left, ended = [rank for rank in ranks if rank not in into], False
        while left and not ended:
            ended = stop() or time.monotonic() >= until
            here = [rank for rank in left if self.store.check([f"{kind}/{rank}"])]
            for rank in here:
                into[rank] = json.loads(self.store.get(f"{kind}/{rank}"))
                left.remove(rank)
            if not here and not ended:
                time.sleep(_TICK)
