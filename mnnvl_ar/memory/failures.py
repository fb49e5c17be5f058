"""What a failure of a bring-up is, what an operator can do about it, and which failures a group remembers.

A driver's or the system's error is a reason to try another way; any other exception is a bug or a misuse, and ends the
bring-up. Advice is given only for causes that were seen in the field.

Remembered is what is a property of the machine: that a driver refuses a handle kind, or multicast. Each further try
would cost every rank the attempt, seconds where the driver waits for an IMEX daemon, and of multicast also objects that
a whole machine shares. Not remembered is that memory ran out, that a service is not ready yet, or that a peer is late,
slow or dead: the next try may well succeed.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from ..errors import BringUpError
from .verbs import DriverError

MULTICAST = "multicast"  # as a way that can be refused; the others are the handle kinds

_DIED = "its process died or gave up: its connection closed"
_LASTING = (
    "CUDA_ERROR_INVALID_DEVICE",
    "CUDA_ERROR_NOT_PERMITTED",
    "CUDA_ERROR_NOT_SUPPORTED",
    "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED",
    "TOO_OLD",
)
_BY_CODE = {
    "CUDA_ERROR_OUT_OF_MEMORY": "Free GPU memory on that rank, or ask for a smaller workspace.",
    "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED": "Its GPU cannot reach a peer's: look at `nvidia-smi topo -p2p w`.",
    "CUDA_ERROR_MPS_CONNECTION_FAILED": "The MPS daemon of that host does not answer.",
    "CUDA_ERROR_SYSTEM_NOT_READY": "The fabric manager of that host is not running, or not ready yet.",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "An earlier kernel of that process faulted; this is only where it shows.",
    "NO_DRIVER": 'Run where an NVIDIA driver is installed, or use device="cpu" for the host transport.',
    "TOO_OLD": "The NVIDIA driver of that host, or cuda-bindings, is too old.",
    "ENOMEM": "Not enough memory on that host (look at the container's limit).",
    "ENOSPC": "Not enough memory on that host (look at the container's limit).",
    "EMFILE": "Raise `ulimit -n` of that rank.",
    "ENFILE": "That host is out of file descriptors (fs.file-max).",
    "EFBIG": "Raise `ulimit -f` of that rank.",
}
_NOT_PERMITTED = ("EPERM", "EACCES", "ENOSYS")  # of system calls: seccomp answers with any of these
_PERMISSION = (
    "The system refuses that call to this process: a seccomp profile or security module of the container, or a "
    "capability that it lacks."
)
_HANDLE_CALLS = ("cuMemCreate", "cuMemExportToShareableHandle", "cuMemImportFromShareableHandle")
_FABRIC = (
    "Fabric handles need an IMEX channel in the container (/dev/nvidia-caps-imex-channels) and, across hosts, one IMEX "
    "domain with its daemon running."
)
_MULTICAST = (
    "The driver refuses NVLink multicast: no NVSwitch, confidential computing, or a container without it. "
    'transport="auto" or "unicast" does without.'
)
_ACCESS = (
    "GPUs whose memory cannot be mapped: no NVLink or P2P between them, or a container that does not see the peer's. "
    "Look at `nvidia-smi topo -p2p w`."
)


@dataclass(frozen=True)
class Failure:
    """What a vote agrees on when it fails. `fatal`: there is no use in trying another way. `lasting`: nor in trying
    this one again."""

    rank: int
    step: str
    cause: str
    advice: str = ""
    fatal: bool = True
    lasting: bool = False

    def error(self, before: str = "") -> BringUpError:
        """What the user gets; `before` says which other ways failed earlier."""
        return BringUpError(self.rank, self.step, self.cause + before, self.advice)


def failure_of(error: Exception, rank: int, step: str, kind: str) -> Failure:
    """`error`, met on `rank` at `step`, with the handle kind `kind` in use."""
    soft = isinstance(error, (DriverError, OSError))
    cause = str(error) if soft else f"{type(error).__name__}: {error}"
    return Failure(rank, step, cause, advise(error, kind), fatal=not soft, lasting=lasts(error))


def silent(ranks: list[int], step: str, timeout: float) -> Failure:
    """The failure that names ranks which did not answer in time."""
    names = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    return Failure(
        min(ranks),
        step,
        f"no answer from {names} within the timeout of {timeout:g} s",
        "Look at what that process is doing (py-spy dump); if it is merely slow to start, give a longer timeout.",
    )


def lost(rank: int, step: str, why: str = "") -> Failure:
    """The failure that names a rank whose connection ended; where `why` says how, no advice is needed."""
    if why:
        return Failure(rank, step, f"{_DIED} ({why})")
    return Failure(rank, step, _DIED, f"Look at the log of rank {rank}, and for an out-of-memory kill on its host.")


def advise(error: BaseException, kind: str) -> str:
    """One sentence or two; empty if nothing useful is known."""
    if isinstance(error, MemoryError):
        return _BY_CODE["ENOMEM"]
    code = error.code if isinstance(error, DriverError) else errno.errorcode.get(getattr(error, "errno", None) or 0, "")
    if code in _BY_CODE:
        return _BY_CODE[code]
    if code in _NOT_PERMITTED:
        return _PERMISSION
    if not isinstance(error, DriverError):
        return ""
    if error.call.startswith("cuMulticast"):
        return _MULTICAST
    if kind == "fabric" and error.call in _HANDLE_CALLS:
        return _FABRIC
    return _ACCESS if error.call in ("cuMemSetAccess", "cuMemMap", "cuMemImportFromShareableHandle") else ""


def lasts(error: BaseException) -> bool:
    """Whether the error is a property of the machine."""
    return isinstance(error, DriverError) and error.code in _LASTING


class Refusals(dict[str, Failure]):
    """What the driver refused a group, by way: a handle kind, or MULTICAST. Kept by group, and gone with it; an
    object that cannot be kept so is forgotten at once.

    All ranks go by what any of them remembers: they exchange it when they meet (`agree`), so they go the same way even
    if one of them was interrupted before it could note what the others did.
    """

    @staticmethod
    def of(group: Any) -> Refusals:
        try:
            return _by_group.setdefault(group, Refusals())
        except TypeError:  # no hash, or no weak references
            return Refusals()

    def note(self, way: str, failure: Failure) -> None:
        if failure.lasting:
            self.setdefault(way, failure)

    def recall(self, way: str) -> Failure | None:
        """The failure as one that is remembered, not met; None if this way was not refused."""
        failure = self.get(way)
        if failure is None:
            return None
        cause = f"{failure.cause.rstrip('.')}; so an earlier bring-up over this group found, and it was not tried again"
        advice = f"{failure.advice} If that has changed since, pass retry=True, or make a new group.".lstrip()
        return replace(failure, cause=cause, advice=advice)

    def plain(self) -> dict[str, dict[str, Any]]:
        """As a message can carry it."""
        return {way: asdict(failure) for way, failure in self.items()}

    def agree(self, by_rank: Iterable[Mapping[str, Any]]) -> None:
        """Becomes what all ranks remember together; `by_rank` is each rank's own, `plain`."""
        everyone: dict[str, Failure] = {}
        for refusals in by_rank:
            for way, failure in refusals.items():
                everyone.setdefault(way, Failure(**failure))
        self.clear()
        self.update(everyone)


_by_group: WeakKeyDictionary[Any, Refusals] = WeakKeyDictionary()
