"""Arguments that make no sense, refused before any rank is waited for: `ValueError` naming argument, got and wanted."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch

_INT32_MAX = 2**31 - 1
_MOST_WHOLE = 2**60
_MOST_SECONDS = 9e9  # in nanoseconds it has to fit 64 bits


def count(name: str, value: Any) -> int:
    """A whole number from 1 on that fits 32 bits."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if not 1 <= number <= _INT32_MAX:
        raise ValueError(f"{name}: is {value!r}, wanted a whole number from 1 to {_INT32_MAX}")
    return number


def whole(name: str, value: Any) -> int:
    """A whole number, whatever it is, as long as a few bytes of each still fit 64 bits."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: is {value!r}, wanted a whole number") from None
    if abs(number) > _MOST_WHOLE:
        raise ValueError(f"{name}: is {value!r}, wanted a whole number up to {_MOST_WHOLE}")
    return number


def bytes_or_none(name: str, value: Any) -> int | None:
    """A whole number of bytes from 1 on, or None for as many as are of use."""
    if value is None:
        return None
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if not 1 <= number < 1 << 63:
        raise ValueError(f"{name}: is {value!r}, wanted a whole number of bytes, or None for no bound")
    return number


def _is_some_time(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value <= _MOST_SECONDS  # a NaN is not


def seconds(name: str, value: Any) -> float:
    if not _is_some_time(value):
        raise ValueError(f"{name}: is {value!r}, wanted more than 0 seconds, and finite")
    return float(value)


def deadline_of(value: Any) -> float | None:
    """None for ever."""
    if value is None or value == math.inf:
        return None
    if not _is_some_time(value):
        raise ValueError(f"deadline: is {value!r}, wanted more than 0 seconds, or None for no deadline")
    return float(value)


def device_of(device: torch.device | str | int | None) -> torch.device:
    """Perhaps without an index. Asks nothing of a device: one may be lost, and that is not an argument's fault."""
    if device is None:
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):  # what PyTorch makes of it names no argument
        raise ValueError(f"device: is {device!r}, wanted a CUDA device or cpu") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: is {device}, wanted a CUDA device or cpu")
    return device


def with_index(device: torch.device) -> torch.device:
    """This one does ask, so it may fail on one rank alone."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ValueError(f"device: is {device}, wanted one of the {torch.cuda.device_count()} that PyTorch sees here")
    return device
