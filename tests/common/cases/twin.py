"""Checks of the twin beside the library (common.twin says which of the two makes a call). Run by virtual ranks."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch

from common.cases.calls import ALIASING, Call, Prepared, check_calls, wanted
from common.cases.diagnosis import check_different_in
from common.cases.lifecycle import broken
from common.cases.rules import check_two_streams
from common.cases.traffic import same_on_device
from common.ranks import RanksFailed
from common.rows import hostile_rows
from common.streams import stream_aside
from common.twin import in_place_of
from mnnvl_ar._library import named

HIDDENS = (2880, 4096, 7168, 8192)
WORKSPACE = {"max_tokens": 64, "hidden": 8192, "dtype": torch.bfloat16, "strategy": "one_shot", "deadline": 5.0}


def normed(**given: Any) -> Call:
    """A call that the twin has."""
    return Call(**{"op": "all_reduce_rms_norm", "dtype": "bf16", "strategy": 0, **given})


def all_kinds(seed: int) -> list[Call]:
    """Every size and option that the twin has."""
    draw = random.Random(seed)
    sizes = [(t, h) for h in (*HIDDENS, 8, 64, 264, 520) for t in (1, 3, 16, 33)] + [(64, 2880), (57, 7168)]
    return [
        normed(
            tokens=tokens,
            hidden=hidden,
            out=draw.choice(("", *ALIASING)),
            pdl=draw.choice((-1, 0, 1, 2)),
            fp32_weight=draw.random() < 0.4,
            weight_bias=draw.choice((0.0, 1.0)),
            eps=draw.choice((1e-5, 1e-6)),
            tag=draw.choice((0, 0, 1, 3)),
            seed=seed + number,
        )
        for number, (tokens, hidden) in enumerate(sizes)
    ]


def palette(seed: int, count: int = 16) -> list[Call]:
    """Mostly calls that the twin has, and between them others."""
    draw = random.Random(seed)
    sizes = [(draw.choice((1, 2, 3, 8, 16)), draw.choice((*HIDDENS, 264))) for _ in range(count)]
    calls = [
        normed(tokens=tokens, hidden=hidden, out=draw.choice(("", "E")), seed=seed + n)
        for n, (tokens, hidden) in enumerate(sizes)
    ]
    calls[3] = Call("all_reduce", 5, 2880, "bf16", strategy=0, seed=seed)
    calls[7] = Call("all_reduce_rms_norm", 4, 4096, "fp16", strategy=1, seed=seed)
    calls[11] = Call("all_reduce_rms_norm", 9, 264, "fp32", strategy=0, out="E", seed=seed)
    return calls


def check_kinds(rank: Any, calls: list[Call]) -> None:
    check_calls(rank, calls, WORKSPACE)


def check_some_kinds(rank: Any) -> None:
    check_calls(rank, all_kinds(7)[:12], {**WORKSPACE, "deadline": 1.5})


def check_sentinels(rank: Any) -> None:
    """A row of nothing but sentinels is a row like any other."""
    rows = hostile_rows(1, 64, torch.bfloat16, seed=6, rank=rank.rank)
    assert rows.view(torch.int32).eq(-(1 << 31)).all()
    workspace = rank.new_workspace(**{**WORKSPACE, "deadline": 1.5})
    check_calls(rank, [normed(tokens=1, hidden=64, seed=6)], handle=workspace.handle)
    rank.barrier()
    workspace.close()


def check_torn(rank: Any) -> None:
    """A 16-byte store that arrives in two parts is not taken for data before it is whole. Rank 0 is real, with a peer
    that sends all words of its vector but one, and that one later; the other rank does nothing."""
    import threading

    from common.virtual import VirtualGroup
    from mnnvl_ar import ops, reference

    if rank.rank != 0:
        return
    x, theirs = (torch.arange(1.0, 9.0).mul(k).bfloat16().view(1, 8) for k in (1, 10))
    residual, weight = torch.zeros_like(x), torch.ones(8, dtype=torch.bfloat16)
    want = reference.all_reduce_rms_norm([x, theirs], residual, weight, 1e-6)
    words = theirs.view(torch.int32).view(-1)
    stream = stream_aside(rank.device)
    given = [each.to(rank.device) for each in (x, residual, weight)]
    for missing in range(4):
        group = VirtualGroup(2, 1, 8, torch.bfloat16, str(rank.device), deadline=1.5)
        told = named(torch.ops.mnnvl_ar._norm_call, *given, 1e-6, None, None, group.handles[0], strategy=0)
        layout = named(torch.ops.mnnvl_ar._block_layout, 0)
        board, control = layout["board_offset"] // 4 + 4, layout["control_bytes"] // 4
        numbers = board + layout["board_bytes"] // 8

        def write(place: int, given: Any, group: Any = group) -> None:
            with torch.cuda.stream(stream):
                group.blocks[0][place : place + 4].copy_(torch.as_tensor(given, dtype=torch.int32))
            stream.synchronize()

        outputs: list[Any] = []

        def call(outputs: list[Any] = outputs, group: Any = group) -> None:
            with torch.cuda.stream(group.streams[0]):
                outputs += ops.all_reduce_rms_norm(*given, 1e-6, group.handles[0], strategy=0)

        torch.cuda.synchronize(rank.device)
        thread = threading.Thread(target=in_place_of(call))
        thread.start()
        write(board, [0, 1, 0, told["pieces"][3]])
        write(numbers, [0, told["eps"], 0, told["weight_bias"]])
        torn = words.clone()
        torn[missing] = -(1 << 31)
        write(control, torn)
        time.sleep(0.1)
        write(control, words)
        thread.join()
        torch.cuda.synchronize(rank.device)
        group.close()
        same = [reference.same_bits(got, each) for got, each in zip(outputs, want, strict=True)]
        assert all(same), f"missing word {missing}: {outputs}"


def check_tag(rank: Any) -> None:
    check_different_in(rank, "tag")


def check_alternating(rank: Any, runs: int, seed: int) -> None:
    """Calls captured alone and in rows, and eager ones, in any order, back to back; every output is compared, on the
    device. Which implementation a captured call is of was drawn when it was captured, of an eager one each time."""
    handle = rank.workspace(**WORKSPACE).handle
    prepared = [Prepared(rank, call) for call in palette(seed)]
    answers = [[w.to(rank.device) for w in wanted(each.call, rank.world_size)] for each in prepared]
    rows = [[n] for n in range(8)] + [[0, 1, 2, 3, 4], [8, 9, 10, 11, 8, 9], [12, 13, 12, 14]]
    graphs, captured = [], []
    for row in rows:
        made = [(n, Prepared(rank, prepared[n].call)) for n in row]
        graph = rank.capture(lambda made=made: [each.launch(handle) for _, each in made])
        graphs.append(graph)
        captured.append(made)
    for want in answers:  # loads the kernels of the comparison, while nobody waits
        same_on_device(want[0].clone(), want[0])
    rank.barrier()
    draw, good = random.Random(seed), []
    for _ in range(runs):
        if draw.random() < 0.6:
            pick = draw.randrange(len(graphs))
            graphs[pick].replay()
            ran = captured[pick]
        else:
            pick = draw.randrange(len(prepared))
            prepared[pick].launch(handle)
            ran = [(pick, prepared[pick])]
        for n, each in ran:
            good += [same_on_device(g, w) for g, w in zip(each.outputs, answers[n], strict=True)]
        if len(good) > 400:
            assert all(flag.item() for flag in good), "a wrong bit"
            good.clear()
    assert all(flag.item() for flag in good), "a wrong bit"
    rank.barrier()


def check_soak(rank: Any, calls: int, tokens: int, hidden: int) -> None:
    """`calls` replayed calls of two rows of numbers in turn, each row compared after every replay of a graph."""
    handle = rank.workspace(**WORKSPACE).handle
    length = 50
    prepared = [Prepared(rank, normed(tokens=tokens, hidden=hidden, seed=seed)) for seed in (1, 2, 3)]
    answers = [[w.to(rank.device) for w in wanted(each.call, rank.world_size)] for each in prepared]
    row = [Prepared(rank, prepared[n % 3].call) for n in range(length)]
    graph = rank.capture(lambda: [each.launch(handle) for each in row])
    for want in answers:
        same_on_device(want[0].clone(), want[0])
    bad = torch.zeros((), dtype=torch.int32, device=rank.device)
    bad += same_on_device(answers[0][0], answers[0][0]).logical_not()
    rank.barrier()
    for number in range(calls // length):
        graph.replay()
        n = number % length  # another call of the row each time, and at last all
        for got, want in zip(row[n].outputs, answers[n % 3], strict=True):
            bad += same_on_device(got, want).logical_not()
        if number % 64 == 0:
            rank.synchronize()  # or the queue of launches grows without bound
    for n, each in enumerate(row):
        for got, want in zip(each.outputs, answers[n % 3], strict=True):
            bad += same_on_device(got, want).logical_not()
    assert bad.item() == 0
    rank.barrier()


def check_epochs(rank: Any, first: int, count: int) -> None:
    """Calls whose numbers begin near `first`, a multiple of three."""
    made = rank.new_workspace(**WORKSPACE)
    rank.barrier()
    rank.set_epoch(made, first)
    rank.barrier()
    check_calls(
        rank, [normed(tokens=1 + n % 5, hidden=HIDDENS[n % 4], seed=n) for n in range(count)], handle=made.handle
    )
    rank.barrier()
    made.close()


def check_pieces(rank: Any, rows: int) -> None:
    """Calls of several pieces; what people read counts calls."""
    row_bytes = 264 * 2
    bounds = {"max_tokens": 4 * rows, "hidden": 264, "dtype": torch.bfloat16, "deadline": 5.0}
    bounds["max_bytes"] = 16384 + 3 * rows * row_bytes * (rank.world_size - 1)
    workspace = rank.new_workspace(**bounds)
    tokens = (1, rows, rows + 1, 3 * rows - 1, 3 * rows)

    def pieces_of(tokens: int) -> int:
        return int(named(torch.ops.mnnvl_ar._workspace_choice, workspace.handle, tokens, row_bytes, 0)["pieces"])

    assert pieces_of(3 * rows) == 3
    check_calls(rank, [normed(tokens=t, hidden=264, seed=t) for t in tokens], handle=workspace.handle)
    state = workspace.group.blocks[rank.rank][:8].tolist()
    pieces = [pieces_of(t) for t in tokens]
    assert state[0] == sum(pieces), state
    assert state[7] == sum(pieces) - len(tokens), state
    rank.barrier()
    workspace.close()


def check_rest(rank: Any) -> None:
    """What a call leaves in the control words, and in the slots: the same as the library's."""
    workspace = rank.new_workspace(**WORKSPACE)
    check_calls(rank, [normed(tokens=t, hidden=4096, seed=t) for t in (3, 5, 2)], handle=workspace.handle)
    rank.barrier()
    words = workspace.group.blocks[rank.rank].cpu()
    epoch, launched, dirty, arrived, finished, failed, claimed, later = words[:8].tolist()
    assert (epoch, arrived, failed, claimed, later) == (3, 0, 0, 0, 0)
    assert launched == finished > 0
    assert dirty == 2 * 512 * (rank.world_size - 1)
    sentinel, slot = -(1 << 31), workspace.group.layout.nbytes // 4 - 4096
    slots = words[4096:].view(3, slot // 3)
    assert (slots[0] == sentinel).all(), "cleared by the second call"
    assert (slots[1] == sentinel).all(), "cleared by the third call"
    assert (slots[2][: dirty * 4] != sentinel).all()
    assert (slots[2][dirty * 4 :] == sentinel).all()
    rank.barrier()
    workspace.close()


def check_absent(rank: Any, absent: int) -> None:
    """One rank stays away: the others name it within the deadline and a second, and their outputs are NaN. The same
    workspace refuses its next call."""
    workspace = rank.new_workspace(**{**WORKSPACE, "deadline": 0.5})
    check_calls(rank, [normed(tokens=2, hidden=4096)], handle=workspace.handle)
    rank.barrier()
    if rank.rank != absent:
        began = time.monotonic()
        prepared = Prepared(rank, normed(tokens=3, hidden=4096))
        prepared.launch(workspace.handle)
        rank.synchronize()
        assert 0.3 < time.monotonic() - began < 1.5
        assert all(bool(out.isnan().any(-1).all()) for out in prepared.outputs)
        assert prepared.outputs[0].isnan().all()
        error = broken(workspace, 1.5)
        assert type(error).__name__ == "PeerTimeout", error
        assert (error.rank, error.peer, error.call_number) == (rank.rank, absent, 1), vars(error)
        with pytest.raises(RuntimeError, match=f"rank {absent}"):
            prepared.launch(workspace.handle)
    rank.barrier()
    workspace.close()


def check_two_at_once(rank: Any, must: bool = False) -> None:
    """Two streams at once on one workspace: right bits, or an error that says so; `must`: that error, of calls that are
    signed alike, so that it is what the kernel has noticed. Otherwise, if they come one after the other, but on ranks
    in another order, their tags tell."""
    workspace = rank.new_workspace(**{**WORKSPACE, "deadline": 2.0})
    calls = [Prepared(rank, normed(tokens=8, hidden=8192, pdl=0, tag=0 if must else n, seed=n + 3)) for n in (0, 1)]
    streams = [stream_aside(rank.device) for _ in calls]
    refusals: list[str] = []
    for _ in range(200 if must else 6):  # the first that shows it ends it
        rank.barrier()
        torch.cuda._sleep(10_000_000)  # 5 ms: until both calls are there, a millisecond each where threads share a GIL
        for call, stream in zip(calls, streams, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                try:
                    call.launch(workspace.handle)
                except RuntimeError as error:  # a peer's calls may have run at once before ours are there
                    refusals.append(str(error))
        for stream in streams:
            stream.synchronize()
        rank.barrier()  # whoever found something has told its peers
        try:
            workspace.check()
        except RuntimeError as error:
            refusals.append(str(error))
        assert all("ran at once" in text or "with tag " in text for text in refusals), refusals
        if refusals:
            break
        wrong = calls[0].wrong() + calls[1].wrong()
        assert not wrong, "\n".join(wrong)
    assert not must or any("ran at once" in text for text in refusals), refusals
    workspace.close()


def check_overlapping(rank: Any) -> None:
    """A call that starts before its predecessor on this rank has ended finds out and waits: rule quiescence."""
    workspace = rank.new_workspace(**WORKSPACE)
    first, second = (Prepared(rank, normed(tokens=3, hidden=2880, pdl=0, seed=seed)) for seed in (3, 4))
    check_two_streams(rank, workspace, first, second)


def check_world(_: Any, world_size: int) -> None:
    """By a single process: a number of ranks that the twin does not have."""
    from common.virtual_ranks import VirtualRanks

    with pytest.raises(RanksFailed, match=f"TwinUnavailable: workspace: has {world_size} ranks, the twin has kernels"):
        VirtualRanks(1).run(refused_world, world_size)


def refused_world(rank: Any, world_size: int) -> None:
    from common.virtual import VirtualGroup
    from mnnvl_ar import dsl

    group = VirtualGroup(world_size, 4, 64, torch.bfloat16, str(rank.device))
    x = torch.ones(2, 64, dtype=torch.bfloat16, device=rank.device)
    try:
        dsl.all_reduce_rms_norm(x, x.clone(), x[0].clone(), 1e-6, group.handles[0], strategy=0)
    finally:
        group.close()


def check_round(rank: Any, plan: Any) -> Any:
    """A round of the library's fault matrix (tools/faults), as it is; how it ended for this rank."""
    from common.cases.calls import NAMES
    from tools.faults.plan import SIZES
    from tools.faults.rank import round_of

    rank._workspaces = {}
    for call in SIZES[plan.device]:  # memory that a round takes is there: it may not synchronise the device later
        kept = [Prepared(rank, call) for _ in NAMES]
        kept[0].outputs = tuple(torch.empty_like(kept[0].x) for _ in range(4))
        del kept
    rank.barrier()
    outcome = round_of(rank, plan)
    rank.barrier()
    return outcome


def check_refusals(rank: Any) -> None:
    """Bad input: what the library refuses, in its words; then what the twin does not have, and what it has."""
    from mnnvl_ar import dsl
    from mnnvl_ar.dsl.launch import TwinUnavailable

    workspace = rank.new_workspace(**WORKSPACE)

    def call(kind: type[Exception], text: str, handle: int = workspace.handle, **given: Any) -> None:
        x = given.pop("x", torch.ones(2, 64, dtype=torch.bfloat16, device=rank.device))
        residual = given.pop("residual", torch.ones_like(x))
        weight = given.pop("weight", torch.ones(x.shape[-1], dtype=x.dtype, device=x.device))
        with pytest.raises(kind, match=text):
            dsl.all_reduce_rms_norm(x, residual, weight, 1e-6, handle, **given)

    on = {"dtype": torch.bfloat16, "device": rank.device}
    call(RuntimeError, "x: rows of 12 elements are 24 bytes", x=torch.ones(2, 12, **on))
    call(RuntimeError, "residual: has shape", residual=torch.ones(3, 64, **on))
    call(RuntimeError, "weight: is", weight=torch.ones(64, dtype=torch.float16, device=rank.device))
    call(RuntimeError, "x: is not contiguous", x=torch.ones(64, 64, **on).t())
    call(RuntimeError, "tag: is 9", tag=9)
    call(RuntimeError, "norm_out: overlaps residual_out", out=(torch.ones(2, 64, **on),) * 2)
    call(RuntimeError, "is unknown", handle=10_000)
    call(
        TwinUnavailable,
        "x: is torch.float16, the twin has torch.bfloat16",
        x=torch.ones(2, 64, device=rank.device).half(),
    )
    call(TwinUnavailable, "up to 8192", x=torch.ones(1, 8200, **on))
    call(TwinUnavailable, "goes by two-shot, the twin has one-shot alone", strategy=1)
    call(ValueError, "epilogue: is 'no:such'", epilogue="no:such")
    rank.barrier()
    check_calls(rank, [normed(tokens=2, hidden=64)], handle=workspace.handle)
    rank.barrier()
    workspace.close()


def check_epilogue(rank: Any, epilogue: str) -> None:
    """The tutorial's: the norm's square where it is positive, else 0."""
    from mnnvl_ar import dsl, reference

    handle = rank.workspace(**WORKSPACE).handle
    for tokens, hidden in ((1, 2880), (5, 4096), (3, 8192)):
        prepared = Prepared(rank, normed(tokens=tokens, hidden=hidden, seed=tokens))
        norm, residual_out = wanted(prepared.call, rank.world_size)
        want = torch.where(norm < 0, 0.0, norm.float() * norm.float()).bfloat16()  # a NaN is not less
        rank.barrier()
        got = dsl.all_reduce_rms_norm(
            prepared.x, prepared.residual, prepared.weight, prepared.call.eps, handle, strategy=0, epilogue=epilogue
        )
        rank.synchronize()
        assert reference.same_bits(got[0], want)
        assert reference.same_bits(got[1], residual_out)
        rank.barrier()
