"""A CUDA driver without a GPU: `verbs.Verbs` over memfd, for real processes.

Fake device memory is a memfd; a POSIX handle is its descriptor; a fabric handle is 64 bytes that lead to it through
/proc; a multicast object is a file in which its members write down what they add, bind and unbind, and a store to it
goes to all that is bound. What a real driver or PTX forbids raises here: mapping outside a reservation, mapping
twice, giving back what is not held, releasing what is still bound, binding before all devices are there or twice,
adding more devices than an object is for, sizes and addresses that are no multiples of what it asks for; a memset to a
multicast address or a copy from one (only multimem instructions may touch it), and a store to a team of which a member
is not bound.

`live` counts what is held; an empty `held()` means that nothing leaked. `calls` lists the verbs used, `sizes` the bytes
that the verbs which take memory or addresses were asked for.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections import Counter
from collections.abc import Mapping

from mnnvl_ar.memory import bringup, multicast, verbs
from mnnvl_ar.memory.host_driver import HostDriver
from mnnvl_ar.memory.verbs import DriverError, Token, Traits

GRAIN = 2 << 20
# What a real driver names in its errors. A mapping fails where access is granted, not where addresses are taken.
_CALLS = {
    "create": "cuMemCreate",
    "export": "cuMemExportToShareableHandle",
    "import": "cuMemImportFromShareableHandle",
    "map": "cuMemSetAccess",
    "multicast_create": "cuMulticastCreate",
}


def allow_simulated_multicast(environment: Mapping[str, str] | None = None) -> None:
    """Lets bring-up in this process go by `environment` (nothing forbidden) instead of the real one, which stays.

    The real driver looks at the real one for itself, so not even a mistaken test can make a real multicast object.
    """
    bringup.multicast_refusal = lambda: verbs.multicast_refusal(environment or {})  # type: ignore[attr-defined]
    multicast.require_multicast_allowed = lambda: None  # type: ignore[attr-defined]


class SimulatedDriver:
    """`device` is the physical GPU this rank uses. `fail`: verb -> error code, where a verb is "import", of one kind
    "import fabric", of one owner's memory "import of host-gpu-1", or both, "import fabric of host-gpu-1".
    `processors`: of the context, and of the device. `grains`: of multicast, what is bound in multiples of, and what is
    recommended for objects."""

    kinds: tuple[str, ...] = ("fabric", "posix_fd")

    def __init__(
        self,
        device: int,
        *,
        fail: Mapping[str, str] | None = None,
        multicast: bool = False,
        host: str = "host",
        processors: tuple[int, int] = (132, 132),
        grains: tuple[int, int] = (GRAIN, 2 * GRAIN),
    ) -> None:
        self._grains = grains
        self.sizes: dict[str, list[int]] = {}
        self._name, self._multicast_trait, self._fail = f"{host}-gpu-{device}", multicast, dict(fail or {})
        self._host = HostDriver()
        self.processors = processors
        self.live: Counter[str] = Counter()
        self.calls: list[str] = []
        self._space: dict[int, tuple[int, int, int]] = {}  # reserved: start -> size, what mmap gave, its size
        self._maps: dict[int, tuple[int, int]] = {}  # mapped: address -> size, handle at that time
        self._handles: dict[int, str] = {}  # "memory" or "multicast"
        self._bound: dict[int, tuple[int, int]] = {}  # multicast -> memory, bytes
        self._multicast_maps: dict[int, tuple[int, int]] = {}  # address -> size, private descriptor of the object

    def held(self) -> dict[str, int]:
        return {what: count for what, count in self.live.items() if count}

    def open(self, index: int) -> Traits:
        self._enter("open")
        self.live["context"] = 1
        return Traits(self._name, self._name, self._multicast_trait, *self.processors)

    def close(self) -> None:
        self.live["context"] = 0

    def granularity(self, kind: str) -> int:
        self._enter("granularity", kind)
        return GRAIN

    def reserve(self, nbytes: int, alignment: int) -> int:
        self._enter("reserve")
        self._size("reserve", nbytes, GRAIN)
        size = nbytes + alignment
        raw = self._host.reserve(size, 1)
        address = -(-raw // alignment) * alignment
        self._space[address] = (nbytes, raw, size)
        self.live["reservations"] += 1
        return address

    def free(self, address: int, nbytes: int) -> None:
        self._enter("free")
        size, raw, raw_size = self._space.pop(address)
        mapped = [a for a in (*self._maps, *self._multicast_maps) if address <= a < address + size]
        self._forbid(size != nbytes or bool(mapped), "free", "still mapped")
        self._host.free(raw, raw_size)
        self.live["reservations"] -= 1

    def create(self, nbytes: int, kind: str) -> int:
        self._enter("create", kind)
        self._size("create", nbytes, GRAIN)
        handle = os.memfd_create(f"simulated of {self._name}", os.MFD_CLOEXEC)
        os.ftruncate(handle, nbytes)
        return self._keep(handle, "memory")

    def release(self, handle: int) -> None:
        self._enter("release")
        self._forbid(handle not in self._handles, "release", "not held")
        bound = [*self._bound, *(memory for memory, _ in self._bound.values())]
        self._forbid(handle in bound, "release", "still bound")
        del self._handles[handle]
        os.close(handle)
        self.live["handles"] -= 1

    def map(self, address: int, nbytes: int, handle: int) -> None:
        self._enter("map", self._handles[handle], _owner(handle))
        inside = any(start <= address and address + nbytes <= start + size for start, (size, *_) in self._space.items())
        self._forbid(not inside, "map", "outside every reservation")
        grain = self._grains[0] if self._handles[handle] == "multicast" else GRAIN
        self._forbid(address % grain != 0, "map", "not a multiple of the granularity")
        mapped = {start: size for maps in (self._maps, self._multicast_maps) for start, (size, _) in maps.items()}
        overlaps = any(start < address + nbytes and address < start + size for start, size in mapped.items())
        self._forbid(overlaps, "map", "mapped already")
        if self._handles[handle] == "multicast":
            self._forbid(nbytes > int(self._records(handle)[0][2]), "map", "larger than the object")
            self._multicast_maps[address] = (nbytes, fcntl.fcntl(handle, fcntl.F_DUPFD_CLOEXEC, 0))
        else:
            self._host.map(address, nbytes, handle)
            self._maps[address] = (nbytes, handle)
        self.live["maps"] += 1

    def unmap(self, address: int, nbytes: int) -> None:
        self._enter("unmap")
        self._forbid(address not in self._maps and address not in self._multicast_maps, "unmap", "not mapped")
        if address in self._multicast_maps:
            os.close(self._multicast_maps.pop(address)[1])
        else:
            del self._maps[address]
            self._host.unmap(address, nbytes)
        self.live["maps"] -= 1

    def export(self, handle: int, kind: str) -> Token:
        self._enter("export", kind)
        if kind == "fabric":
            return f"{os.getpid()} {handle}".encode().ljust(64, b"\0")
        return fcntl.fcntl(handle, fcntl.F_DUPFD_CLOEXEC, 0)

    def import_(self, token: Token, kind: str) -> int:
        if isinstance(token, bytes):
            pid, fd = token.rstrip(b"\0").split()
            handle = os.open(f"/proc/{int(pid)}/fd/{int(fd)}", os.O_RDWR | os.O_CLOEXEC)
        else:
            handle = fcntl.fcntl(token, fcntl.F_DUPFD_CLOEXEC, 0)
        try:
            self._enter("import", kind, _owner(handle))
        except DriverError:
            os.close(handle)
            raise
        return self._keep(handle, "memory" if _owner(handle) else "multicast")

    def fill(self, address: int, nbytes: int, word: int) -> None:
        self._enter("fill")
        self._check_mapped(address, nbytes, "fill")
        self._host.fill(address, nbytes, word)

    def read(self, address: int, nbytes: int) -> bytes:
        self._enter("read")
        self._check_mapped(address, nbytes, "read")
        return self._host.read(address, nbytes)

    def aside(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def multicast_granularity(self, members: int, nbytes: int, kind: str) -> tuple[int, int]:
        self._enter("multicast_granularity", kind)
        return self._grains

    def multicast_create(self, members: int, nbytes: int, kind: str) -> int:
        self._enter("multicast_create", kind)
        self._size("multicast_create", nbytes, self._grains[0])
        object_ = os.memfd_create("simulated_multicast", os.MFD_CLOEXEC)
        self._record(object_, "members", members, nbytes)
        return self._keep(object_, "multicast")

    def multicast_add_device(self, multicast: int) -> None:
        self._enter("multicast_add_device")
        about, *records = self._records(multicast)
        added = [record for record in records if record[0] == "add"]
        self._forbid(["add", self._name] in added, "multicast_add_device", "device added twice")
        self._forbid(len(added) == int(about[1]), "multicast_add_device", "all devices that it is for are there")
        self._record(multicast, "add", self._name)

    def multicast_bind(self, multicast: int, handle: int, nbytes: int) -> None:
        self._enter("multicast_bind")
        records = self._records(multicast)
        added = sum(record[0] == "add" for record in records)
        self._forbid(added != int(records[0][1]), "multicast_bind", "would wait for devices that were never added")
        self._forbid(multicast in self._bound, "multicast_bind", "bound already")
        self._size("multicast_bind", nbytes, self._grains[0])
        room = min(os.fstat(handle).st_size, int(records[0][2]))
        self._forbid(nbytes > room, "multicast_bind", "larger than the memory, or than the object")
        self._record(multicast, "bind", os.getpid(), handle, nbytes)
        self._bound[multicast] = handle, nbytes
        self.live["bound"] += 1

    def multicast_unbind(self, multicast: int, nbytes: int) -> None:
        self._enter("multicast_unbind")
        handle, bound = self._bound.pop(multicast)
        self._forbid(nbytes != bound, "multicast_unbind", "not what was bound")
        self._record(multicast, "unbind", os.getpid(), handle, nbytes)
        self.live["bound"] -= 1

    def multicast_store(self, address: int, word: int) -> None:
        self._enter("multicast_store")
        maps = [m for m in self._multicast_maps.items() if m[0] <= address and address + 16 <= m[0] + m[1][0]]
        self._forbid(not maps or address % 16 != 0, "multicast_store", "no multicast address of a vector")
        start, (_, object_) = maps[0]
        offset, (about, *records) = address - start, self._records(object_)
        bound = {tuple(record[1:]) for record in records if record[0] == "bind"}
        bound -= {tuple(record[1:]) for record in records if record[0] == "unbind"}
        reached = [(pid, fd) for pid, fd, nbytes in bound if offset + 16 <= int(nbytes)]
        self._forbid(len(reached) != int(about[1]), "multicast_store", "a member of the team is not bound there")
        for pid, fd in reached:
            memory = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
            try:  # a rank that has given up may have closed it, and have another file of that number
                self._forbid(not _owner(memory), "multicast_store", "what was bound there is gone")
                os.pwrite(memory, word.to_bytes(4, "little") * 4, offset)
            finally:
                os.close(memory)

    def _enter(self, verb: str, detail: str = "", owner: str = "") -> None:
        self.calls.append(f"{verb} {detail}".strip())
        for name in (verb, f"{verb} {detail}", f"{verb} of {owner}", f"{verb} {detail} of {owner}"):
            if name in self._fail:
                raise DriverError(_CALLS.get(verb, verb), self._fail[name], "simulated")

    def _size(self, verb: str, nbytes: int, grain: int) -> None:
        self.sizes.setdefault(verb, []).append(nbytes)
        self._forbid(nbytes % grain != 0, verb, "not a multiple of the granularity")

    def _forbid(self, wrong: bool, call: str, why: str) -> None:
        if wrong:
            raise DriverError(f"simulated {call}", "CUDA_ERROR_INVALID_VALUE", why)

    def _keep(self, handle: int, what: str) -> int:
        self._handles[handle] = what
        self.live["handles"] += 1
        return handle

    def _check_mapped(self, address: int, nbytes: int, call: str) -> None:
        inside = any(start <= address and address + nbytes <= start + size for start, (size, _) in self._maps.items())
        self._forbid(not inside, call, "touches memory that is not mapped")

    @staticmethod
    def _record(object_: int, *words: object) -> None:
        fd = os.open(f"/proc/self/fd/{object_}", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        os.write(fd, (" ".join(map(str, words)) + "\n").encode())
        os.close(fd)

    @staticmethod
    def _records(object_: int) -> list[list[str]]:
        return [line.split() for line in os.pread(object_, 1 << 20, 0).decode().splitlines()]


def _owner(handle: int) -> str:
    """The device whose memory a handle is; empty for a multicast object."""
    return os.readlink(f"/proc/self/fd/{handle}").partition(" of ")[2].removesuffix(" (deleted)")
