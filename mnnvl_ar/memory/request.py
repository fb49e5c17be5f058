"""What a rank asks of a bring-up: one record, made once, of which every field but two must be equal on all ranks."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

PROBE_BYTES = 16  # of the probe area, for each rank
_TRANSPORTS = {"cpu": ("auto", "host"), "cuda": ("auto", "unicast", "multicast")}


@dataclass(frozen=True)
class Fill:
    """Initial content: the 32-bit `word`, repeated over `nbytes` bytes from `offset`. Both are multiples of 4."""

    offset: int
    nbytes: int
    word: int


def check_transport(transport: str, device: str) -> None:
    """Raises `ValueError`. device: its type."""
    if transport not in _TRANSPORTS[device]:
        wanted = ", ".join(_TRANSPORTS[device])
        raise ValueError(f"transport: got '{transport}' for device {device}, wanted one of {wanted}")


@dataclass(frozen=True)
class Request:
    """Memory of `nbytes` bytes on every rank of a group, each block mapped into all ranks.

    nbytes:       size of one block; what is mapped may be larger.
    fills:        initial content, in place before any other rank can see the block. What they leave out is unspecified.
    probe_offset: start (a multiple of 16) of world_size * 16 bytes that the proof of sharing may use; they end up as
                  the fills say, or 0.
    device:       "cpu" for the host transport, else this rank's CUDA device. Its index may differ between ranks;
                  without one it is the current device.
    transport:    "auto", "host" (cpu), "unicast" or "multicast" (CUDA). Only "auto" falls back to another.
    alike:        what else must be equal on all ranks, by name: what the memory is to be used for.
    retry:        try again what the driver refused this group before (a handle kind, multicast), which is remembered
                  otherwise. On one rank it is for all.
    purpose:      "allocate", or "restore" for new memory at the addresses of memory that was allocated.
    """

    nbytes: int
    fills: Sequence[Fill]
    probe_offset: int
    device: torch.device
    transport: str = "auto"
    alike: Mapping[str, str] = field(default_factory=dict)
    retry: bool = False
    purpose: str = "allocate"

    def check(self, world_size: int) -> None:
        """Raises `ValueError` naming argument, got and wanted."""
        device = self.device.type
        if device not in _TRANSPORTS:
            raise ValueError(f"device: got '{device}', wanted 'cpu' or 'cuda'")
        check_transport(self.transport, device)
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

    def compared(self) -> dict[str, Any]:
        """What must be equal on all ranks, by name, in the order in which it is compared."""
        return {
            "purpose": self.purpose,
            **self.alike,  # before the sizes that follow from it
            "nbytes": self.nbytes,
            "fills": f"{len(self.fills)} fills, digest {zlib.crc32(repr(tuple(self.fills)).encode()):08x}",
            "probe_offset": self.probe_offset,
            "device": self.device.type,
            "transport": self.transport,
        }
