"""What is measured: a cell is one op at one size on one group; the grid is a list of cells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from bench.quantised import KINDS

if TYPE_CHECKING:  # whoever only parses options need not wait for PyTorch
    import torch

DTYPES = ("bfloat16", "float16", "float32")
OPS = ("fused", "plain", *KINDS)
TOKENS = tuple(2**i for i in range(12))
HIDDEN = (2880, 4096, 7168, 8192)
TPS = (2, 4, 8)
CONTEXTS = ("chain", "gemm")
QUICK_TOKENS = (1, 8, 64, 512)
QUICK_HIDDEN = (7168,)


@dataclass(frozen=True)
class Cell:
    """op: "fused" (sum + add + RMSNorm), "plain" (sum), or the fused one with the norm quantised, by its kind.
    mode: "graph" or "eager". l2: "warm" (the same buffers each call) or "cold" (other buffers each call, and the L2
    cache emptied before each replay). context: what stands around a call. skew_us: how much later than the first rank
    the last one comes to it. Both: bench/contexts.py."""

    op: str
    tp: int
    tokens: int
    hidden: int
    dtype: str
    mode: str = "graph"
    l2: str = "warm"
    context: str = "chain"
    skew_us: float = 0.0

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def shape(self) -> tuple[int, int]:
        return (self.tokens, self.hidden)

    @property
    def nbytes(self) -> int:
        """Bytes of one rank's message."""
        return self.tokens * self.hidden * self.torch_dtype.itemsize

    def key(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        usual = ((self.mode, "graph"), (self.l2, "warm"), (self.context, "chain"))
        extras = [name for name, expected in usual if name != expected]
        if self.skew_us:
            extras.append(f"{self.skew_us:g} us apart")
        return " ".join([self.op, f"TP{self.tp}", f"T={self.tokens}", f"H={self.hidden}", self.dtype, *extras])


def grid(
    tps: Iterable[int],
    ops: Iterable[str],
    dtypes: Iterable[str],
    hidden: Iterable[int],
    tokens: Iterable[int],
    modes: Iterable[str] = ("graph",),
    l2: Iterable[str] = ("warm",),
    contexts: Iterable[str] = ("chain",),
    skews: Iterable[float] = (0.0,),
) -> Iterator[Cell]:
    """All cells that there are; one group's cells follow each other, as making a group is what takes long."""
    axes = product(tps, contexts, skews, ops, dtypes, modes, l2, hidden, tokens)
    for tp, context, skew, op, dtype, mode, state, width, count in axes:
        kind = KINDS.get(op)
        if kind is not None and (dtype == "float32" or width % kind.block != 0):
            continue
        if skew and (tp == 1 or mode == "eager"):  # nobody to wait for; processes are further apart than that
            continue
        yield Cell(op, tp, count, width, dtype, mode, state, context, skew)
