"""What ranks say of a fault: all of them, the same, at once, with names."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import pickle
import struct
import threading
import time
from typing import Any

import pytest
import torch

from common.cases.lifecycle import SMALL, broken, make_fail, one_call
from common.cases.rules import write_word
from common.streams import stream_aside

# Of a block (csrc/protocol/layout.h, signature.h; csrc/diagnosis/notes.h).
CONTROL_BYTES, BROKEN, BOARD, NOTES, MAX_RANKS, NO_EPOCH, TAG = 16384, 20, 1024, 8192, 72, 0xFFFFFFFF, 1 << 24
MISMATCH, AT_ONCE = 2, 7  # csrc/protocol/fault.h


def told(code: int, author: int) -> int:
    """The mark on a peer's block: peer_mark() of csrc/protocol/fault.h."""
    peer_fault = 3
    return peer_fault | code << 8 | author << 16


def check_absent(rank: Any, absent: int, within: float = 1.5) -> float:
    """One rank stays away: each of the others, and it, say so within the deadline and a second. How many it took."""
    workspace = rank.new_workspace(**SMALL, deadline=0.5, monitor=False)
    one_call(rank, workspace)
    rank.barrier()
    began = time.monotonic()
    said = make_fail(rank, workspace) if rank.rank != absent else ""
    error = broken(workspace, within)
    took = time.monotonic() - began
    assert type(error).__name__ == "PeerTimeout", error
    assert (error.rank, error.peer, error.call_number) == (rank.rank, absent, 1), vars(error)
    assert error.call == error.peer_call.replace("[1,", "[2,") == "all_reduce([2, 64], float32, one_shot)"
    assert error.waited > 0.3 or rank.rank == absent  # one that was told may have waited less
    assert not said or f"for rank {absent} in {error.call}, call number 1" in said
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
    with pytest.raises(RuntimeError, match=f"rank {absent}"):
        one_call(rank, workspace)
    rank.barrier()
    workspace.close()
    return took


def check_absent_in_many_ctas(rank: Any) -> None:
    """Whichever CTA is the first to give up, the rank that waited knows that it found this out itself."""
    workspace = rank.new_workspace(max_tokens=64, hidden=8192, dtype=torch.bfloat16, deadline=0.3, monitor=False)
    for _ in range(5):
        rank.barrier()
        if rank.rank == 0:
            check_calls_fail(rank, workspace)
            error = broken(workspace, 1.0)
            assert type(error).__name__ == "PeerTimeout", error
            assert "rank 0 waited" in str(error), error
            assert "for rank 1 in" in str(error), error
        rank.barrier()
        workspace.recover(rank.group)
    workspace.close()


def check_calls_fail(rank: Any, workspace: Any) -> None:
    from mnnvl_ar import ops

    out = ops.all_reduce(torch.ones(64, 8192, dtype=torch.bfloat16, device=rank.device), workspace.handle)
    rank.synchronize()
    assert out.isnan().all()


def check_different(rank: Any, odd: int) -> None:
    """One rank calls something else: all say who and what, long before the deadline."""
    from mnnvl_ar import ops

    workspace = rank.new_workspace(**SMALL, deadline=30.0, monitor=False)
    rank.barrier()
    began = time.monotonic()
    x = torch.ones(3 if rank.rank == odd else 2, 64, device=rank.device)
    said = "[2, 64] [3, 64]"
    try:
        ops.all_reduce(x, workspace.handle)
        rank.synchronize()
    except RuntimeError as raised:
        said = str(raised)
    assert "[3, 64]" in said
    assert "[2, 64]" in said
    error = broken(workspace, 1.0)
    assert time.monotonic() - began < 10.0, "well before the deadline"
    assert type(error).__name__ == "CallMismatch", error
    if rank.rank != odd and rank.world_size > 2:
        assert error.peer == odd, error
    assert "[3, 64]" in error.call + error.peer_call
    assert "[2, 64]" in error.call + error.peer_call
    rank.barrier()
    workspace.close()


# Of rank 0, and of the others: keywords of a call, and what is said of it.
DIFFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "": ({"strategy": -1}, {"pdl": 0}, ""),
    "eps": ({"eps": 1e-6}, {"eps": 1e-5}, "eps"),
    "weight bias": ({"weight_bias": 1.0}, {}, "weight_bias"),
    "weight dtype": ({"weight": torch.float32}, {}, "weight in fp32:"),
    "tag": ({"tag": 3}, {"tag": 1}, "tag"),
    "norm stored": ({"with_norm": True}, {}, "norm stored too:"),
    "layout": ({"layout": 2}, {"layout": 0}, "layout of scales"),
    "powers of two": ({"scales": 1}, {"scales": 0}, "scales as"),
    "packed scales": ({"scales": 2, "layout": 2}, {"scales": 1, "layout": 2}, "scales as"),
}


