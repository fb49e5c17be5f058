"""residual += x; out = RMSNorm(residual) * weight as one kernel: what follows an all-reduce that cannot do it itself.

Written by hand in Triton, as torch.compile needs seconds a shape; one row a program, the whole row in registers, sums
in fp32. With `pdl`, as servers launch theirs, it may be launched before the all-reduce has ended, loads the weight and
waits for it there.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.buffers import EPS
from bench.cells import Cell
from bench.variant import Unavailable

try:
    import triton  # type: ignore[import-not-found,unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found,unused-ignore]
except ImportError:
    triton = None

if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator,unused-ignore]
    def _kernel(x, residual, weight, out, hidden, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64) * hidden
        column = tl.arange(0, BLOCK)
        inside = column < hidden
        w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        if PDL:
            tl.extra.cuda.gdc_wait()
        r = tl.load(residual + row + column, mask=inside, other=0.0)
        z = (tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32) + r.to(tl.float32)).to(r.dtype)
        tl.store(residual + row + column, z, mask=inside)
        z32 = z.to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(z32 * z32) / hidden + eps)
        tl.store(out + row + column, (z32 * scale * w).to(r.dtype), mask=inside)


def require() -> None:
    if triton is None:
        raise Unavailable("no triton for the add + RMSNorm after it")


def add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, pdl: bool = False
) -> None:
    """residual += x in place; out = RMSNorm(residual) * weight."""
    tokens, hidden = residual.shape
    block = triton.next_power_of_2(hidden)
    kernel: Any = _kernel
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    warps = max(1, min(16, block // 512))
    kernel[(tokens,)](x, residual, weight, out, hidden, EPS, BLOCK=block, PDL=pdl, num_warps=warps, **options)


def forms(name: str, cell: Cell) -> list[tuple[str, bool]]:
    """(variant, whether the norm is launched with PDL) of an unfused peer."""
    return [(name, False), (f"{name}/pdl_norm", True)] if cell.op == "fused" else [(name, False)]
