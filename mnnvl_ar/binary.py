"""Which GPUs a built library holds code for, read from its fat binaries."""

from __future__ import annotations

import struct
from pathlib import Path

_MAGIC = struct.pack("<I", 0xBA55ED50)  # of a fat binary: then u16 version, u16 header size, u64 size of its entries
_KINDS = {1: "compute", 2: "sm"}


def architectures(path: Path) -> list[str]:
    """As ["compute_90", "sm_90", ...]; [] for a library without CUDA code."""
    data, found, start = path.read_bytes(), set(), 0
    while (start := data.find(_MAGIC, start)) >= 0:
        _, header, size = struct.unpack_from("<HHQ", data, start + 4)
        place, end = start + header, start + header + size
        while place + 32 <= min(end, len(data)):
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", data, place)
            (architecture,) = struct.unpack_from("<I", data, place + 28)
            if kind not in _KINDS or entry_header == 0:
                break
            found.add(f"{_KINDS[kind]}_{architecture}")
            place += entry_header + entry_size
        start += 4
    return sorted(found)
