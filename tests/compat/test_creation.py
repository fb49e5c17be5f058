"""`create_allreduce_fusion_workspace`: life cycles, sharing, and that all ranks do the same whatever happens to one."""

from __future__ import annotations

import functools
import gc
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from common.ranks import GRACE, Rank, RankPool, rank_pool
from compat.front import HIDDEN, TOKENS, create, installed, rows, same_on_all, works
from compat.stand_in import ORIGINAL, standing_in
from mnnvl_ar.compat import creation, flashinfer, policy
from mnnvl_ar.compat.without_multicast import SWITCH, without_multicast
from mnnvl_ar.compat.workspace import FusionWorkspace
from mnnvl_ar.errors import BringUpError, MnnvlArError
from mnnvl_ar.memory import MULTICAST_SWITCHES, DriverError, hosts
from mnnvl_ar.memory.vote import hooks
from mnnvl_ar.workspace import Workspace


@contextmanager
def logged() -> Iterator[list[str]]:
    """What our logger says meanwhile."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("mnnvl_ar")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


@contextmanager
def failing(step: str, here: bool) -> Iterator[None]:
    """A driver that fails at this step of bring-up, on this rank."""

    def enter(entered: str) -> None:
        if here and entered == step:
            raise DriverError("cuSimulated", "CUDA_ERROR_SIMULATED", "injected")

    hooks.enter = enter
    try:
        yield
    finally:
        hooks.enter = None


def view(rank: Rank, version: str, backend: str, alone: bool) -> None:
    """What callers read of a workspace. `alone`: brought up by the CommBackend and nothing else."""
    with installed(version) as comm, logged() as lines:
        backbone = comm.TorchDistBackend(rank.group)
        given = {"group": None} if alone else {}
        workspace = create(comm, rank, backend=backend, comm_backend=backbone, **given)
        assert isinstance(workspace, comm.AllReduceFusionWorkspace)
        assert workspace.backend == ("mnnvl" if backend == "auto" else backend)
        assert (workspace.world_size, workspace.rank, workspace.tp_size) == (
            rank.world_size,
            rank.rank,
            rank.world_size,
        )
        assert workspace.mc_ptr
        assert workspace.metadata["use_fp32_lamport"] is False
        assert backbone.gathered == (2 if alone else 0)  # the vote and bring-up: one each
        assert works(workspace, comm)
        (line,) = [each for each in lines if f"rank {rank.rank} of" in each]
        for words in ("mnnvl_ar", f"[{TOKENS}, {HIDDEN}]", "host over memfd", "bytes of each GPU", "deadline 200 s"):
            assert words in line
        workspace.destroy()
        workspace.destroy()
        assert comm.calls == []


@pytest.mark.parametrize(
    ("version", "backend", "alone"),
    [
        ("0.6.8.post1", "mnnvl", True),
        ("0.6.8.post1", "trtllm", True),
        ("0.7.4", "auto", False),
        ("0.7.4", "mnnvl", False),
    ],
)
def test_what_callers_see(version: str, backend: str, alone: bool) -> None:
    rank_pool(2).run(view, version, backend, alone)


def lives(rank: Rank) -> None:
    with installed() as comm:
        first = create(comm, rank)
        again = create(comm, rank, backend="trtllm", dtype=torch.float32, max_token_num=4)  # needs no more memory
        assert first is not again  # vLLM keeps them by identity
        assert first.handle == again.handle
        assert again.metadata["use_fp32_lamport"]
        first.destroy()
        assert works(again, comm, 2)  # the memory is there until the last of them is destroyed
        with pytest.raises(MnnvlArError, match="was destroyed"):
            works(first, comm)

        larger = create(comm, rank, max_token_num=64 * TOKENS)  # while the other lives, as a wider draft model asks
        assert larger.handle != again.handle
        assert works(larger, comm, 40)
        assert works(again, comm, 2)
        again.destroy()
        larger.destroy()
        with pytest.raises(RuntimeError, match="closed"):
            comm.allreduce_fusion(rows(0), mock.Mock(spec=FusionWorkspace, handle=larger.mc_ptr, promised=1 << 20), 0)

        for _ in range(3):  # SGLang destroys, then creates
            made = create(comm, rank)
            assert works(made, comm)
            made.destroy()

        subgroup = dist.new_group(list(range(rank.world_size)))  # the same peers, another group: another workspace
        one, other = create(comm, rank), create(comm, rank, group=subgroup)
        assert one.handle != other.handle
        for each in (one, other, one):
            assert works(each, comm)
        one.destroy()
        other.destroy()


def test_life_cycles_and_sharing() -> None:
    rank_pool(2).run(lives)


def sleeps(rank: Rank) -> None:
    with installed() as comm:
        workspace, other = create(comm, rank), create(comm, rank)
        for backbone in (comm.TorchDistBackend(rank.group), rank.group):
            for each in (workspace, other):
                each.checkpoint_prepare()
            with pytest.raises(RuntimeError, match="asleep"):
                comm.allreduce_fusion(rows(rank.rank), workspace, 0)
            apart = create(comm, rank)  # one that is asleep is not shared
            assert apart.handle != workspace.handle
            apart.destroy()
            for each in (workspace, other):
                each.checkpoint_restore(backbone)
            assert works(workspace, comm)
            assert works(other, comm)
        workspace.checkpoint_prepare()
        with pytest.raises(ValueError, match="restore: got a group in which this is rank"):
            workspace.checkpoint_restore(dist.new_group([rank.rank], use_local_synchronization=True))
        workspace.destroy()
        other.destroy()


def test_checkpoints() -> None:
    rank_pool(2).run(sleeps)


def garbage(rank: Rank) -> int:
    """One rank has lost its workspace by now, the other has not: both make a new one."""
    with installed() as comm:
        first = create(comm, rank)
        handle = first.handle
        if rank.rank == 1:
            with mock.patch.object(Workspace, "close", autospec=True, side_effect=Workspace.close) as closed:
                del first
                gc.collect()
            assert closed.call_count == 1  # by __del__
        second = create(comm, rank)
        assert second.handle != handle
        assert works(second, comm)
        third = create(comm, rank)
        assert third.handle == second.handle
        second.destroy()
        third.destroy()
    return 0


def test_what_one_rank_has_lost_is_not_shared() -> None:
    rank_pool(2).run(garbage)


def broken(rank: Rank) -> None:
    with installed() as comm:
        first = create(comm, rank)
        with pytest.raises(RuntimeError):  # another call on each rank
            comm.allreduce_fusion(rows(rank.rank, 2 + rank.rank), first, 0)
        second = create(comm, rank)
        assert second.handle != first.handle
        assert works(second, comm)
        first.destroy()
        second.destroy()


def test_a_broken_one_is_not_shared() -> None:
    rank_pool(2).run(broken)


def falls_back(rank: Rank, version: str, step: str, odd: dict[str, Any]) -> str:
    """Rank 1 fails, at a step of bring-up or for what it asks: all ranks go to the original's trtllm."""
    mine = odd if rank.rank == 1 else {}
    with installed(version) as comm, failing(step, rank.rank == 1), logged() as lines:
        policy._lines_told.clear()
        for backend in ("mnnvl", "trtllm"):
            asked = {"backend": backend, **({"group": None} if version == "0.6.8.post1" else {}), **mine}
            assert create(comm, rank, **asked) == ORIGINAL
        backends = [given["backend"] for _, given in comm.calls]
        assert backends == ["trtllm", "trtllm"]
        assert comm.calls[0][1]["max_token_num"] == asked.get("max_token_num", TOKENS)  # the rest as it came
        warnings = [line for line in lines if "instead of mnnvl_ar" in line]
        assert len(warnings) == 1  # once for the reason, on every rank
        reason = warnings[0].partition("): ")[2]
        assert same_on_all(rank, reason)
        return reason