def check_different_in(rank: Any, what: str) -> None:
    """Calls of one shape that would give ranks other outputs: named at once, with the field and its values. The
    control: where nothing differs that matters to peers, none is named. Two groups of scales, as of one all layouts are
    the same."""
    mine, others, said = DIFFERENCES[what]
    workspace = rank.new_workspace(max_tokens=4, hidden=256, dtype=torch.bfloat16, deadline=30.0, monitor=False)
    rank.barrier()
    began = time.monotonic()
    given = dict(mine if rank.rank == 0 else others)
    weight = torch.ones(256, dtype=given.pop("weight", torch.bfloat16), device=rank.device)
    op = torch.ops.mnnvl_ar.all_reduce_rms_norm
    if {"with_norm", "layout", "scales"} & {*mine, *others}:
        op = torch.ops.mnnvl_ar.all_reduce_rms_norm_per_token_group_fp8
    rows = torch.ones(2, 256, dtype=torch.bfloat16, device=rank.device)
    text = ""
    try:
        op(rows, rows, weight, given.pop("eps", 1e-6), workspace.handle, **given)
        rank.synchronize()
        workspace.check()
    except RuntimeError as raised:
        text = str(raised)
    assert bool(text) == bool(what), text
    if what:
        error = broken(workspace, 1.0)
        assert type(error).__name__ == "CallMismatch", error
        assert f", with {said} " in str(error), error
        assert " instead of " in str(error), error
        assert time.monotonic() - began < 10.0, "well before the deadline"
    rank.barrier()
    workspace.close()


def check_absent_before_an_unordered_call(rank: Any) -> None:
    """A call waits for an absent peer, and the next one, which nothing holds back, for that call: the cause is the
    peer, though the second call's wait begins first."""
    workspace = rank.new_workspace(max_tokens=4, hidden=264, deadline=0.5, monitor=False)
    x = torch.ones(3, 264, device=rank.device)
    outs, aside = [torch.empty_like(x) for _ in range(2)], stream_aside(rank.device)
    for _ in range(3):
        rank.barrier()
        if rank.rank == 0:
            torch.ops.mnnvl_ar.all_reduce_out(x, outs[0], workspace.handle, pdl=0)
            with torch.cuda.stream(aside):
                torch.ops.mnnvl_ar.all_reduce_out(x, outs[1], workspace.handle, pdl=0)
            rank.synchronize()
            aside.synchronize()
            error = broken(workspace, 1.0)
            assert type(error).__name__ == "PeerTimeout", error
            assert error.peer == 1, error
            assert all(bool(out.isnan().all()) for out in outs)
        rank.barrier()
        workspace.close()
        workspace = rank.new_workspace(max_tokens=4, hidden=264, deadline=0.5, monitor=False)
    workspace.close()


def check_overwritten(rank: Any, offset: int) -> None:
    """A foreign word among the control words of rank 0 is found, and told to all."""
    workspace = rank.new_workspace(**SMALL, monitor=False)
    one_call(rank, workspace)
    workspace.check()
    rank.barrier()
    if rank.rank == 0:
        write_word(rank, workspace, offset, 7)
        assert f"control words overwritten at offset 0x{offset:x}" in str(broken(workspace, 1.0))
    rank.barrier()
    error = broken(workspace, 1.0)
    assert type(error).__name__ == "WorkspaceBroken"
    assert error.peer == 0
    with pytest.raises(RuntimeError, match="overwritten"):
        one_call(rank, workspace)
    rank.barrier()
    workspace.close()


def check_overwritten_widely(rank: Any, word: int) -> None:
    """A word over all that is behind the ring's own, signatures among it, such as a kernel's fill: the words pass for
    calls that lay out nothing, or more than there is."""
    workspace = rank.new_workspace(**SMALL, monitor=False)
    one_call(rank, workspace)
    rank.barrier()
    if rank.rank == 0:
        for offset in range(32, CONTROL_BYTES, 4):
            write_word(rank, workspace, offset, word)
    rank.barrier()
    assert "control words overwritten at offset 0x20" in str(broken(workspace, 1.0))
    rank.barrier()
    workspace.close()


