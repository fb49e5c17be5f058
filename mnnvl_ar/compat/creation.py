"""`create_allreduce_fusion_workspace`: ours if it can be made, else what all ranks do together.

    vote      every rank's arguments make sense, and what it has to share
    bring-up  voted by itself; its failure is the same on all ranks
    vote      after a failure: is everybody still there, on one host, and may all of them go to FlashInfer's trtllm?

So of ranks that come here either all get a workspace of ours, or all go to the original with "trtllm", or all raise.
None ever gets FlashInfer's mnnvl from here: that makes NVLink multicast, which on a shared machine can take other
users' GPUs down. Its trtllm, asked for or fallen back to, is made without (`without_multicast`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist

from mnnvl_ar.arguments import count
from mnnvl_ar.compat import counted, policy
from mnnvl_ar.compat.settings import Settings
from mnnvl_ar.compat.shared import Shared
from mnnvl_ar.compat.without_multicast import without_multicast
from mnnvl_ar.compat.workspace import FusionWorkspace
from mnnvl_ar.errors import MnnvlArError, WorkspaceBroken
from mnnvl_ar.memory import AnyGroup, Members, agree, hosts, multicast_refusal
from mnnvl_ar.workspace import Workspace, dtype_of

PATIENCE = 30.0  # seconds between ranks after a failure, which was the same on all of them
# A program's own, in place of the policy: called once with the error when a call on a workspace made from now on has
# failed, and that call is held until it has returned.
on_fault: Callable[[WorkspaceBroken], object] | None = None

_log = logging.getLogger("mnnvl_ar")


def created(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In place of `original`, FlashInfer's function, of any release from 0.6.8.post1 on; collective, as it is.

    Ours if `backend` is (`Settings.ours`). Then of the arguments
      world_size, rank:     have to be the group's
      max_token_num, hidden_dim, dtype: of the largest input. A promise in bytes: other shapes of as many are taken too
      group, comm_backend:  the ranks: a ProcessGroup's store, else one all-gather of the CommBackend, else all ranks
      gpus_per_node, force_oneshot_support, use_fp32_lamport: ignored
    and any other that is not None is a `TypeError` that names it. Raises what FlashInfer raises if all ranks go there,
    and else `MnnvlArError`, alike on all ranks.
    """
    settings = Settings.read()
    backend = kwargs.get("backend", args[0] if args else "auto")
    pose = settings.ours(backend)
    if not pose:
        _refuse_by_accident(backend)
        with without_multicast() if backend == "trtllm" else contextlib.nullcontext():
            return original(*args, **kwargs)
    asked = _Asked(*args, **kwargs)
    try:
        return _made(asked, pose, settings)
    except MnnvlArError as error:
        _agree_to_fall_back(asked.group, settings, error, "FlashInfer's trtllm", one_host=True)
    with without_multicast():
        if args:
            return original("trtllm", *args[1:], **kwargs)
        return original(**{**kwargs, "backend": "trtllm"})


def joined(
    group: AnyGroup, tokens: int, hidden: int, dtype: torch.dtype, settings: Settings, instead: str
) -> FusionWorkspace | None:
    """For calls of our ops without FlashInfer: a workspace over `group`, by the same policies. None, on all ranks,
    where it cannot be made and all may go on with `instead`, the server's own; else `MnnvlArError`, alike on all ranks.
    """
    try:
        return _made(_Asked(max_token_num=tokens, hidden_dim=hidden, dtype=dtype, group=group), "ops", settings)
    except MnnvlArError as error:
        _agree_to_fall_back(group, settings, error, instead, one_host=False)
        return None


class _Asked:
    """FlashInfer's arguments, in its order, as they are given."""

    def __init__(
        self,
        backend: str = "auto",
        world_size: int | None = None,
        rank: int | None = None,
        max_token_num: int | None = None,
        hidden_dim: int | None = None,
        dtype: torch.dtype | None = None,
        gpus_per_node: int | None = None,
        comm_backend: AnyGroup | None = None,
        force_oneshot_support: bool = False,
        group: AnyGroup | None = None,
        *,
        use_fp32_lamport: bool | None = None,
        **newer: Any,
    ) -> None:
        self.world_size, self.rank = world_size, rank
        self.tokens, self.hidden, self.dtype = max_token_num, hidden_dim, dtype
        self.unknown = [name for name, value in newer.items() if value is not None]
        # A process group's store needs no collective, and bounds every wait.
        self.group: Any = next((given for given in (group, comm_backend, dist.group.WORLD) if given is not None), None)
        if self.group is None:
            raise ValueError("group: neither it nor comm_backend is given, and torch.distributed is not initialised")
        self.members = Members(self.group)

    def checked(self) -> tuple[int, int, torch.dtype]:
        """Tokens, hidden and dtype; or what makes no sense here, which may be so on one rank alone."""
        if self.unknown:
            raise TypeError(f"{self.unknown[0]}: mnnvl_ar's create_allreduce_fusion_workspace does not know it")
        for name, value, of_group in (
            ("world_size", self.world_size, self.members.size),
            ("rank", self.rank, self.members.rank),
        ):
            if value is not None and value != of_group:
                raise ValueError(f"{name}: is {value}, the group has {of_group}")
        dtype = dtype_of(self.dtype)
        size = count("max_token_num", self.tokens), count("hidden_dim", self.hidden), dtype
        Workspace.bytes_for(self.members.size, *size)  # raises for rows, or a group, that no op takes
        return size