@pytest.mark.parametrize("version", ["0.6.8.post1", "0.7.4"])
@pytest.mark.parametrize("step", ["allocate", "ready"])
def test_all_ranks_fall_back_together(version: str, step: str) -> None:
    reason = rank_pool(2).run(falls_back, version, step, {})[0]
    assert f"failed on rank 1 at step '{step}'" in reason
    assert "CUDA_ERROR_SIMULATED" in reason


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({"max_token_num": 0}, "max_token_num: is 0, wanted"),
        ({"hidden_dim": 1000_000}, "hidden: rows of"),
        ({"world_size": 3}, "world_size: is 3, the group has 2"),
        ({"rank": 0}, "rank: is 0, the group has 1"),
        ({"dtype": torch.float64}, "dtype: is torch.float64"),
        ({"top_k": 8}, "top_k: mnnvl_ar's create_allreduce_fusion_workspace does not know it"),
        ({"hidden_dim": 60}, "hidden: rows of 120 bytes"),
        ({"max_token_num": 2 * TOKENS}, "max_token_num differs: rank 1 has 32, rank 0 has 16"),
    ],
)
def test_what_one_rank_asks_wrongly_is_refused_on_all(odd: dict[str, Any], words: str) -> None:
    assert words in rank_pool(2).run(falls_back, "0.7.4", "none", odd)[0]


