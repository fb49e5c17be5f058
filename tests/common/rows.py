"""Inputs of the tests. The hostile rows are those of the demo; weights, and what all ranks together should answer, are
added here.
"""

import torch

from mnnvl_ar.demo.rows import hostile_rows

__all__ = ["DTYPES", "SENTINEL", "hostile_rows", "sentinel_rows", "weights"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SENTINEL = -(1 << 31)  # 0x80000000 as an int32


def weights(hidden: int, dtype: torch.dtype, *, seed: int) -> torch.Tensor:
    """[hidden] around 1, the same on all ranks."""
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    return (1 + 0.25 * torch.randn(hidden, generator=generator)).to(dtype)


def sentinel_rows(tokens: int, hidden: int, dtype: torch.dtype, *, seed: int = 0, rank: int = 0) -> torch.Tensor:
    """[tokens, hidden] of which every word of the wire is the sentinel: -0.0, or (+0, -0)."""
    words = torch.full((tokens, hidden * dtype.itemsize // 4), SENTINEL, dtype=torch.int32)
    return words.view(dtype)
