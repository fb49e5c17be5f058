"""Some files of a zip that lies elsewhere: its directory, and then as few reads as the files asked for allow."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from typing import IO

CHUNK = 128 << 10  # bytes; a smaller request costs as much time
SPARE = 1 << 10  # bytes, more than the header of a zip's member


class Wheel:
    """A zip of which only the directory is here, and what was read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._zip = zipfile.ZipFile(file)
        self._members = {each.filename: each for each in self._zip.infolist() if not each.is_dir()}

    def names(self) -> list[str]:
        return sorted(self._members)

    def read(self, names: Iterable[str]) -> dict[str, str]:
        """Text of each. Neighbours in the file come with one request."""
        members = sorted((self._members[name] for name in names), key=lambda each: each.header_offset)
        spans = ((each.header_offset, each.header_offset + SPARE + each.compress_size) for each in members)
        for start, end in joined(spans):
            self._file.seek(start)
            self._file.read(end - start + CHUNK)  # pip reads CHUNK bytes at least, from wherever it is asked to
        return {each.filename: self._zip.read(each).decode() for each in members}


def joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans, sorted by start, with those made one that are less than CHUNK apart."""
    runs: list[tuple[int, int]] = []
    for start, end in spans:
        if runs and start - runs[-1][1] < CHUNK:
            runs[-1] = runs[-1][0], max(end, runs[-1][1])
        else:
            runs.append((start, end))
    return runs
