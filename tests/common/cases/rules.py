"""The rules of docs/protocol.md, each as a check that passes, and that fails once the rule is switched off in a test
build.

Every function is run by all ranks with `off`, the rule to switch off or "". It makes a workspace of its own, since a
control leaves it broken.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from common.cases.calls import NAMES, Call, Prepared, check_calls, wanted
from common.rows import hostile_rows
from common.streams import stream_aside
from mnnvl_ar._library import named

# csrc/protocol/sabotage.h
RULES = (
    "device_epoch",
    "device_dirty",
    "three_slots",
    "clear",
    "sanitize",
    "integer_compare",
    "every_word",
    "quiescence",
    "advance_last",
    "deadline",
    "signature",
    "two_at_once",
    "peer_mark",
    "canary",
    "zero_tokens",
    "one_thread",
    "still_open",
    "all_pieces",
    "float_mode",
    "padding",
)
# Of a block whose slots hold, for two ranks, four fp32 rows of 264 at once by two-shot, eight by one-shot.
PIECES_OF_FOUR = 16384 + 3 * 4 * 2 * 264 * 4

# Seconds; long beside the skew of ranks on a busy machine, short beside a test's time limit.
DEADLINES = {"cpu": 4.0, "cuda": 1.5}


def sabotaged(rank: Any, off: str, *, frozen_dirty: int = 0, delay_ns: int = 0, **options: Any) -> Any:
    """A fresh workspace whose rules in `off`, separated by spaces, are broken."""
    made = rank.new_workspace(**{"deadline": DEADLINES[rank.device.type], **options})
    break_rule(made.handle, off, frozen_dirty=frozen_dirty, delay_ns=delay_ns)
    return made


def break_rule(handle: int, off: str, *, frozen_dirty: int = 0, delay_ns: int = 0) -> None:
    broken = sum(1 << RULES.index(rule) for rule in off.split())
    torch.ops.mnnvl_ar._sabotage(handle, broken, frozen_dirty, 1 if delay_ns else 0, delay_ns)


def launch_that_breaks(rank: Any, call: Any, handle: int) -> None:
    """A call that ends in a fault: the host transport's says so itself, a GPU's when it is asked."""
    if rank.device.type == "cpu":
        with pytest.raises(RuntimeError, match="broke in this call"):
            call.launch(handle)
    else:
        call.launch(handle)
        rank.synchronize()


def one_after_another(rank: Any, calls: list[Call], workspace: Any) -> None:
    """Rank 0 is the first in every call, so that it finds whatever its slot has been left with."""
    for call in calls:
        prepared = Prepared(rank, call)
        rank.barrier()
        if rank.rank != 0:
            time.sleep(0.03)
        prepared.launch(workspace.handle)
        rank.synchronize()
        wrong = prepared.wrong()
        assert not wrong, "\n".join(wrong)
        rank.barrier()


def check_stale_data(rank: Any, off: str) -> None:
    """Data of an earlier call is never taken for this one's: rules clear, device_dirty (frozen at nothing).

    Signatures are not compared here, rule or no rule: they make ranks meet before they read.
    """
    workspace = sabotaged(rank, f"{off} signature", hidden=264, max_tokens=8)
    one_after_another(rank, [Call(tokens=t, hidden=264, seed=n) for n, t in enumerate((8, 1, 4, 8, 8, 2))], workspace)
    workspace.close()


def check_wiped_data(rank: Any, off: str, tokens: int = 256, pause: float = 0.01) -> None:
    """What a fast peer sends for the next call is not cleared away by a slow rank: rule three_slots. With three ranks,
    since what the last one sends lies where a slow rank clears last. pause: seconds for which its peers wait for it in
    the small call."""
    workspace = sabotaged(rank, off, hidden=8192, max_tokens=tokens, strategy="one_shot")
    large = Call("all_reduce", tokens, 8192, "fp32", strategy=0, seed=1)
    prepared = [Prepared(rank, large), Prepared(rank, Call("all_reduce", 1, 8192, "fp32", strategy=0, seed=2))]
    rank.barrier()
    for _ in range(200 if off else 20):  # of a control any may show it, and the first that does ends it
        prepared[0].launch(workspace.handle)
        if rank.rank == 0:
            rank.synchronize()
            time.sleep(pause)  # in the small call it has a large slot to clear
        prepared[1].launch(workspace.handle)
    rank.synchronize()
    wrong = [line for each in prepared for line in each.wrong()]
    assert not wrong, "\n".join(wrong)
    rank.barrier()
    workspace.close()


def check_sentinels_in_data(rank: Any, off: str) -> None:
    """A row of nothing but sentinels is a row like any other: rule sanitize."""
    workspace = sabotaged(rank, off, hidden=64)
    for dtype in ("fp32", "bf16", "fp16"):
        calls = [
            Call(op, 1, 64, dtype, strategy=s, seed=6) for op in ("all_reduce", "all_reduce_rms_norm") for s in (0, 1)
        ]
        assert hostile_rows(1, 64, torch.float32, seed=6, rank=rank.rank).view(torch.int32).eq(-(1 << 31)).all()
        check_calls(rank, calls, handle=workspace.handle)
    rank.barrier()
    workspace.close()


def check_subnormals_in_data(rank: Any, off: str) -> None:
    """Negative subnormals, and pairs of halves that look like them, are data: rule integer_compare."""
    workspace = sabotaged(rank, off, hidden=264)
    check_calls(rank, [Call(tokens=8, hidden=264, dtype=dtype) for dtype in ("fp32", "bf16")], handle=workspace.handle)
    rank.barrier()
    workspace.close()


def check_absent_peer(rank: Any, off: str) -> None:
    """A call whose peers never come ends with an error that names one: rule deadline."""
    import mnnvl_ar

    workspace = sabotaged(rank, off, hidden=64, deadline=0.5)
    rank.barrier()
    if rank.rank == 0:
        began = time.monotonic()
        prepared = Prepared(rank, Call(tokens=1, hidden=64))
        launch_that_breaks(rank, prepared, workspace.handle)
        assert all(output.isnan().all() for output in prepared.outputs)
        with pytest.raises(mnnvl_ar.PeerTimeout, match=r"rank 0 waited .* for rank 1"):
            workspace.check()
        assert time.monotonic() - began < 8.0
        with pytest.raises(RuntimeError, match="is broken"):
            prepared.launch(workspace.handle)
    rank.barrier()
    workspace.close()


def check_other_call(rank: Any, off: str) -> None:
    """Ranks that call different things of one size are told so at once: rule signature."""
    import mnnvl_ar

    workspace = sabotaged(rank, off, hidden=64)
    rank.barrier()
    began = time.monotonic()
    op = "all_reduce" if rank.rank == 1 else "all_reduce_rms_norm"
    prepared = Prepared(rank, Call(op, tokens=2, hidden=64))
    error = None
    try:
        prepared.launch(workspace.handle)
        rank.synchronize()
    except RuntimeError as caught:
        error = caught
    took = time.monotonic() - began
    rank.barrier()
    assert error is None or rank.device.type == "cpu", error
    with pytest.raises(mnnvl_ar.WorkspaceBroken) as found:
        workspace.check()
    assert not isinstance(found.value, mnnvl_ar.PeerTimeout)
    if isinstance(found.value, mnnvl_ar.CallMismatch):
        assert "rank 1 called all_reduce(" in str(found.value) or rank.rank == 1
    assert took < DEADLINES[rank.device.type]
    workspace.close()


class _Peer:
    """Rank 1 of 2, played by this process: it writes into rank 0's block word by word."""

    def __init__(self, block: torch.Tensor, hidden: int, multicast: str) -> None:
        layout = named(torch.ops.mnnvl_ar._block_layout, 0)
        control, board = layout["control_bytes"], layout["board_offset"]
        vectors = hidden // 4
        self.block, self.board, self.data = block, (board + 16) // 4, control // 4
        if multicast:  # rank 0's own row comes first
            self.data += hidden
        self.signature = torch.tensor([0, 1, 0, 2 << 4 | (vectors - 1) << 7], dtype=torch.int32)  # describe()
        self.stream = stream_aside(block.device) if block.is_cuda else None

    def write(self, place: int, words: torch.Tensor) -> None:
        with torch.cuda.stream(self.stream) if self.stream else torch.inference_mode():
            self.block[place : place + len(words)].copy_(words.to(torch.int32))
        if self.stream:
            self.stream.synchronize()


