"""What a peer offers: variants, each a way to run a cell's call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from bench.buffers import Inputs, Outputs
from bench.cells import Cell


class Unavailable(Exception):
    """A peer cannot run here; the text says why."""


@dataclass(frozen=True)
class Limits:
    """The largest call of a group, over all of its cells."""

    tokens: int
    hidden: int
    dtypes: tuple[torch.dtype, ...]

    @staticmethod
    def of(cells: Iterable[Cell]) -> Limits:
        cells = list(cells)
        dtypes = {cell.torch_dtype for cell in cells}
        return Limits(max(c.tokens for c in cells), max(c.hidden for c in cells), tuple(sorted(dtypes, key=str)))

    @property
    def nbytes(self) -> int:
        return self.tokens * self.hidden * max(dtype.itemsize for dtype in self.dtypes)


Call = Callable[[int], None]


@dataclass(frozen=True)
class Variant:
    """name:   in results: "nccl", "flashinfer/one_shot", "mnnvl_ar".
    bind:   call(i) that runs the cell's i-th call on these tensors. Launches work only; on some ranks alone it may
    deadlock. exact:  results must equal the reference bit for bit.
    finish: after capture and before the first replay, collective.
    extra:  further keys of the row.
    judge:  (inputs, outputs, calls) -> None or what is wrong, of a variant that is no all-reduce.
    """

    name: str
    bind: Callable[[Cell, Inputs, Outputs], Call]
    exact: bool = False
    finish: Callable[[], None] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    judge: Callable[[Inputs, Outputs, int], str | None] | None = None


class Peer(Protocol):
    """Made by `Peer(team, limits)`, collective over the team; raises on any rank if it cannot run, `Unavailable` for a
    known reason. If one rank cannot, all ranks drop it. After that, `variants` must answer alike on all ranks."""

    def variants(self, cell: Cell) -> list[Variant]:
        """The ways to run `cell`; none if it cannot."""

    def close(self) -> None: ...
