"""A group's workspace: symmetric memory, and how calls on it are to be run."""

from __future__ import annotations

import functools
import logging
import os
import struct
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

import torch

from mnnvl_ar import crosscheck
from mnnvl_ar import monitor as watchers
from mnnvl_ar._library import ops
from mnnvl_ar.arguments import bytes_or_none, count, deadline_of, device_of, seconds, whole, with_index
from mnnvl_ar.diagnosis import ASLEEP as ASLEEP_FAULT
from mnnvl_ar.diagnosis import raise_fault, read_fault
from mnnvl_ar.errors import MnnvlArError, WorkspaceBroken
from mnnvl_ar.handle import DEFAULT_DEADLINE, Layout, create, nanoseconds
from mnnvl_ar.memory import ASLEEP, CHECKPOINT, CLOSED, AnyGroup, Fill, Members, Request, SymmetricMemory, allocate
from mnnvl_ar.memory.request import check_transport
from mnnvl_ar.ops import Pdl, Strategy
from mnnvl_ar.tuning import LaunchShape, Table, table_for
from mnnvl_ar.turn import Turn

__all__ = ["DEFAULT_DEADLINE", "DEFAULT_MAX_BYTES", "DTYPES", "Layout", "Workspace", "create"]

DEFAULT_MAX_BYTES = 64 << 20  # of each GPU
_CHECKPOINT_SECONDS = 60.0
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_STATE = struct.Struct("<I24xI")  # State and Progress of csrc/protocol/layout.h: epoch, later
_EPOCHS = 2**32 - 1  # kEpochs of csrc/protocol/ring.h

_log = logging.getLogger("mnnvl_ar")
# Of closed workspaces that captured graphs may still use; of those closed by force, what the monitor watches.
_kept: list[tuple[int, SymmetricMemory, Replayed]] = []