def check_torn_store(rank: Any, off: str) -> None:
    """A 16-byte store that arrives in two parts is not taken for data before it is whole: rule every_word. Rank 0 is
    real, with a peer that sends all words of its vectors but one, and that one later."""
    import mnnvl_ar
    from common.virtual import VirtualGroup

    hidden = 8
    for missing in range(4):
        multicast = getattr(rank, "multicast", "")
        options = {"deadline": DEADLINES[rank.device.type], "multicast": multicast}
        group = VirtualGroup(2, 1, hidden, torch.float32, str(rank.device), **options)
        break_rule(group.handles[0], off)
        mine, theirs = (torch.arange(1.0, 9.0) * k for k in (1, 10))
        x, out = mine.view(1, hidden).to(rank.device), torch.zeros(1, hidden, device=rank.device)
        peer = _Peer(group.blocks[0], hidden, multicast)
        words = theirs.view(torch.int32)
        torn = words.clone()
        torn.view(-1, 4)[:, missing] = -(1 << 31)
        if rank.device.type == "cuda":
            torch.cuda.synchronize(rank.device)

        def call(x: torch.Tensor = x, out: torch.Tensor = out, group: VirtualGroup = group) -> None:
            side = group.streams[0] if x.is_cuda else None
            with torch.cuda.stream(side) if side else torch.inference_mode():
                mnnvl_ar.ops.all_reduce_out(x, out, group.handles[0], strategy=0)

        thread = threading.Thread(target=call)
        thread.start()
        peer.write(peer.board, peer.signature)
        peer.write(peer.data, torn)
        time.sleep(0.1)
        peer.write(peer.data, words)
        thread.join()
        if rank.device.type == "cuda":
            torch.cuda.synchronize(rank.device)
        group.close()
        assert torch.equal(out.cpu().view(-1), mine + theirs), f"word {missing}: {out.tolist()}"