def raises(rank: Rank, unwilling: int) -> str:
    """MNNVL_AR_FALLBACK=0 on one rank: all raise, and none comes near the original."""
    environment = {"MNNVL_AR_FALLBACK": "0"} if unwilling in (rank.rank, -1) else {}
    with installed("0.7.4", **environment) as comm, failing("allocate", rank.rank == 1), logged() as lines:
        policy._lines_told.clear()
        with pytest.raises(BringUpError, match="rank 1 at step 'allocate'") as caught:
            create(comm, rank)
        assert comm.calls == []
        assert sum("MNNVL_AR_FALLBACK=0" in line for line in lines) == 1
    return str(caught.value)


@pytest.mark.parametrize("unwilling", [0, 1, -1])
def test_without_fallback_all_ranks_raise(unwilling: int) -> None:
    told = rank_pool(2).run(raises, unwilling)
    assert told[0] == told[1]


@contextmanager
def switched(**switches: str) -> Iterator[None]:
    """Of all that switch multicast off, these alone. Here nothing makes any: ranks are on the host."""
    with mock.patch.dict(os.environ, switches):
        for name in MULTICAST_SWITCHES.keys() - switches.keys():
            os.environ.pop(name, None)
        yield


def makes_no_multicast(rank: Rank, version: str, switches: dict[str, str]) -> list[tuple[str, str | None]]:
    """The backends that come to FlashInfer, and what PyTorch's symmetric memory would read while they are made."""
    seen: list[tuple[str, str | None]] = []
    with switched(**switches), standing_in(version) as comm:
        original = comm.create_allreduce_fusion_workspace

        @functools.wraps(original)
        def noting(*args: Any, **given: Any) -> Any:
            seen.append((given["backend"], os.environ.get(SWITCH)))
            return original(*args, **given)

        comm.create_allreduce_fusion_workspace = comm.allreduce.create_allreduce_fusion_workspace = noting
        flashinfer.install()
        before = dict(os.environ)
        with mock.patch.dict(os.environ, MNNVL_AR_TIMEOUT="20"):
            assert create(comm, rank, hidden_dim=1 << 15) == ORIGINAL  # rows above 32 KiB: all fall back
        with mock.patch.dict(os.environ, MNNVL_AR_BACKENDS="mnnvl"):
            assert create(comm, rank, backend="trtllm") == ORIGINAL
        if not switches.keys() & MULTICAST_SWITCHES.keys():
            with mock.patch.dict(os.environ, MNNVL_AR_BACKENDS=""):
                assert create(comm, rank) == ORIGINAL
        assert dict(os.environ) == before
    return seen