def _made(asked: _Asked, pose: str, settings: Settings) -> FusionWorkspace:
    """Raises `BringUpError`, alike on all ranks."""
    trouble: Exception | None = None
    size: tuple[int, int, torch.dtype] = (1, 8, torch.float32)  # of nothing; what goes wrong below is voted on
    try:
        size = asked.checked()
    except (TypeError, ValueError, RuntimeError) as error:
        trouble = error
    with Shared.of(asked.group, *size) as found:
        alike = {"backend": pose, "max_token_num": size[0], "hidden_dim": size[1], "dtype": str(size[2])}
        mine = {"ticket": found.ticket if found else 0, **alike}
        told = agree(asked.group, mine, step="arguments", trouble=trouble, timeout=settings.timeout)
        for rank, each in enumerate(told):
            if odd := next((name for name in alike if each[name] != told[0][name]), ""):
                raise MnnvlArError(f"{odd} differs: rank {rank} has {each[odd]}, rank 0 has {told[0][odd]}")
        if found is not None and all(each["ticket"] == found.ticket for each in told):
            shared = found
        else:
            answer = on_fault or policy.handler(settings)
            inner = Workspace(
                asked.group,
                *size,
                concurrent=False,  # calls of a server follow each other; two at once end in an error that says so
                pdl=settings.pdl,
                timeout=settings.timeout,
                deadline=policy.deadline(settings),
                hold=settings.hold if answer else 0.0,
                on_fault=answer,
            )
            policy.adopt(inner, settings)
            counted.watch(inner, settings)
            shared = Shared(inner, asked.group)
        made = FusionWorkspace(shared, pose, *size, pdl=settings.pdl)
    _log.info("%s", _described(made, shared, size, settings))
    return made


def _described(made: FusionWorkspace, shared: Shared, size: tuple[int, int, torch.dtype], settings: Settings) -> str:
    inner, (tokens, hidden, dtype) = shared.workspace, size
    fault = "a fault is logged, and calls end with NaN"
    if on_fault or policy.handler(settings):
        what = "is for this program's on_fault" if on_fault else f"ends the process with status {policy.STATUS}"
        fault = f"a fault {what}, and its call is held up to {settings.hold:g} s"
    served = policy.deadline_served(settings)
    later = f", {served:g} s once it serves" if inner.deadline != served else ""
    others = f", shared with {shared.users - 1} more" if shared.users > 1 else ""
    mode = f"; PDL {settings.pdl}" if settings.pdl != "auto" else ""
    return (
        f"mnnvl_ar {version()}: workspace {made.handle} for {made.backend}, rank {made.rank} of {made.world_size}, "
        f"up to [{tokens}, {hidden}] {dtype}: {inner.transport_reason}; {inner.nbytes} bytes of each GPU{others}; "
        f"deadline {inner.deadline:g} s{later}{mode}; {fault}"
    )


def _agree_to_fall_back(
    group: AnyGroup, settings: Settings, error: MnnvlArError, instead: str, *, one_host: bool
) -> None:
    """Returns, on all ranks, if all are there and none minds, and if all are on one host where `instead` is for
    `one_host`; else raises `error` on all."""
    mine = {"willing": settings.fallback, "host": hosts.identity()}
    try:
        told = agree(group, mine, step="fallback", timeout=min(PATIENCE, settings.timeout))
    except MnnvlArError as later:
        raise error from later
    if why := _obstacle(told, one_host):
        policy.tell_once(f"no workspace of mnnvl_ar, and no other ({why}): {error}")
        raise error
    policy.tell_once(f"{instead} instead of mnnvl_ar, on all ranks (rank {Members(group).rank} here): {error}")


def _obstacle(told: list[dict[str, Any]], one_host: bool) -> str:
    """What keeps ranks, of which each told whether it is willing and its host, from falling back; empty if nothing."""
    for rank, each in enumerate(told):
        if not each["willing"]:
            return f"MNNVL_AR_FALLBACK=0 on rank {rank}"
    for rank, each in enumerate(told):
        if one_host and each["host"] != told[0]["host"]:
            here, there = hosts.name_of(told[0]["host"]), hosts.name_of(each["host"])
            return f"trtllm is for one host: rank 0 is on {here}, rank {rank} on another, {there}"
    return ""


def _refuse_by_accident(backend: str) -> None:
    """MNNVL_AR_BACKENDS may leave "mnnvl" to FlashInfer, but not where multicast is switched off: it would try."""
    why = multicast_refusal()
    if backend in ("mnnvl", "auto") and why:
        raise MnnvlArError(
            f"backend: {backend!r} is FlashInfer's by MNNVL_AR_BACKENDS, and would make NVLink multicast, which is "
            f"switched off by {why}; ask for 'trtllm', or leave 'mnnvl' to mnnvl_ar"
        )


def version() -> str:
    try:
        return metadata.version("mnnvl-ar")
    except metadata.PackageNotFoundError:  # a bare folder on PYTHONPATH
        return "(not installed)"