def check_replayed_call(rank: Any, off: str) -> None:
    """A captured call takes its place in the ring each time it is replayed: rule device_epoch."""
    workspace = sabotaged(rank, off, hidden=264)
    call = Prepared(rank, Call(tokens=4, hidden=264))
    graph = rank.capture(lambda: call.launch(workspace.handle))
    for seed in range(8):
        other = Prepared(rank, Call(tokens=4, hidden=264, seed=seed))
        for name in ("x", "residual", "weight"):
            getattr(call, name).copy_(getattr(other, name))
        rank.barrier()
        if rank.rank != 0:
            time.sleep(0.02)
        graph.replay()
        rank.synchronize()
        other.outputs = call.outputs
        wrong = other.wrong()
        assert not wrong, f"replay {seed}: " + "\n".join(wrong)
    rank.barrier()
    workspace.close()


def check_two_streams(rank: Any, workspace: Any, first: Any, second: Any) -> None:
    """Two calls, on rank 0 by two streams without an order, the second while the first waits for rank 1. Closes the
    workspace."""
    aside = stream_aside(rank.device)
    rank.barrier()
    if rank.rank == 0:
        first.launch(workspace.handle)
        time.sleep(0.02)  # by now it waits for rank 1
        with torch.cuda.stream(aside):
            second.launch(workspace.handle)
    else:
        if rank.rank == 1:
            time.sleep(0.1)
        first.launch(workspace.handle)
        second.launch(workspace.handle)
    rank.synchronize()
    aside.synchronize()
    wrong = first.wrong() + second.wrong()
    assert not wrong, "\n".join([*wrong, str(said(workspace))])
    rank.barrier()
    workspace.close()


