"""Streams beside those of virtual ranks, which are threads of one process and share its streams."""

from __future__ import annotations

import torch


def stream_aside(device: torch.device | str) -> torch.cuda.Stream:
    """A stream that no virtual rank has for its own. PyTorch hands out its 32 of a priority by turns, again and again:
    the next one of ours may be another rank's, whose calls would then wait for what is to run beside them."""
    return torch.cuda.Stream(device, priority=-1)
