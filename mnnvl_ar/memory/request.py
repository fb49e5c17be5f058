"""What a rank asks of a bring-up. All ranks must ask alike."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .block import Fill

PROBE_BYTES = 16  # of the probe area, for each rank
_TRANSPORTS = {"cpu": ("auto", "host"), "cuda": ("auto", "unicast", "multicast")}


@dataclass(frozen=True)
class Need:
    """What a rank finds out that it needs, see `symmetric.allocate`. `alike`: its caller's own, by name."""

    nbytes: int
    fills: tuple[Fill, ...]
    probe_offset: int
    alike: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """`purpose` is "allocate" or "restore"; `index`, of the device, is the one field that may differ between ranks.
    `caller` is the caller's own, by name: what it will use the memory for must be alike, too. `retry` of one rank is
    that of all."""

    purpose: str
    nbytes: int
    fills: tuple[Fill, ...]
    probe_offset: int
    device: str
    index: int
    transport: str
    caller: Mapping[str, str] = field(default_factory=dict)
    retry: bool = False

    def check(self, world_size: int) -> None:
        """Raises `ValueError` naming argument, got and wanted."""
        if self.device not in _TRANSPORTS:
            raise ValueError(f"device: got '{self.device}', wanted 'cpu' or 'cuda'")
        if self.transport not in _TRANSPORTS[self.device]:
            wanted = ", ".join(_TRANSPORTS[self.device])
            raise ValueError(f"transport: got '{self.transport}' for device {self.device}, wanted one of {wanted}")
        if self.nbytes <= 0:
            raise ValueError(f"nbytes: got {self.nbytes}, wanted more than 0")
        end = self.nbytes - world_size * PROBE_BYTES
        if not 0 <= self.probe_offset <= end or self.probe_offset % PROBE_BYTES:
            wanted = f"a multiple of {PROBE_BYTES} from 0 to {end}"
            raise ValueError(f"probe_offset: got {self.probe_offset}, wanted {wanted}")
        for fill in self.fills:
            inside = fill.offset >= 0 and fill.nbytes > 0 and fill.offset + fill.nbytes <= self.nbytes
            if not inside or fill.offset % 4 or fill.nbytes % 4 or not 0 <= fill.word < 1 << 32:
                raise ValueError(f"fills: got {fill}, wanted whole 32-bit words inside {self.nbytes} bytes")

    def alike(self) -> dict[str, Any]:
        """What must be equal on all ranks."""
        return {
            "purpose": self.purpose,
            **self.caller,  # before the sizes that follow from it
            "nbytes": self.nbytes,
            "fills": f"{len(self.fills)} fills, digest {zlib.crc32(repr(self.fills).encode()):08x}",
            "probe_offset": self.probe_offset,
            "device": self.device,
            "transport": self.transport,
        }
