"""When one hop beats two: `auto` uses one-shot for messages up to a crossover, by world size.

The crossover depends on what all ranks know alike (world size, class of machine), so all ranks pick alike.
"""

from __future__ import annotations

import torch

# Bytes of one rank's [tokens, hidden] up to which one-shot was the quicker one on H200 over NV18 (docs/performance.md).
_NVLINK_UNICAST = {1: 1 << 30, 2: 1_500_000, 4: 230_000, 8: 90_000}


def one_shot_bytes(world_size: int, device: torch.device) -> int:
    """Largest message, in bytes, that `auto` sends by one-shot."""
    at_least = [size for size in _NVLINK_UNICAST if size >= world_size]
    return _NVLINK_UNICAST[min(at_least)] if at_least else 8 * _NVLINK_UNICAST[8] // world_size