def check_marked(rank: Any) -> None:
    """A rank that is marked broken by the one at fault says what that one found, without a note."""
    workspace = rank.new_workspace(**SMALL, monitor=False)
    one_call(rank, workspace)
    rank.barrier()
    if rank.rank == 1:
        write_word(rank, workspace, BROKEN, told(AT_ONCE, author=0))
        error = broken(workspace, 1.0)
        assert "rank 0: two calls of that rank on this workspace ran at once" in str(error), error
        assert "told rank 1" in str(error), error
        assert (error.rank, error.peer) == (1, 0)
    rank.barrier()
    workspace.close()


def board_row(rank: Any, workspace: Any, source: int) -> tuple[int, list[int]]:
    """Where in this rank's block the newest signature of `source` is, and its four words."""
    block = ctypes.string_at(workspace._memory.pointers[rank.rank], CONTROL_BYTES)
    rows = []
    for slot in range(3):
        offset = BOARD + 16 * (slot * MAX_RANKS + source)
        words = struct.unpack_from("4I", block, offset)
        rows += [(words[0], offset, list(words))] if words[0] == words[2] != NO_EPOCH else []
    _, offset, words = max(rows)
    return offset, words


def check_signed_twice(rank: Any) -> None:
    """A rank that has signed two calls as one is named by all for that, whatever they were told: its signature for
    rank 1 is another one than for the others."""
    workspace = rank.new_workspace(**SMALL, monitor=False)
    one_call(rank, workspace)
    workspace.check()
    rank.barrier()
    if rank.rank == 1:
        offset, words = board_row(rank, workspace, source=0)
        write_word(rank, workspace, offset + 12, words[3] ^ TAG)
        write_word(rank, workspace, BROKEN, told(MISMATCH, author=0))
    rank.barrier()
    if rank.rank == 1:
        error = broken(workspace, 1.0)
        assert "rank 0: two calls of that rank on this workspace ran at once" in str(error), error
        assert "told rank 1" in str(error), error
        assert (error.rank, error.peer) == (1, 0)
    rank.barrier()  # it has told the others
    if rank.rank != 1:
        error = broken(workspace, 1.0)
        assert "two calls of that rank on this workspace ran at once" in str(error), error
        assert (error.rank, error.peer) == (rank.rank, 0)
    rank.barrier()
    workspace.close()


def check_a_difference_that_is_gone(rank: Any) -> None:
    """A peer has found a difference, and signatures are alike since: it is told as the peer tells it, not as a wait.
    Before its note is there, no rank is blamed."""
    workspace = rank.new_workspace(**SMALL, monitor=False)
    one_call(rank, workspace)
    rank.barrier()
    if rank.rank == 1:
        _, words = board_row(rank, workspace, source=0)
        write_word(rank, workspace, BROKEN, told(MISMATCH, author=0))
        text = str(broken(workspace, 1.0))
        assert "a peer called something else where rank 0 called all_reduce(" in text, text
        for word, value in enumerate((MISMATCH, 1, words[0], 0)):
            write_word(rank, workspace, NOTES + 4 * word, value)
        error = broken(workspace, 1.0)
        assert type(error).__name__ == "CallMismatch", error
        assert "rank 1 (this one) called all_reduce(" in str(error), error
        assert "both sign the same by now, so one of them has signed that call twice" in str(error), error
        assert (error.rank, error.peer) == (1, 1)
    rank.barrier()
    workspace.close()


def check_bystander(rank: Any) -> None:
    """Two ranks differ in a call that a third has not come to: it names both, and blames neither, until a fourth has
    come. That one's call shows who is odd, and it leaves word."""
    workspace = rank.new_workspace(**SMALL, deadline=30.0, monitor=False)
    one_call(rank, workspace)
    rank.barrier()
    if rank.rank < 2:
        with contextlib.suppress(RuntimeError):
            torch.ops.mnnvl_ar.all_reduce(torch.ones(2 + rank.rank, 64, device=rank.device), workspace.handle)
        rank.synchronize()
        error = broken(workspace, 1.0)
        assert (type(error).__name__, error.peer) == ("CallMismatch", 1 - rank.rank), error
    rank.barrier()
    if rank.rank == 3:
        error = broken(workspace, 1.0)
        assert (type(error).__name__, error.peer) == ("CallMismatch", -1), error
        assert "which of the two is wrong cannot be told" in str(error), error
        for name in ("rank 0 called", "rank 1 called", "([2, 64]", "([3, 64]"):
            assert name in str(error), error
    rank.barrier()
    if rank.rank == 2:
        make_fail(rank, workspace)
        error = broken(workspace, 1.0)
        assert (type(error).__name__, error.peer) == ("CallMismatch", 1), error
        assert "rank 1 called all_reduce([3, 64]" in str(error), error
    rank.barrier()
    if rank.rank == 3:
        error = broken(workspace, 1.0)
        assert (type(error).__name__, error.peer) == ("CallMismatch", 1), error
        assert "rank 1 called all_reduce([3, 64]" in str(error), error
        assert "cannot be told" not in str(error), error
    rank.barrier()
    workspace.close()


