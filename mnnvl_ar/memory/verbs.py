"""The few verbs that bring-up needs from a memory driver, and the error they raise.

Three drivers have them: `CudaDriver`, `HostDriver` and the tests' simulated one. Bring-up never asks which one it has;
that is why it can be tested without a GPU.

A handle kind says how a handle travels to peers; "" is memory of this process alone.

Contract: a verb does one thing or raises `DriverError` and has then done nothing. Addresses, sizes and offsets are in
bytes. No verb is collective. `reserve` takes address space only; `create` takes physical memory only; `map` joins the
two.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from ..errors import MnnvlArError

# What travels to a peer so that it can import a handle: a file descriptor (inside one host) or opaque bytes (anywhere).
Token = int | bytes
LOST = -1  # in place of a descriptor that came while this process had no room for it

# Any of these in the environment of any rank forbids multicast to all. Tests and bench set them from here.
MULTICAST_SWITCHES = {
    "MNNVL_AR_DISABLE_MULTICAST": "1",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NCCL_NVLS_ENABLE": "0",
    "NVSHMEM_DISABLE_NVLS": "1",
}


class DriverError(MnnvlArError):
    """A driver call failed: `call` is its name, `code` the name of the error, `text` what the driver says about it."""

    def __init__(self, call: str, code: str, text: str) -> None:
        self.call, self.code, self.text = call, code, text
        super().__init__(f"{call}: {code} ({text})")

    def __reduce__(self) -> tuple[type[DriverError], tuple[str, str, str]]:
        return type(self), (self.call, self.code, self.text)


class MulticastRefused(MnnvlArError):
    """The environment forbids this process to create NVLink multicast objects."""


@dataclass(frozen=True)
class Traits:
    """What a driver says of its device. `uid` is equal for two ranks exactly if they use the same physical device.
    `processors`: SMs of the context that opened it, of the device's `device_processors`; 0 where there are none."""

    name: str
    uid: str
    multicast: bool
    processors: int = 0
    device_processors: int = 0


class Verbs(Protocol):
    """See the module's docstring. `kinds` lists the handle kinds worth an attempt, best first."""

    kinds: tuple[str, ...]

    def open(self, index: int) -> Traits: ...
    def close(self) -> None: ...
    def granularity(self, kind: str) -> int: ...
    def reserve(self, nbytes: int, alignment: int) -> int: ...
    def free(self, address: int, nbytes: int) -> None: ...
    def create(self, nbytes: int, kind: str) -> int: ...
    def release(self, handle: int) -> None: ...
    def map(self, address: int, nbytes: int, handle: int) -> None: ...
    def unmap(self, address: int, nbytes: int) -> None: ...

    def export(self, handle: int, kind: str) -> Token:
        """A token for peers. A file descriptor belongs to the caller, who closes it."""

    def import_(self, token: Token, kind: str) -> int:
        """A handle to a peer's memory. Does not take a file descriptor over: the caller still closes it."""

    def fill(self, address: int, nbytes: int, word: int) -> None:
        """Repeats a 32-bit word; done, and visible to every device, when it returns."""

    def read(self, address: int, nbytes: int) -> bytes: ...

    def aside(self) -> AbstractContextManager[object]:
        """For giving things back in a thread of ours: what is called inside disturbs no capture of another thread."""

    # Only `multicast.py` and the handshake call these.
    def multicast_granularity(self, members: int, nbytes: int, kind: str) -> tuple[int, int]:
        """Of memory that is bound, which must be a multiple of the first; and of objects and addresses, the size that
        the driver recommends for speed. That may be 512 MiB: no memory is sized by it."""

    def multicast_create(self, members: int, nbytes: int, kind: str) -> int: ...
    def multicast_add_device(self, multicast: int) -> None: ...
    def multicast_bind(self, multicast: int, handle: int, nbytes: int) -> None: ...
    def multicast_unbind(self, multicast: int, nbytes: int) -> None: ...
    def multicast_store(self, address: int, word: int) -> None:
        """A vector of four times a 32-bit word, by the instruction that kernels use; done when it returns. `fill` and
        `read` must not be given a multicast address."""


def multicast_refusal(environment: Mapping[str, str] = os.environ) -> str:
    """The switch of the environment that forbids multicast in this process, as `NAME=value`; empty if none does."""
    for name, value in MULTICAST_SWITCHES.items():
        if environment.get(name, "").strip() == value:
            return f"{name}={value}"
    return ""


def forbid_multicast() -> None:
    """Sets every switch, for this process and all that it starts from now on."""
    os.environ.update(MULTICAST_SWITCHES)


def require_multicast_allowed() -> None:
    """Raises `MulticastRefused` under any switch. Whatever makes or joins a multicast object calls this first."""
    switch = multicast_refusal()
    if switch:
        raise MulticastRefused(f"multicast is switched off by {switch} in the environment")
