"""What the nodes tell each other: notes in a store that the first node keeps. A note can be read without its writer's
help, so a node that dies costs the others only its own notes, and is named."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from bench.gb200.place import Place

TICK = 0.2
GONE = 60.0  # seconds without a sign of life from a node


class Gone(Exception):
    """A node does not answer; the text names it."""


class Crew:
    """The nodes of one run. `patience`: seconds in which all must have come."""

    def __init__(self, place: Place, patience: float) -> None:
        self.place, self.patience = place, patience
        self._beats: dict[int, tuple[int, float]] = {}
        self._beat = 0
        try:
            self._store = TCPStore(
                place.head, place.port, None, place.leads, timedelta(seconds=patience), wait_for_workers=False
            )
        except (RuntimeError, ValueError) as error:
            verb = "open" if place.leads else "reach"
            raise Gone(f"cannot {verb} {place.head}:{place.port}: {str(error).splitlines()[0]}") from error

    def tell(self, key: str, note: Any) -> None:
        with self._reached():
            self._store.set(key, json.dumps(note))

    def read(self, key: str) -> Any:
        """The note; None if there is none."""
        with self._reached():
            return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def append(self, key: str, note: Any) -> None:
        with self._reached():
            number = self._store.add(f"{key}/count", 1)
        self.tell(f"{key}/{number}", note)

    def listed(self, key: str) -> list[Any]:
        """What was appended, in the order in which it came."""
        with self._reached():
            count = self._store.add(f"{key}/count", 0)
        notes = [self.read(f"{key}/{number}") for number in range(1, count + 1)]
        return [note for note in notes if note is not None]  # one may be under way

    def wait_any(self, *keys: str) -> list[Any]:
        """The notes of these keys, as soon as there is one of them. Raises `Gone` if the first node is."""
        while True:
            found = [self.read(key) for key in keys]
            if any(note is not None for note in found):
                return found
            self.beat()
            time.sleep(TICK)

    def gather(self, key: str, since: float, until: float) -> tuple[dict[int, Any], list[int]]:
        """The notes `key`/node of all nodes; and the nodes that none came from, as they have given no sign of life for
        `GONE` seconds after `since`, or it is past `until`; both as time.monotonic has it."""
        found: dict[int, Any] = {}
        while True:
            missing = [node for node in range(self.place.nodes) if node not in found]
            for node in missing:
                if (note := self.read(f"{key}/{node}")) is not None:
                    found[node] = note
            missing = [node for node in missing if node not in found]
            if not missing or time.monotonic() > until or set(missing) == set(self.silent(missing, since)):
                return found, missing
            time.sleep(TICK)

    def beat(self) -> None:
        """A sign of life."""
        self._beat += 1
        self.tell(f"beat/{self.place.node}", self._beat)

    def silent(self, nodes: Iterable[int], since: float) -> list[int]:
        """Those of `nodes` that have given no sign of life for `GONE` seconds, by the clock of this node."""
        now, gone = time.monotonic(), []
        for node in nodes:
            if node == self.place.node:
                continue
            beat = self.read(f"beat/{node}") or 0
            last, when = self._beats.get(node, (0, since))
            if beat != last:
                self._beats[node] = (beat, now)
            elif now - max(when, since) > GONE:
                gone.append(node)
        return gone

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # of the store's connection
            raise Gone(f"node 0 at {self.place.head}:{self.place.port} does not answer any more") from error