@pytest.mark.parametrize("name", [None, *MULTICAST_SWITCHES])
def test_flashinfers_trtllm_makes_no_multicast(name: str | None) -> None:
    """From 0.6.11 to 0.6.14 it does where nobody forbids it, and under another switch than PyTorch's."""
    switches = {name: MULTICAST_SWITCHES[name]} if name else {}
    theirs = [] if name else [("mnnvl", None)]  # a control: what is asked for of FlashInfer is as it was
    assert rank_pool(2).run(makes_no_multicast, "0.6.14", switches) == [[("trtllm", "1")] * 2 + theirs] * 2


@pytest.mark.parametrize("before", [None, "0", "1"])
def test_the_switch_is_as_it_was_when_the_last_thread_has_left(before: str | None) -> None:
    inside, leave = threading.Barrier(3), threading.Event()

    def rank() -> None:
        with without_multicast():
            inside.wait(20)
            leave.wait(20)

    with switched(**({SWITCH: before} if before else {})):
        threads = [threading.Thread(target=rank) for _ in range(2)]
        for each in threads:
            each.start()
        inside.wait(20)
        with pytest.raises(OSError, match="no memory"), without_multicast():
            raise OSError("no memory")
        assert os.environ[SWITCH] == "1"  # one has left, by an error, and two have not
        leave.set()
        for each in threads:
            each.join(20)
        assert os.environ.get(SWITCH) == before


def apart(rank: Rank, through: str) -> str:
    """Rank 1 is on another host, where no workspace is to be had."""
    there = mock.Mock(identity=lambda: f"host{rank.rank}/boot/1", name_of=hosts.name_of)
    with (
        installed("0.6.14") as comm,
        failing("allocate", rank.rank == 1),
        mock.patch.object(creation, "hosts", there),
        logged() as lines,
    ):
        policy._lines_told.clear()
        if through == "ops":  # to the server's own, which goes between hosts
            settings = creation.Settings.read()
            assert creation.joined(rank.group, TOKENS, HIDDEN, torch.bfloat16, settings, "vLLM's own") is None
        else:
            with pytest.raises(BringUpError, match="rank 1 at step 'allocate'"):
                create(comm, rank)
        assert comm.calls == []
    (line,) = [each for each in lines if "workspace of mnnvl_ar, and no" in each or "instead of" in each]
    return line.partition(" (rank")[0]


def test_nobody_falls_back_to_trtllm_between_hosts() -> None:
    words = "no workspace of mnnvl_ar, and no other (trtllm is for one host: rank 0 is on host0, rank 1 on another, "
    for told in rank_pool(2).run(apart, "flashinfer"):
        assert told.startswith(words)
    assert rank_pool(2).run(apart, "ops") == ["vLLM's own instead of mnnvl_ar, on all ranks"] * 2


def dies(rank: Rank) -> str:
    def enter(step: str) -> None:
        if rank.rank == 1 and step == "allocate":
            os.kill(os.getpid(), signal.SIGKILL)

    hooks.enter = enter
    with installed("0.7.4", MNNVL_AR_TIMEOUT="10") as comm:
        with pytest.raises(BringUpError, match="its process died") as caught:
            create(comm, rank)
        assert comm.calls == []  # FlashInfer would wait for the dead rank for ever
    return str(caught.value)


def test_nobody_falls_back_when_a_rank_is_gone() -> None:
    with RankPool(3) as pool:
        outcomes = pool.start(dies).outcomes(60.0, grace=60.0)
    assert [outcome.ok for outcome in outcomes] == [True, False, True]
    assert outcomes[0].value == outcomes[2].value
    assert "rank 1" in outcomes[0].value


