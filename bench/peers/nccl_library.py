"""ncclAllReduce by ctypes: out of place and without PyTorch's bookkeeping, which its process groups do not offer; and
memory that a communicator knows as a symmetric window.

Values and signatures are those of nccl.h, 2.27 and later for windows.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.team import Team
from bench.variant import Unavailable

DTYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}  # ncclDataType_t
SUM = 0  # ncclRedOp_t
SYMMETRIC = 1  # NCCL_WIN_COLL_SYMMETRIC


class UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * 128),)


@dataclass(frozen=True)
class Window:
    """`nbytes` at `pointer`, where every rank has as many."""

    pointer: int
    handle: int
    nbytes: int


class Communicator:
    """One NCCL communicator over a team. Collective to make. Raises `Unavailable` or RuntimeError with NCCL's words."""

    def __init__(self, team: Team) -> None:
        self._library = _load()
        uid = UniqueId()
        if team.rank == 0:
            self._check(self._library.ncclGetUniqueId(ctypes.byref(uid)))
        uid = UniqueId.from_buffer_copy(team.gather(bytes(uid))[0])
        self._comm = ctypes.c_void_p()
        self._check(self._library.ncclCommInitRank(ctypes.byref(self._comm), team.size, uid, team.rank))

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """out = sum over ranks of x, on the current stream."""
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        args = (ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_size_t(x.numel()))
        self._check(self._library.ncclAllReduce(*args, DTYPES[x.dtype], SUM, self._comm, stream))

    def window(self, nbytes: int) -> Window:
        """Memory of NCCL's, registered with every rank at once. Collective. Raises `Unavailable` where this NCCL has no
        windows."""
        if not hasattr(self._library, "ncclCommWindowRegister"):
            raise Unavailable("this NCCL has no symmetric windows (2.27 has)")
        pointer, handle = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self._library.ncclMemAlloc(ctypes.byref(pointer), ctypes.c_size_t(nbytes)))
        register = self._library.ncclCommWindowRegister
        self._check(register(self._comm, pointer, ctypes.c_size_t(nbytes), ctypes.byref(handle), SYMMETRIC))
        if pointer.value is None or handle.value is None:
            raise Unavailable("NCCL made no window of its memory")
        return Window(pointer.value, handle.value, nbytes)

    def free(self, window: Window) -> None:
        """Collective, when no call uses it any more."""
        self._check(self._library.ncclCommWindowDeregister(self._comm, ctypes.c_void_p(window.handle)))
        self._check(self._library.ncclMemFree(ctypes.c_void_p(window.pointer)))

    def close(self) -> None:
        self._library.ncclCommDestroy(self._comm)

    def _check(self, code: int) -> None:
        if code != 0:
            raise RuntimeError(f"NCCL: {self._library.ncclGetErrorString(code).decode()}")


def _load() -> ctypes.CDLL:
    """The libnccl that PyTorch has loaded, or would load."""
    torch.cuda.nccl.version()
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "libnccl.so" in line:
            library = ctypes.CDLL(line[line.index("/") :])
            break
    else:
        try:
            library = ctypes.CDLL("libnccl.so.2")
        except OSError as error:
            raise Unavailable(f"no libnccl: {error}") from None
    library.ncclGetErrorString.restype = ctypes.c_char_p
    library.ncclCommInitRank.argtypes = [ctypes.c_void_p, ctypes.c_int, UniqueId, ctypes.c_int]
    return library
