"""A group's workspace: symmetric memory, and how calls on it are to be run."""

from __future__ import annotations

import math
from types import TracebackType

import torch
import torch.distributed as dist

from mnnvl_ar._library import ops
from mnnvl_ar.diagnosis import raise_fault
from mnnvl_ar.memory import Fill, SymmetricMemory, allocate
from mnnvl_ar.ops import Pdl, Strategy
from mnnvl_ar.strategy import one_shot_bytes

DEFAULT_DEADLINE = 600.0  # seconds; ranks of a server may honestly be minutes apart while they compile or capture
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Workspace:
    """What the ops need to exchange data within `group`. Making one is collective over `group`; nothing else is.

    group:      the `ProcessGroup` of the ranks, gloo or NCCL, any subgroup; there is no default
    max_tokens, hidden, dtype: the largest call, [max_tokens, hidden]; smaller ones and other dtypes may share the workspace,
                `fits` tells
    device:     a CUDA device, by default the current one; "cpu" for the host transport
    transport:  "auto", "unicast", "multicast" or, implied by device "cpu", "host"
    strategy:   "auto", "one_shot" or "two_shot", for calls that do not say
    pdl:        "off", "late" or "early", for calls that do not say (see `Pdl`)
    deadline:   seconds that a call waits for its peers before it ends with an error; None for ever
    timeout:    seconds that making the workspace may take
    max_ctas:   an upper bound on the CTAs of a call; None: what the device holds at once, divided by the workspaces
                open on it, so that they may run side by side on several streams

    Attributes: handle (what the ops take), rank, world_size, device, transport, transport_reason, nbytes (a rank).
    Errors: `BringUpError` on every rank alike, naming rank, step and cause.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        max_tokens: int,
        hidden: int,
        dtype: torch.dtype,
        *,
        device: torch.device | str | int | None = None,
        transport: str = "auto",
        strategy: str = "auto",
        pdl: str = "early",
        deadline: float | None = DEFAULT_DEADLINE,
        timeout: float = 60.0,
        max_ctas: int | None = None,
    ) -> None:
        self._memory: SymmetricMemory | None = None
        self.handle = 0
        if dtype not in DTYPES:
            raise ValueError(f"dtype: is {dtype}, wanted one of {', '.join(map(str, DTYPES))}")
        if max_tokens < 1:
            raise ValueError(f"max_tokens: is {max_tokens}, wanted at least 1")
        self.device = _device(device)
        self.world_size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        chosen = _member(Strategy, strategy, "strategy")
        crossover = one_shot_bytes(self.world_size, self.device)
        slot_bytes = ops._workspace_slot_bytes(self.world_size, max_tokens, hidden * dtype.itemsize, chosen, crossover)
        layout = Layout(slot_bytes)
        self._memory = allocate(
            group,
            layout.nbytes,
            layout.fills,
            probe_offset=layout.probe_offset,
            device=self.device,
            transport=transport,
            timeout=timeout,
        )
        self.transport, self.transport_reason = self._memory.transport, self._memory.reason
        self.nbytes = self._memory.nbytes
        self.handle = create(
            self._memory.pointers,
            self.rank,
            self.device,
            slot_bytes,
            multicast_pointer=self._memory.multicast_pointer,
            strategy=chosen,
            pdl=_member(Pdl, pdl, "pdl"),
            deadline=deadline,
            one_shot_bytes=crossover,
            max_ctas=max_ctas or 0,
        )

    def fits(self, tokens: int, hidden: int, dtype: torch.dtype) -> bool:
        """Whether a call of [tokens, hidden] of `dtype` can run: what every call is held against. The same on all ranks."""
        return dtype in DTYPES and bool(ops._workspace_fits(self.handle, tokens, hidden * dtype.itemsize))

    def check(self) -> None:
        """Raises `PeerTimeout`, `CallMismatch` or `WorkspaceBroken` if a call on this workspace failed. Cheap: reads host memory."""
        raise_fault(self.handle)

    def close(self) -> None:
        """Gives the memory back. Not collective; may be called twice, after the group is gone, or at exit."""
        memory, self._memory = self._memory, None
        if memory is None:
            return
        if self.handle:
            ops._workspace_close(self.handle)
        memory.close()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"Workspace(handle={self.handle}, rank={self.rank}/{self.world_size}, device={self.device}, "
            f"transport={self.transport}, nbytes={self.nbytes}{'' if self._memory else ', closed'})"
        )


class Layout:
    """The block of a workspace whose slots have `slot_bytes`: its size, and what it holds before the first call."""

    def __init__(self, slot_bytes: int) -> None:
        nbytes, control, board, board_bytes, probe, sentinel, no_epoch, _ = ops._block_layout(slot_bytes)
        self.nbytes: int = nbytes
        self.probe_offset: int = probe
        self.fills = (
            Fill(0, control, 0),
            Fill(board, board_bytes, no_epoch),
            Fill(control, nbytes - control, sentinel),
        )


def create(
    pointers: tuple[int, ...],
    rank: int,
    device: torch.device,
    slot_bytes: int,
    *,
    multicast_pointer: int = 0,
    strategy: int = Strategy.AUTO,
    pdl: int = Pdl.EARLY,
    deadline: float | None = DEFAULT_DEADLINE,
    one_shot_bytes: int = 0,
    cluster: int = 0,
    max_ctas: int = 0,
    batch: int = 0,
    lag: int = 0,
) -> int:
    """Makes a handle for blocks that are mapped and filled (`Layout`); `Workspace` without the memory. Order as in C++."""
    deadline_ns = 0 if deadline is None or math.isinf(deadline) else max(1, round(deadline * 1e9))
    index = -1 if device.type == "cpu" else device.index
    settings = [index, rank, slot_bytes, deadline_ns, strategy, pdl, one_shot_bytes, cluster, max_ctas, batch, lag]
    return int(ops._workspace_create(settings, list(pointers), multicast_pointer))


def _device(device: torch.device | str | int | None) -> torch.device:
    if device is None:
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: is {device}, wanted a CUDA device or cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _member(kind: type[Strategy] | type[Pdl], name: str, argument: str) -> int:
    names = [member.name.lower() for member in kind if member.name != "WORKSPACE"]
    if name not in names:
        raise ValueError(f"{argument}: is {name!r}, wanted one of {', '.join(names)}")
    return int(kind[name.upper()])