def narrowed(rank: Rank) -> None:
    """MNNVL_AR_BACKENDS. Tests run with multicast switched off."""
    for backends, ours, theirs in (("mnnvl", "mnnvl", "trtllm"), ("trtllm", "trtllm", None), ("", None, "trtllm")):
        with installed("0.7.4", MNNVL_AR_BACKENDS=backends) as comm:
            if ours:
                for asked in (ours, "auto"):
                    workspace = create(comm, rank, backend=asked)
                    assert (type(workspace), workspace.backend) == (FusionWorkspace, ours)
                    workspace.destroy()
            if theirs:
                assert create(comm, rank, backend=theirs) == ORIGINAL
            if "mnnvl" not in backends:
                for asked in ("mnnvl", *(() if ours else ("auto",))):
                    before = len(comm.calls)
                    with pytest.raises(MnnvlArError, match="would make NVLink multicast, which is switched off by"):
                        create(comm, rank, backend=asked)
                    assert len(comm.calls) == before
                    with mock.patch.object(creation, "multicast_refusal", return_value=""):  # somebody's own machine
                        assert create(comm, rank, backend=asked) == ORIGINAL
                    assert comm.calls[-1][1]["backend"] == asked


def test_backends_can_be_narrowed() -> None:
    rank_pool(2).run(narrowed)


def noticed(rank: Rank) -> list[str]:
    seen: list[Callable[..., Any] | str] = []
    with installed() as comm, mock.patch.object(creation, "on_fault", lambda error: seen.append(str(error))):
        workspace = create(comm, rank)
        with pytest.raises(RuntimeError):
            comm.allreduce_fusion(rows(rank.rank, 2 + rank.rank), workspace, 0)
        for _ in range(100):
            if seen:
                break
            signal.sigtimedwait([], 0.1)
        workspace.destroy()
    return [str(each) for each in seen]


def test_a_servers_policy_hears_of_a_fault() -> None:
    for told in rank_pool(2).run(noticed, timeout=60.0 + GRACE):
        assert len(told) == 1
        assert "rank 1 called" in told[0]


def no_group(rank: Rank) -> None:
    with installed() as comm:
        workspace = create(comm, rank, group=None, comm_backend=None)  # all ranks, as with FlashInfer
        assert works(workspace, comm)
        workspace.destroy()
        with pytest.raises(ValueError, match="group: is 3, wanted"):
            create(comm, rank, group=3)
        alone = mock.Mock(group=mock.Mock(WORLD=None))
        with mock.patch.object(creation, "dist", alone), pytest.raises(ValueError, match="neither it nor comm_backend"):
            create(comm, rank, group=None, comm_backend=None)


def test_without_a_group() -> None:
    rank_pool(2).run(no_group)


# ---- controls: without the vote, ranks go two ways


def alone(group: Any, told: Any = None, **_: Any) -> list[Any]:
    """In place of the vote: what this rank has found."""
    return [told]


def shares_alone(rank: Rank) -> str:
    with installed() as comm:
        first = create(comm, rank)
        assert isinstance(first, FusionWorkspace)
        if rank.rank == 1:
            first.destroy()
        with mock.patch.object(creation, "agree", alone), mock.patch.dict(os.environ, MNNVL_AR_TIMEOUT="2"):
            second = create(comm, rank)
        kind = type(second).__name__
        for each in (first, second):
            if isinstance(each, FusionWorkspace):
                each.destroy()
    return kind


def test_control_without_the_vote_ranks_share_what_others_have_lost() -> None:
    assert rank_pool(2).run(shares_alone) == ["FusionWorkspace", "str"]  # rank 1 waited, and went to the original


def falls_back_alone(rank: Rank) -> str:
    environment = {"MNNVL_AR_FALLBACK": "0"} if rank.rank == 1 else {}
    with installed(**environment) as comm, failing("allocate", rank.rank == 1):
        voted = creation.agree

        def but_once(group: Any, told: Any = None, *, step: str, **rest: Any) -> list[Any]:
            return [told] if step == "fallback" else voted(group, told, step=step, **rest)

        with mock.patch.object(creation, "agree", but_once):
            try:
                return str(create(comm, rank))
            except BringUpError:
                return "raised"


def test_control_without_the_vote_ranks_do_not_fall_back_together() -> None:
    assert rank_pool(2).run(falls_back_alone) == [ORIGINAL, "raised"]
