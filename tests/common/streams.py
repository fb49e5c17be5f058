"""Streams beside those of virtual ranks, which are threads of one process and share its streams."""

from __future__ import annotations

import torch


def stream_aside(device: torch.device | str) -> torch.cuda.Stream:
    """A stream that no virtual rank has for its own. PyTorch hands out its 32 of a priority by turns, again and again:
    the next one of ours may be another rank's, whose calls would then wait for what is to run beside them."""
    return torch.cuda.Stream(device, priority=-1)


def own_streams(count: int, device: torch.device | str) -> list[torch.cuda.Stream]:
    """Streams of nobody else, however many: of PyTorch's own, number 33 is the first one again, and any may be the one
    that it captures on. Of a GPU; they live as long as the process."""
    from cuda.bindings import driver

    streams = []
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # there is a context
        for _ in range(count):
            error, made = driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value)
            assert error == driver.CUresult.CUDA_SUCCESS, error
            streams.append(torch.cuda.ExternalStream(int(made), device=device))
    return streams