class Workspace:
    """What the ops need to exchange data within `group`. Making one is collective over `group`; nothing else is.

    group:      the ranks: a `torch.distributed.ProcessGroup`, gloo or NCCL, any subgroup; or, for ranks of another
                launcher, any `mnnvl_ar.Group`, or a communicator of mpi4py or FlashInfer; there is no default
    max_tokens, hidden, dtype: the largest call that is expected, [max_tokens, hidden]: the memory is for it. Others
                may share the workspace, larger ones too, `fits` tells
    device:     a CUDA device, by default the current one; "cpu" for the host transport, the default where PyTorch sees
                no CUDA device
    max_bytes:  of each GPU, at most. A call that has no room at once runs in pieces, several launches, with the same
                bits. None: as many bytes as it takes to run the largest call at once. `bytes_for` tells beforehand
    transport:  "auto", "unicast", "multicast" or, implied by device "cpu", "host"
    strategy:   "auto", "one_shot" or "two_shot", for calls that do not say, the same on all ranks. "auto" goes by what
                was measured on this class of machine, else by a cost model (`mnnvl_ar.tuning`)
    pdl:        "off", "late" or "early", for calls that do not say (see `Pdl`), or "auto": what was measured to be
                quickest between matrix multiplications for a call of that size, which mostly is "off"
    deadline:   seconds that a call waits for its peers before it ends with an error; None for ever
    hold:       seconds, at most, that a call which found a fault holds its stream until `on_fault` has returned, so
                that nothing computed behind it is used before the process has decided what to do. 0: it goes on, with
                NaN
    timeout:    seconds that making the workspace may take; with a `Group`, from the end of its all-gather
    retry:      try again what the driver refused this group before (a kind of handle, multicast); otherwise that is
                remembered as long as the group lives, and not tried again
    max_ctas:   an upper bound on the CTAs of a call; None: what the device holds at once
    concurrent: whether calls on other workspaces of this device may run at the same time, on other streams. Then, from
                the second workspace on, each has its share of the device, and "early" counts as "late". False is
                quicker where calls on all workspaces follow each other
    monitor:    whether a thread, one for all workspaces of the process, looks for faults, so that one is logged: that
                of a call of this rank within 0.1 s, what peers say within half a second
    on_fault:   called once with the error, in a thread of its own, after it has been logged (a log that blocks is
                waited for a quarter of a second): for a server that only replays graphs, where no op is called that
                could raise. Whatever it raises is logged. It is held by the workspace alone

    Attributes: handle (what the ops take), rank, world_size, device, transport, transport_reason, nbytes (a rank),
    max_tokens, hidden, dtype, strategy, on_fault.
    A workspace is what it is for, not a value: `copy` and `deepcopy` give the workspace itself, and it cannot be
    pickled. Its handle is of use in this process alone.
    Errors: arguments that make no sense are refused before any rank is waited for (`ValueError`; a row size that no op
    takes, `RuntimeError`); everything else is `BringUpError` on every rank alike, naming rank, step and cause.
    """

    def __init__(
        self,
        group: AnyGroup,
        max_tokens: int,
        hidden: int,
        dtype: torch.dtype,
        *,
        device: torch.device | str | int | None = None,
        max_bytes: int | None = DEFAULT_MAX_BYTES,
        transport: str = "auto",
        strategy: str = "auto",
        pdl: str = "auto",
        deadline: float | None = DEFAULT_DEADLINE,
        hold: float = 0.0,
        timeout: float = 60.0,
        retry: bool = False,
        max_ctas: int | None = None,
        concurrent: bool = True,
        monitor: bool = True,
        on_fault: Callable[[WorkspaceBroken], object] | None = None,
    ) -> None:
        self._memory: SymmetricMemory | None = None
        self._turn, self._asleep = Turn(), False
        self._mapping = threading.RLock()  # held while memory is looked at, or goes
        self.handle, self._monitor, self.on_fault, self._pid = 0, monitor, on_fault, os.getpid()
        if not (on_fault is None or callable(on_fault)):
            raise ValueError(f"on_fault: is {on_fault!r}, wanted a function that takes the error, or None")
        dtype = dtype_of(dtype)
        members, max_tokens, hidden = Members(group), count("max_tokens", max_tokens), count("hidden", hidden)
        hold = 0.0 if hold == 0 else seconds("hold", hold)
        deadline, timeout, max_bytes = (
            deadline_of(deadline),
            seconds("timeout", timeout),
            bytes_or_none("max_bytes", max_bytes),
        )
        most_ctas = 0 if max_ctas is None else count("max_ctas", max_ctas)
        self.device, self.world_size, self.rank = device_of(device), members.size, members.rank
        check_transport(transport, self.device.type)
        chosen, mode = _member(Strategy, strategy, "strategy"), _member(Pdl, pdl, "pdl")
        self.max_tokens, self.hidden, self.dtype, self.strategy = max_tokens, hidden, dtype, strategy
        self._group = members.name
        row_bytes, table, own_too = hidden * dtype.itemsize, Table(), _brings_own_rows(self.device, transport)

        def slot_of(table: Table) -> int:
            return table.slot_bytes(
                self.world_size, max_tokens, row_bytes, chosen, own_too=own_too, max_bytes=max_bytes
            )

        # Refuses bad sizes while nobody waits. What depends on this machine is for `prepare`, so that peers hear.
        slot_bytes = slot_of(table)

        def prepare() -> Request:
            nonlocal table, slot_bytes
            self.device = with_index(self.device)
            table = table_for(self.device, self.world_size)
            slot_bytes = slot_of(table)
            layout, goes_by = Layout(slot_bytes), f"{table.digest()}: {table}"
            checks = str(int(crosscheck.is_on()))
            alike = {crosscheck.SWITCH: checks, "strategy": strategy, "strategy table": goes_by}
            return Request(layout.nbytes, layout.fills, layout.probe_offset, self.device, transport, alike, retry)

        def undo() -> None:
            try:
                if self.handle:
                    ops._workspace_close(self.handle, True)
            finally:
                watchers.forget(self.handle)

        def use(pointers: tuple[int, ...], multicast_pointer: int) -> Callable[[], object]:
            if monitor:
                watchers.start()  # here, where there may be no room for a thread on one rank: all hear of it
            try:
                self.handle = create(
                    pointers,
                    self.rank,
                    self.device,
                    slot_bytes,
                    table,
                    multicast_pointer=multicast_pointer,
                    strategy=chosen,
                    pdl=mode,
                    deadline=deadline,
                    hold=hold,
                    launch=LaunchShape(max_ctas=most_ctas),
                    concurrent=concurrent,
                )
            except BaseException:
                undo()
                raise
            return undo

        _give_back_kept()
        self._memory = allocate(group, prepare, timeout=timeout, use=use)
        self._dropped = weakref.finalize(self, _tell_of_dropped, self.handle, self._memory.nbytes, self._pid)
        self._dropped.atexit = False
        try:
            self._begin(Layout(slot_bytes), deadline)
        except BaseException:  # peers have this workspace by now, and are told that this rank has not
            self.close(force=True)
            raise

    def _begin(self, layout: Layout, deadline: float | None) -> None:
        """What is left to do when all ranks have voted."""
        assert self._memory is not None
        ops._workspace_processors(self.handle, self._memory.processors)
        self._memory.stand_in = functools.partial(_asleep_fills, self.handle, layout.asleep)
        self._memory.lifeline.next_epoch = functools.partial(ops._workspace_epoch, self.handle)
        self.transport, self.transport_reason = self._memory.transport, self._memory.reason
        self.nbytes = self._memory.nbytes
        self._deadline = deadline
        if crosscheck.is_on():
            crosscheck.watch(self.handle, self.rank, self.world_size)
        _log.log(logging.INFO if self.rank == 0 else logging.DEBUG, "%r: %s", self, self.transport_reason)
        self._watch()

    @property
    def deadline(self) -> float | None:
        """Seconds that a call waits for its peers; None for ever. May be set at any time but asleep: calls that wait
        obey it, and so do captured ones. Each rank sets its own."""
        return self._deadline

    @deadline.setter
    def deadline(self, value: float | None) -> None:
        deadline = deadline_of(value)
        self._awake("deadline")
        ops._workspace_deadline(self.handle, nanoseconds(deadline))
        self._deadline = deadline

    @property
    def is_asleep(self) -> bool:
        """Whether it is between `sleep` and `wake`, or in `close`: no op may be called."""
        return self._asleep

    @property
    def calls(self) -> int:
        """Calls that have begun on this rank since the workspace was made or woken, as the device counts them: a
        captured call counts each time it runs, and one in pieces once. Modulo 2^32 - 1. A copy of 32 bytes that waits
        for no call; not for a thread that captures. Raises `MnnvlArError` if it is closed or asleep."""
        self._mapped("calls")  # in a forked child nobody may give the lock back
        with self._mapping:
            memory = self._mapped("calls")
            if self._asleep:
                raise MnnvlArError("calls: this workspace is asleep, or on its way")
            own = memory.pointers[memory.rank]
            launches, later = _STATE.unpack(memory._block.driver.read(own, _STATE.size))
        return int((launches - later) % _EPOCHS)

    @staticmethod
    def bytes_for(
        world_size: int,
        max_tokens: int,
        hidden: int,
        dtype: torch.dtype,
        *,
        device: torch.device | str | int | None = None,
        max_bytes: int | None = DEFAULT_MAX_BYTES,
        transport: str = "auto",
        strategy: str = "auto",
    ) -> int:
        """The bytes of each GPU that a workspace with these arguments takes, in a group of `world_size` ranks; what the
        driver maps is that, rounded up to its granularity (2 MiB, or more with multicast). Makes nothing and waits for
        nobody. Errors: as the workspace's."""
        dtype = dtype_of(dtype)
        place, ranks = device_of(device), count("world_size", world_size)
        slot_bytes = table_for(with_index(place), ranks).slot_bytes(
            ranks,
            count("max_tokens", max_tokens),
            count("hidden", hidden) * dtype.itemsize,
            _member(Strategy, strategy, "strategy"),
            own_too=_brings_own_rows(place, transport),
            max_bytes=bytes_or_none("max_bytes", max_bytes),
        )
        return Layout(slot_bytes).nbytes

    def fits(self, tokens: int, hidden: int, dtype: torch.dtype, strategy: str = "auto") -> bool:
        """Whether a call of [tokens, hidden] of `dtype` that asks for `strategy` can run, if need be in pieces: what
        calls are held against, alike on all ranks. True for any number of tokens if one row fits; False for a dtype
        that rows cannot have. "auto": as the workspace has it. `MnnvlArError` if it is closed or asleep."""
        self._awake("fits")
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype: is {dtype!r}, wanted a torch.dtype")
        tokens, hidden, chosen = (
            whole("tokens", tokens),
            whole("hidden", hidden),
            _member(Strategy, strategy, "strategy"),
        )
        return dtype in DTYPES and bool(ops._workspace_fits(self.handle, tokens, hidden * dtype.itemsize, chosen))

    def check(self) -> None:
        """Raises `PeerTimeout` (also as `PeerGone`), `CallMismatch` or `WorkspaceBroken` if a call on this workspace
        failed, here or, as far as this rank has been told, on a peer, or if a peer's process has died; `MnnvlArError`
        if it is closed or asleep, and nobody can tell, but what became of a graph that was replayed since and, as long
        as there are graphs that keep a closed one's memory, of calls before.
        Waits for nothing; on a GPU it costs a copy of 16 KiB."""
        if self.handle and os.getpid() == self._pid and (self._memory is None or self._memory.is_dropped):
            fault = read_fault(self.handle)
            if fault is not None and (self._memory is None or fault.code == ASLEEP_FAULT):
                raise fault.error()
        self._awake("check")
        raise_fault(self.handle)

    def close(self, force: bool = False) -> None:
        """Gives the memory back, once the calls of this rank have ended. Not collective; may be called twice, after the
        group is gone, or at exit. Peers are told once the memory goes: their later calls end, with `PeerGone`.

        If calls were captured, graphs that hold them may still run: ops raise from now on, but the memory stays mapped
        until those graphs are destroyed, and is given back when a workspace is made or closed after that; until then
        the monitor still says what becomes of a replay, and `on_fault` is called while the workspace lives. `force`
        gives it back all the same, and ends calls that still wait for a peer, in other threads too; a graph that is
        replayed afterwards computes nothing: its outputs are NaN, and the monitor says so (of the addresses, which then
        lead to 2 MiB, the rest is as above). Where a graph is being captured nobody can wait for the calls: then
        `force` raises `RuntimeError`, the workspace is broken, and is to be closed again; the capture may be lost.

        With transport "multicast" the addresses lead nowhere when this returns, but the memory goes only when all ranks
        have closed or put to sleep their workspaces, as those that have not may still send to it; or with the process.

        While another thread closes it, wakes it or puts it to sleep this waits for that: for the timeout of `wake`, or
        as long as calls that were queued wait for a peer, which `force` ends.
        """
        if os.getpid() != self._pid:
            return
        hurry = self._end_calls if force else None
        with self._turn.of("close", hurry):  # whoever comes second finds nothing left to close
            if self._memory is not None:
                self._close(force)
        _give_back_kept()

    def _close(self, force: bool) -> None:
        may_unmap = ops._workspace_close(self.handle, force)
        with self._mapping:
            memory = self._memory
            assert memory is not None
            self._asleep = True  # `calls` looks at nothing from here on. The marks of what is done come last
            self._dropped.detach()
            if may_unmap and not ops._workspace_graphs(self.handle):
                memory.close()  # interrupted, it is to be closed again
                watchers.forget(self.handle)
            elif may_unmap:
                memory.drop(CLOSED)
                kept = Replayed(self)
                self._watch(kept, memory)  # before another thread may find it gone, and forget it
                _kept.append((self.handle, memory, kept))
            else:
                kept = Replayed(self)
                _kept.append((self.handle, memory, kept))
                watchers.pass_on(self.handle, kept)
            self._memory = None
            self._asleep = False

    def sleep(self) -> None:
        """Gives the physical memory back and keeps the addresses, captured graphs included, once the calls of this rank
        have ended. Not collective. Until `wake`, ops raise, and a graph that is replayed computes nothing: its outputs
        are NaN, the monitor says so, and `check` raises it (for that, 2 MiB stay where there are such graphs). No graph
        may be replayed while this runs, nor while `wake` does. With transport "multicast" the memory goes when all
        ranks sleep (see `close`)."""
        self._sleep("sleep", ASLEEP)

    def wake(self, group: AnyGroup, timeout: float = 60.0) -> None:
        """New memory at the same addresses, as if no call had been made. Collective over `group`: the same ranks, all
        of them asleep or broken. Raises `BringUpError` on all ranks alike; it may then be tried again, or closed. The
        `timeout` begins when what this GPU has queued, for others too, has ended."""
        self._mapped("wake")
        timeout = seconds("timeout", timeout)
        with self._turn.of("wake", self._end_calls):
            memory = self._mapped("wake")  # another thread may have closed it meanwhile
            was_awake = not memory.is_dropped
            with self._mapping:
                self._asleep = True
            # Sleeping is for `recover`, and does nothing to one that sleeps. It fails on one rank alone if that
            # captures.
            try:
                memory.restore(group, timeout, quiesce=lambda: ops._workspace_sleep(self.handle, True))
            except BaseException:
                self._watch_replays(was_awake)
                raise
            finally:
                self._asleep = memory.is_dropped
            self.transport, self.transport_reason = memory.transport, memory.reason
            ops._workspace_processors(self.handle, memory.processors)
            watchers.begin_anew(self.handle)
            ops._workspace_reset(self.handle)
            self._watch()

    def recover(self, group: AnyGroup, timeout: float = 60.0) -> None:
        """After a fault: brings the full group back, the same processes, without a restart. As `wake`; captured graphs
        work again. Calls that still wait on this rank, in other threads too, end with NaN. If a rank is lost, close,
        and make another workspace over the survivors."""
        self.wake(group, timeout)

    def checkpoint_prepare(self) -> None:
        """As `sleep`, for a checkpoint of the whole process: peers are told that, and this workspace leaves no socket
        and no descriptor behind; the last one that is watched in this process, no thread either. A second call, or one
        of a workspace that sleeps, does nothing.

        With transport "multicast" this waits up to 60 s for all ranks to be asleep or closed, as nothing is given back
        before; with several workspaces, all ranks prepare them in one order. `MnnvlArError` names those that are not:
        the workspace is asleep then, and may be prepared again."""
        staying = self._sleep("checkpoint_prepare", CHECKPOINT).await_parting(_CHECKPOINT_SECONDS)
        if staying:
            names = f"rank{'s' if len(staying) > 1 else ''} {', '.join(map(str, staying))}"
            raise MnnvlArError(
                f"checkpoint_prepare: {names} may still send to the memory of this one, by multicast: neither asleep "
                "nor closed, as far as this rank has heard"
            )

    def checkpoint_restore(self, group: AnyGroup, timeout: float = 60.0) -> None:
        """In the process as it was, or as it was restored: as `wake`."""
        self.wake(group, timeout)

    def _sleep(self, verb: str, how: int) -> SymmetricMemory:
        ended: list[threading.Thread] = []
        self._mapped(verb)
        with self._turn.of(verb):
            memory = self._mapped(verb)
            was_awake = not memory.is_dropped
            ops._workspace_sleep(self.handle, False)
            with self._mapping:
                self._asleep = True
                memory.drop(how)
            if how == CHECKPOINT or not ops._workspace_graphs(self.handle):
                ended = watchers.forget(self.handle)
            else:
                self._watch_replays(was_awake)
        if how == CHECKPOINT:
            watchers.join(ended)  # out of turn: an `on_fault` may close
        return memory

    def _watch_replays(self, was_awake: bool) -> None:
        """Of one that sleeps now: a fault that was told is over, and what becomes of a replay is to be told."""
        if was_awake and self._memory is not None and self._memory.is_dropped and ops._workspace_graphs(self.handle):
            self._watch()

    def _end_calls(self) -> None:
        ops._workspace_end_calls(self.handle)

    def _mapped(self, verb: str) -> SymmetricMemory:
        if os.getpid() != self._pid:
            raise MnnvlArError(f"{verb}: this workspace belongs to the parent of this forked process")
        if self._memory is None:
            raise MnnvlArError(f"{verb}: this workspace is closed")
        return self._memory

    def _awake(self, verb: str) -> None:
        if self._mapped(verb).is_dropped:
            raise MnnvlArError(f"{verb}: this workspace is asleep; wake() first")

    def _watch(self, owner: watchers.Watched | None = None, memory: SymmetricMemory | None = None) -> None:
        memory = memory or self._memory
        if self._monitor:
            assert memory is not None
            watchers.watch(self.handle, owner or self, memory.lifeline)

    def __copy__(self) -> Workspace:
        return self

    def __deepcopy__(self, memo: object) -> Workspace:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Workspace cannot be pickled, nor sent to another process: its memory is this process's. Make one there"
        )

    def __enter__(self) -> Workspace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if not self.handle:
            return "Workspace(not made)"
        state = ", closed" if self._memory is None else ", asleep" if self._memory.is_dropped else ""
        return (
            f"Workspace(handle={self.handle}, group={self._group}, rank={self.rank}/{self.world_size}, "
            f"tokens={self.max_tokens}, hidden={self.hidden}, dtype={self.dtype}, strategy={self.strategy}, "
            f"device={self.device}, transport={self.transport}, nbytes={self.nbytes}{state})"
        )


