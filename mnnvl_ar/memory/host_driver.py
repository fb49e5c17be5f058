"""The driver of the host transport: memory is an anonymous memfd, mapped into every process of the host.

A memfd has no name in any file system, so nothing can be left behind however a rank ends. Address space is held by a
PROT_NONE mapping and memory is mapped over it, which gives `drop` and `restore` the same meaning as on a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import socket

from .verbs import DriverError, Token, Traits

_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000  # Linux, x86-64 and aarch64 alike
_HOLD = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
_FAILED = ctypes.c_void_p(-1).value
_CHUNK = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def _error(call: str, number: int) -> DriverError:
    return DriverError(call, errno.errorcode.get(number, str(number)), os.strerror(number))


def _mmap(address: int, nbytes: int, protection: int, flags: int, fd: int) -> int:
    result = _libc.mmap(address or None, nbytes, protection, flags, fd, 0)
    if result is None or result == _FAILED:
        raise _error("mmap", ctypes.get_errno())
    return int(result)


class HostDriver:
    """`verbs.Verbs` over memfd and mmap. A handle is a file descriptor that this driver owns."""

    kinds: tuple[str, ...] = ("memfd",)

    def open(self, index: int) -> Traits:
        return Traits(name="host memory", uid=f"cpu-{socket.gethostname()}", multicast=False)

    def close(self) -> None:
        pass

    def granularity(self, kind: str) -> int:
        return mmap.PAGESIZE

    def reserve(self, nbytes: int, alignment: int) -> int:
        if alignment > mmap.PAGESIZE:
            raise DriverError("mmap", "EINVAL", f"the host aligns to {mmap.PAGESIZE} bytes, not to {alignment}")
        return _mmap(0, nbytes, 0, _HOLD, -1)

    def free(self, address: int, nbytes: int) -> None:
        if _libc.munmap(address, nbytes):
            raise _error("munmap", ctypes.get_errno())

    def create(self, nbytes: int, kind: str) -> int:
        try:
            fd = os.memfd_create("mnnvl_ar", os.MFD_CLOEXEC)
        except OSError as error:
            raise _error("memfd_create", error.errno or 0) from error
        if fd == 0:  # in a process without stdin; no handle is 0
            fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
            os.close(0)
        try:
            os.posix_fallocate(fd, 0, nbytes)  # an error now instead of a SIGBUS at first touch
        except BaseException as error:  # a signal's handler may raise in it
            os.close(fd)
            if isinstance(error, OSError):
                raise _error("posix_fallocate", error.errno or 0) from error
            raise
        return fd

    def release(self, handle: int) -> None:
        os.close(handle)

    def map(self, address: int, nbytes: int, handle: int) -> None:
        _mmap(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, handle)

    def unmap(self, address: int, nbytes: int) -> None:
        _mmap(address, nbytes, 0, _HOLD | _MAP_FIXED, -1)  # over it, in one call: the address range is never free

    def export(self, handle: int, kind: str) -> Token:
        return fcntl.fcntl(handle, fcntl.F_DUPFD_CLOEXEC, 0)

    def import_(self, token: Token, kind: str) -> int:
        assert isinstance(token, int)
        return fcntl.fcntl(token, fcntl.F_DUPFD_CLOEXEC, 0)

    def fill(self, address: int, nbytes: int, word: int) -> None:
        pattern = word.to_bytes(4, "little") * (min(nbytes, _CHUNK) // 4)
        for start in range(0, nbytes, _CHUNK):
            ctypes.memmove(address + start, pattern, min(_CHUNK, nbytes - start))

    def read(self, address: int, nbytes: int) -> bytes:
        return ctypes.string_at(address, nbytes)

    def aside(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def multicast_granularity(self, members: int, nbytes: int, kind: str) -> tuple[int, int]:
        raise DriverError("multicast", "ENOTSUP", "the host has no multicast")

    def multicast_create(self, members: int, nbytes: int, kind: str) -> int:
        raise DriverError("multicast", "ENOTSUP", "the host has no multicast")

    def multicast_add_device(self, multicast: int) -> None:
        raise DriverError("multicast", "ENOTSUP", "the host has no multicast")

    def multicast_bind(self, multicast: int, handle: int, nbytes: int) -> None:
        raise DriverError("multicast", "ENOTSUP", "the host has no multicast")

    def multicast_unbind(self, multicast: int, nbytes: int) -> None:
        raise DriverError("multicast", "ENOTSUP", "the host has no multicast")

    def multicast_store(self, address: int, word: int) -> None:
        raise DriverError("multicast", "ENOTSUP", "the host has no multicast")