def heard(told: list[Exception], count: int) -> None:
    """Until so many faults have been told, and then some looks of the monitor longer: nothing is told twice."""
    until = time.monotonic() + 20.0
    while len(told) < count and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(2.0)


def check_monitor(rank: Any, watched: bool) -> None:
    """The thread logs a fault once, on a rank that does nothing too, and ends with its last workspace."""
    from mnnvl_ar import PeerTimeout, monitor

    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("mnnvl_ar").addHandler(handler)
    told: list[Exception] = []
    workspace = rank.new_workspace(**SMALL, deadline=0.3, monitor=watched, on_fault=told.append)
    rank.barrier()
    if rank.rank == 0:
        make_fail(rank, workspace)
    heard(told, int(watched))
    texts = [record.getMessage() for record in records]
    assert len(texts) == int(watched), texts
    assert [type(error) for error in told] == [PeerTimeout] * watched, told
    found = "rank 0 waited", "for rank 1 in" if rank.rank == 0 else "for rank 1 (this one) in"
    assert all(part in text for text in texts for part in found), texts
    rank.barrier()
    if watched:
        workspace.recover(rank.group)
        rank.barrier()
        if rank.rank == 1:
            make_fail(rank, workspace)
        heard(told, 2)
        assert len(records) == 2
    rank.barrier()
    workspace.close()
    logging.getLogger("mnnvl_ar").removeHandler(handler)
    assert monitor._monitor._thread is None


def check_hold(rank: Any, hold: float, watched: bool) -> None:
    """A call that found a fault ends when `on_fault` has returned, or after `hold`, whichever comes first."""
    deadline, decides = 0.3, 0.4 if hold > 0.4 else 3.0
    told: list[float] = []

    def on_fault(error: Exception) -> None:
        time.sleep(decides)
        told.append(time.monotonic())

    workspace = rank.new_workspace(**SMALL, deadline=deadline, hold=hold, monitor=watched, on_fault=on_fault)
    rank.barrier()
    if rank.rank == 0:
        began = time.monotonic()
        make_fail(rank, workspace)
        ended = time.monotonic()
        took = ended - began
        if hold > decides and watched:
            assert told, "the call went on before the process had decided"
            assert told[0] <= ended
            assert took < deadline + hold
        else:
            assert deadline + hold <= took + 0.02, took
            assert took < deadline + hold + 2.5, took  # for what takes a tenth of one
            assert not told
    else:
        broken(workspace, 3.0)
    rank.barrier()
    time.sleep(decides)  # rank 1's own on_fault
    workspace.close()


def check_deadline_set_meanwhile(rank: Any) -> None:
    """A call that waits, and a captured one, obey a deadline that is set after they were made."""
    import mnnvl_ar

    workspace = rank.new_workspace(**SMALL, deadline=None, monitor=False)
    x = torch.ones(1, 64, device=rank.device)
    mnnvl_ar.ops.all_reduce(x, workspace.handle)

    def eagerly() -> None:
        mnnvl_ar.ops.all_reduce(x, workspace.handle)

    call = eagerly
    if rank.device.type == "cuda":
        call = rank.capture(eagerly).replay
    rank.barrier()
    assert workspace.deadline is None
    if rank.rank == 0:
        failed: list[str] = []

        def wait() -> None:
            try:
                call()
                rank.synchronize()
            except RuntimeError as error:
                failed.append(str(error))

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.5)
        assert thread.is_alive()
        workspace.deadline = 0.2
        assert workspace.deadline == 0.2
        thread.join(20.0)
        assert not thread.is_alive()
        assert broken(workspace, 1.0).peer == 1
        for wrong in (0, -1.0, float("nan"), "soon"):
            with pytest.raises(ValueError, match=r"deadline: is .*, wanted more than 0 seconds"):
                workspace.deadline = wrong
    rank.barrier()
    workspace.close()
    if rank.rank == 0:
        with pytest.raises(RuntimeError, match="is closed"):
            workspace.deadline = 1.0