def dtype_of(dtype: object) -> torch.dtype:
    """One that rows may have, or `ValueError`."""
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        raise ValueError(f"dtype: is {dtype}, wanted one of {', '.join(map(str, DTYPES))}")
    return dtype


def _brings_own_rows(device: torch.device, transport: str) -> bool:
    """Whether a rank's own rows may come to it, too, as by a multicast: then slots have room for them."""
    return device.type == "cuda" and transport != "unicast"


def _give_back_kept() -> None:
    """The memory of closed workspaces whose graphs are gone by now. Of two threads one does it."""
    for entry in list(_kept):
        handle, memory, _ = entry
        if ops._workspace_close(handle, False) and not ops._workspace_graphs(handle):
            try:
                _kept.remove(entry)
            except ValueError:  # the other one has
                continue
            memory.close()
            watchers.forget(handle)


class Replayed:
    """Stands in for a workspace that was closed, while graphs may still be replayed: it has its `on_fault`, as long as
    the workspace lives."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = weakref.ref(workspace)

    @property
    def on_fault(self) -> Callable[[WorkspaceBroken], object] | None:
        workspace = self._workspace()
        return None if workspace is None else workspace.on_fault


def _asleep_fills(handle: int, fills: tuple[Fill, ...]) -> tuple[Fill, ...]:
    """What is to stand in for blocks whose memory goes: only captured graphs can come to them."""
    return fills if ops._workspace_graphs(handle) else ()


def _tell_of_dropped(handle: int, nbytes: int, pid: int) -> None:
    """The ops take plain integers, so that nobody holds a workspace says nothing about who may still call on it."""
    if os.getpid() == pid:
        text = "workspace %d was dropped without close(): its %d bytes stay mapped until the process ends"
        _log.warning(text, handle, nbytes)


def _member(kind: type[Strategy] | type[Pdl], name: str, argument: str) -> int:
    names = [member.name.lower() for member in kind]
    if name not in names:
        raise ValueError(f"{argument}: is {name!r}, wanted one of {', '.join(names)}")
    return int(kind[name.upper()])