def check_overlapping_calls(rank: Any, off: str) -> None:
    """A call that starts before its predecessor on this rank has ended finds out and waits: rule quiescence.

    Two streams without an order between them stand for a kernel in between that never waits for its predecessor. Rank 1
    is late, and what rank 2 has sent for the first call is what the second would clear away.
    """
    # Without the rule the two run at once, which another rule would notice.
    workspace = sabotaged(rank, f"{off} two_at_once" if off else "", hidden=264)
    first, second = (Prepared(rank, Call(tokens=3, hidden=264, pdl=0, out="E", seed=seed)) for seed in (3, 4))
    check_two_streams(rank, workspace, first, second)


def check_many_ctas(rank: Any, off: str) -> None:
    """All CTAs of a call are in the same call, however late some of them start: rule advance_last."""
    # Without the rule CTAs do not agree on the epoch, which another rule would notice.
    workspace = sabotaged(rank, f"{off} two_at_once" if off else "", delay_ns=20_000, hidden=4096)
    calls = [Call(tokens=t, hidden=4096, strategy=n % 2, seed=n) for n, t in enumerate((24, 7, 32, 1, 16, 24))]
    check_calls(rank, calls, handle=workspace.handle)
    rank.barrier()
    workspace.close()


def check_two_at_once(rank: Any, off: str) -> None:
    """Two streams at once on one workspace: right bits, or an error that says so: rule two_at_once."""
    workspace = sabotaged(rank, off, delay_ns=20_000, hidden=1024, max_tokens=8)
    calls = [Prepared(rank, Call(tokens=4, hidden=1024, pdl=0, out="E", seed=seed)) for seed in (3, 4)]
    streams = [stream_aside(rank.device) for _ in calls]
    for _ in range(10):
        rank.barrier()
        torch.cuda._sleep(1_000_000)  # until both calls are there, so that they start together
        for call, stream in zip(calls, streams, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                refusal = refused(call, workspace.handle)  # a peer's calls may have run at once before ours are there
                assert not refusal or "ran at once" in refusal, refusal
        for stream in streams:
            stream.synchronize()
        error = said(workspace)
        if error is not None:
            assert "ran at once" in str(error), error
            break
        wrong = calls[0].wrong() + calls[1].wrong()
        assert not wrong, "\n".join(wrong)
    workspace.close()


def refused(call: Prepared, handle: int) -> str:
    """What the op says, or ""."""
    try:
        call.launch(handle)
    except RuntimeError as error:
        return str(error)
    return ""


def said(workspace: Any) -> Any:
    """What check() raises, or None."""
    import mnnvl_ar

    try:
        workspace.check()
    except mnnvl_ar.WorkspaceBroken as error:
        return error
    return None


def check_peer_mark(rank: Any, off: str) -> None:
    """A rank whose peer has found a fault does not wait for its own deadline: rule told."""
    import mnnvl_ar

    deadline = 0.3 if rank.rank == 0 else DEADLINES[rank.device.type]
    workspace = sabotaged(rank, off, hidden=64, deadline=deadline, monitor=False)
    prepared = Prepared(rank, Call(tokens=1, hidden=64))
    rank.barrier()
    for turn in (0, 1):
        if rank.rank == turn:
            began = time.monotonic()
            for _ in range(1 + turn):  # what rank 1's first call needs is there
                with contextlib.suppress(RuntimeError):
                    prepared.launch(workspace.handle)
            took = time.monotonic() - began
            assert took < 1.0, f"rank {turn} took {took:.1f} s"
            with pytest.raises(mnnvl_ar.PeerTimeout):
                workspace.check()
        rank.barrier()
    workspace.close()


def check_canary(rank: Any, off: str) -> None:
    """A foreign word behind the control words is noticed: rule canary."""
    import mnnvl_ar

    workspace = sabotaged(rank, off, hidden=64, monitor=False)
    workspace.check()
    offset = named(torch.ops.mnnvl_ar._block_canaries)["offsets"][1]
    rank.barrier()
    if rank.rank == 0:
        write_word(rank, workspace, offset, 7)
        with pytest.raises(mnnvl_ar.WorkspaceBroken, match=f"overwritten at offset 0x{offset:x}"):
            workspace.check()
    rank.barrier()
    workspace.close()


def write_word(rank: Any, workspace: Any, offset: int, word: int) -> None:
    """Into this rank's block."""
    place = workspace._memory.pointers[rank.rank] + offset
    if rank.device.type == "cpu":
        ctypes.c_uint32.from_address(place).value = word
    else:
        workspace._memory._block.driver.fill(place, 4, word)


def check_zero_tokens(rank: Any, off: str) -> None:
    """Ranks may differ in how many calls of no tokens they make: rule zero_tokens (R7)."""
    workspace = sabotaged(rank, off, hidden=64)
    if rank.rank == 0:
        Prepared(rank, Call(tokens=0, hidden=64)).launch(workspace.handle)
    check_calls(rank, [Call(tokens=2, hidden=64)], handle=workspace.handle)
    workspace.close()


def check_one_thread(rank: Any, off: str) -> None:
    """A second thread's call is refused while one waits for its peers: rule one_thread."""
    workspace = sabotaged(rank, off, hidden=64, monitor=False)
    prepared = [Prepared(rank, Call(tokens=1, hidden=64, seed=seed)) for seed in (1, 2)]
    rank.barrier()
    if rank.rank == 0:
        thread = threading.Thread(target=prepared[0].launch, args=(workspace.handle,))
        thread.start()
        time.sleep(0.5)
        with pytest.raises(RuntimeError, match="another thread is in a call"):
            prepared[1].launch(workspace.handle)
        thread.join()
    else:
        time.sleep(2.0)
        prepared[0].launch(workspace.handle)
    assert not prepared[0].wrong()
    rank.barrier()
    workspace.close()


def check_closed_meanwhile(rank: Any, off: str) -> None:
    """A call that has found its workspace open looks again once nobody can close it any more: rule still_open."""
    workspace = sabotaged(rank, off, hidden=64, delay_ns=2_000_000_000)
    said = []

    def call() -> None:
        try:
            Prepared(rank, Call(tokens=1, hidden=64)).launch(workspace.handle)
        except RuntimeError as error:
            said.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.5)
    workspace.close()
    thread.join()
    assert len(said) == 1
    assert "is closed" in said[0]


