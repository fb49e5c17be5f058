"""safetensors files, as far as models need them: eight bytes with the header's length, the header in JSON, the bytes.

Written here: a machine that runs servers is given nothing but them, and tensors of 16 GB are made one by one.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write(
    file: Path, entries: Iterable[tuple[str, tuple[int, ...], torch.dtype]], values: Iterator[torch.Tensor]
) -> None:
    """`entries`: name, shape and dtype of each tensor, whose `values` come in the same order, one by one."""
    header, offset = {}, 0
    for name, shape, dtype in entries:
        nbytes = dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _ in header:
            out.write(next(values).contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)


def read(file: Path) -> dict[str, torch.Tensor]:
    """Views of the mapped file; nothing is read before it is used, and nothing must be written."""
    with file.open("rb") as source:
        mapped = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_COPY)
    length = int.from_bytes(mapped[:8], "little")
    found = {}
    for name, entry in json.loads(mapped[8 : 8 + length]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            raw = torch.frombuffer(mapped, dtype=torch.uint8, count=end - begin, offset=8 + length + begin)
            found[name] = raw.view(DTYPES[entry["dtype"]]).view(entry["shape"])
    return found