def check_pieces(rank: Any, off: str) -> None:
    """A call larger than a slot runs in as many pieces on every rank: rule all_pieces, off on rank 1."""
    workspace = sabotaged(rank, off if rank.rank == 1 else "", max_tokens=20, hidden=264, max_bytes=PIECES_OF_FOUR)
    calls = [Call(tokens=t, hidden=264, strategy=s, seed=t) for t in (20, 3, 9) for s in (0, 1)]
    check_calls(rank, calls, handle=workspace.handle)
    rank.barrier()
    workspace.close()


def check_float_mode(rank: Any, off: str) -> None:
    """Bits do not depend on the floating-point mode that a rank calls in: rule float_mode. Nor do a norm's numbers, as
    doubles that become floats, which would differ by it in their last bit."""
    workspace = sabotaged(rank, off, hidden=264)
    numbers = {"eps": 1e-6, "weight_bias": 0.1}
    calls = [
        Call(op, 8, 264, dtype, strategy=s, **(numbers if "norm" in op else {}))
        for op in NAMES
        for dtype in ("fp32", "bf16", "fp16")
        for s in (0, 1)
    ]
    prepared = [Prepared(rank, call) for call in calls]
    for each in prepared:
        wanted(each.call, rank.world_size)
    for in_mode in (flushing, *map(rounding, ("down", "up", "to zero"))):
        with in_mode() if rank.rank == 1 else contextlib.nullcontext():
            for each in prepared:
                each.launch(workspace.handle)
        wrong = [line for each in prepared for line in each.wrong()]
        assert not wrong, "\n".join(wrong)
        rank.barrier()
    rank.barrier()
    workspace.close()


@contextlib.contextmanager
def flushing() -> Iterator[None]:
    """Subnormals are taken, and made, for 0; at the end still, as the mode is the caller's."""
    try:
        assert torch.set_flush_denormal(True)
        yield
        assert float(torch.tensor(1e-39) * 0.5) == 0.0
    finally:
        torch.set_flush_denormal(False)


def rounding(way: str) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """As by fesetround, whose numbers are each processor's own."""
    at = {"x86_64": 10, "aarch64": 22}[platform.machine()]
    order = {"x86_64": ("nearest", "down", "up", "to zero"), "aarch64": ("nearest", "up", "down", "to zero")}
    mode = order[platform.machine()].index(way) << at

    @contextlib.contextmanager
    def in_mode() -> Iterator[None]:
        libm = ctypes.CDLL("libm.so.6")
        try:
            assert libm.fesetround(mode) == 0
            yield
            assert libm.fegetround() == mode
        finally:
            libm.fesetround(0)

    return in_mode


def check_padding(rank: Any, off: str) -> None:
    """What pads an output is stored, whatever was there before: rule padding."""
    from common.cases.quantised import KINDS, Quantised

    workspace = sabotaged(rank, off, max_tokens=40, hidden=768)
    found = []
    for kind, tokens, hidden, options in (
        ("per_token_group_fp8", 3, 256, {"scales": 0, "layout": 2}),
        ("mxfp8", 2, 96, {}),
    ):
        call = Quantised(rank, kind, Call("all_reduce_rms_norm", tokens, hidden, "bf16", strategy=0), options=options)
        assert call.call.hidden == hidden, KINDS[kind]
        rank.barrier()
        call.launch(workspace.handle)
        rank.synchronize()
        found.append(bool(call.wrong()))
    assert not any(found), f"padding differs in {sum(found)} of {len(found)}"
    rank.barrier()
    workspace.close()


# rule -> (its check, ranks, what the control must say)
HOST_CHECKS = {
    "device_dirty": (check_stale_data, 2, "differs in"),
    "three_slots": (check_wiped_data, 3, "fault code 1|differs in|still running"),
    "clear": (check_stale_data, 2, "differs in"),
    "sanitize": (check_sentinels_in_data, 2, "fault code 1"),
    "integer_compare": (check_subnormals_in_data, 2, "fault code 1"),
    "every_word": (check_torn_store, 1, "word [123]"),
    "deadline": (check_absent_peer, 2, "still running"),
    "signature": (check_other_call, 2, "DID NOT RAISE"),
    "all_pieces": (check_pieces, 2, "fault code|differs in"),
    "padding": (check_padding, 2, "padding differs in 2 of 2"),
}
ONLY_HOST_CHECKS = {
    "zero_tokens": (check_zero_tokens, 2, "fault code"),
    "peer_mark": (check_peer_mark, 2, "rank 1 took"),
    "canary": (check_canary, 2, "DID NOT RAISE"),
    "one_thread": (check_one_thread, 2, "DID NOT RAISE|fault code"),
    "still_open": (check_closed_meanwhile, 1, "exit code -11"),
    "float_mode": (check_float_mode, 2, "differs in"),
}

# The same where ranks are virtual ones of a GPU.
GPU_CHECKS = {
    **HOST_CHECKS,
    "device_epoch": (check_replayed_call, 2, "differs in"),
    "quiescence": (check_overlapping_calls, 3, "differs in"),
    "advance_last": (check_many_ctas, 2, "differs in"),
    "two_at_once": (check_two_at_once, 2, "differs in|waited|did not end within"),
    "sanitize": (check_sentinels_in_data, 2, "differs in"),
    "integer_compare": (check_subnormals_in_data, 2, "differs in"),
    "three_slots": (check_wiped_data, 3, "differs in"),
}
