"""Calls larger than a slot: they run in pieces (csrc/protocol/pieces.h), with the bits of one launch.

Every function is run by all ranks.
"""

from __future__ import annotations

import contextlib
import random
import time
from typing import Any

import pytest
import torch

from common.cases.calls import ALIASING, Call, Prepared, check_calls, wanted
from common.cases.lifecycle import broken
from common.cases.rules import break_rule
from common.rows import DTYPES, hostile_rows

HIDDEN, ROW_BYTES = 264, 528  # bf16


def bytes_for_rows(rank: Any, rows: int, strategy: int, row_bytes: int = ROW_BYTES) -> int:
    """Of a block in whose slots so many rows go at once, and no more. In two-shot, columns are dealt to ranks whole."""
    size, vectors = rank.world_size, row_bytes // 16
    a_row = vectors * (size - 1) if strategy == 0 else size * -(-vectors // size) + vectors
    return int(16384 + 3 * rows * a_row * 16)


def pieces_of(workspace: Any, tokens: int, row_bytes: int, strategy: int) -> int:
    return int(torch.ops.mnnvl_ar._workspace_choice(workspace.handle, tokens, row_bytes, strategy)[6])


def check_boundaries(rank: Any, strategy: int, rows: int) -> int:
    """Pieces of `rows` rows, and calls of about 1, 2 and 3 times as many: every op, every aliasing."""
    bounds = {"max_tokens": 4 * rows, "hidden": HIDDEN, "dtype": torch.bfloat16, "transport": transport_of(rank)}
    least = max(bytes_for_rows(rank, 1, s) for s in (0, 1))  # a row can always go by either strategy
    bounds["max_bytes"] = max(least, bytes_for_rows(rank, rows, strategy))
    workspace = rank.new_workspace(**bounds)
    tokens = sorted({t for n in (1, 2, 3) for t in (n * rows - 1, n * rows, n * rows + 1) if t > 0})
    counts = {t: pieces_of(workspace, t, ROW_BYTES, strategy) for t in tokens}
    if bounds["max_bytes"] > least:
        assert counts == {t: -(-t // rows) for t in tokens}
    assert max(counts.values()) > 1
    forms = [("all_reduce", out) for out in ("", "A", "E")]
    forms += [("all_reduce_rms_norm", out) for out in ("", *ALIASING)]
    calls = [
        Call(op, t, HIDDEN, out=out, strategy=strategy, pdl=pdl, seed=t)
        for pdl, (op, out) in zip((-1, 0, 1, 2, -1, 0, 1, 2, -1), forms, strict=True)
        for t in tokens
    ]
    made = check_calls(rank, calls, handle=workspace.handle)
    rank.barrier()
    workspace.close()
    return made


def transport_of(rank: Any) -> str:
    return "auto" if rank.device.type == "cpu" else "unicast"


def check_random_sizes(rank: Any, count: int, seed: int) -> int:
    """Calls of any size, dtype, op and strategy on one small workspace, back to back."""
    draw = random.Random(seed)
    workspace = rank.new_workspace(max_tokens=64, hidden=2880, max_bytes=bytes_for_rows(rank, 5, 1, 11520))
    calls = []
    for number in range(count):
        dtype = draw.choice(("bf16", "fp16", "fp32"))
        op = draw.choice(("all_reduce", "all_reduce_rms_norm"))
        out = draw.choice(("", "A", "E") if op == "all_reduce" else ("", *ALIASING))
        tokens, hidden = draw.randint(1, 40), draw.choice((8, 264, 2048, 2880))
        calls.append(Call(op, tokens, hidden, dtype, out, draw.choice((-1, 0, 1)), seed=number))
    made = check_calls(rank, calls, handle=workspace.handle)
    rank.barrier()
    workspace.close()
    return made


def check_many_rows(rank: Any, tokens: int) -> tuple[int, int]:
    """A call of very many rows in a workspace of the default size for few. Returns its bytes and the pieces."""
    workspace = rank.new_workspace(max_tokens=64, hidden=64, dtype=torch.bfloat16)
    calls = [
        Call(op, tokens, 64, out="E", strategy=s, seed=s)
        for op in ("all_reduce", "all_reduce_rms_norm")
        for s in (0, 1)
    ]
    count = pieces_of(workspace, tokens, 128, 1)
    assert count > 100
    assert workspace_fits(workspace, tokens)
    check_calls(rank, calls, handle=workspace.handle)
    rank.barrier()
    workspace.close()
    return getattr(workspace, "nbytes", 0), count


def workspace_fits(workspace: Any, tokens: int) -> bool:
    return bool(torch.ops.mnnvl_ar._workspace_fits(workspace.handle, tokens, 128))


# Not rows that an op of rows takes: too long, no whole vectors in a row, no vectors at all, a prime number of them.
SHAPES = (
    (2, 20000),
    (3, 100, 2, 4),
    (1, 65536),
    (16, 1),
    (8,),
    (5, 7, 8, 1),
    (4, 0),
    (0, 4),
    (257 * 8, 3),
    (8 * 4099,),
)


def check_any_shape(rank: Any) -> None:
    """Plain all-reduce takes each element for itself, so any contiguous tensor of whole vectors will do."""
    from mnnvl_ar import ops
    from mnnvl_ar.reference import all_reduce, same_bits

    workspace = rank.new_workspace(max_tokens=8, hidden=8192)
    for number, (shape, dtype) in enumerate((s, d) for s in SHAPES for d in ("bf16", "fp32")):
        count = torch.Size(shape).numel()
        xs = (
            [hostile_rows(1, count, DTYPES[dtype], seed=number, rank=r).view(shape) for r in range(rank.world_size)]
            if count
            else [torch.zeros(shape, dtype=DTYPES[dtype])] * rank.world_size
        )
        want, x = all_reduce(xs), xs[rank.rank].to(rank.device)
        out, inplace = torch.full_like(x, 3.0), x.clone()
        rank.barrier()
        fresh = ops.all_reduce(x, workspace.handle)
        ops.all_reduce_out(x, out, workspace.handle)
        ops.all_reduce_out(inplace, inplace, workspace.handle)
        rank.barrier()
        for name, got in {"fresh": fresh, "out": out, "in place": inplace}.items():
            assert got.shape == want.shape, (name, shape)
            assert same_bits(got, want), (name, shape, dtype)
    for shape, dtype in (((3, 7), torch.bfloat16), ((), torch.float32), ((2, 2, 3), torch.float16)):
        x = torch.zeros(shape, dtype=dtype, device=rank.device)
        with pytest.raises(RuntimeError, match=r"x: has shape \[.*\], \d+ bytes, wanted a multiple of 16 bytes"):
            ops.all_reduce(x, workspace.handle)
    x = torch.zeros(2, 20000, dtype=torch.bfloat16, device=rank.device)
    with pytest.raises(RuntimeError, match=r"out: has shape \[20000, 2\], wanted \[2, 20000\] like x"):
        ops.all_reduce_out(x, x.view(20000, 2), workspace.handle)
    rank.barrier()
    workspace.close()


def check_left_in_the_middle(rank: Any) -> None:
    """Rank 1 leaves a call behind its first piece: the others name it, in that call's second piece, after one deadline
    for all pieces that are left. Rows of the first piece are right, all others NaN."""
    deadline, rows, count = 0.5, 4, 9
    workspace = rank.new_workspace(
        max_tokens=64, hidden=HIDDEN, dtype=torch.bfloat16, deadline=deadline, max_bytes=bytes_for_rows(rank, rows, 1),
        transport=transport_of(rank),
    )  # fmt: skip
    check_calls(rank, [Call(tokens=30, hidden=HIDDEN, strategy=1)], handle=workspace.handle)
    call = Call(tokens=rows * count, hidden=HIDDEN, out="E", strategy=1, seed=7)
    assert pieces_of(workspace, call.tokens, ROW_BYTES, 1) == count
    prepared = Prepared(rank, call)
    rank.barrier()
    began = time.monotonic()
    if rank.rank == 1:
        break_rule(workspace.handle, "all_pieces")
        prepared.launch(workspace.handle)
        rank.synchronize()
    else:
        launch_and_wait(rank, prepared, workspace.handle)
        assert time.monotonic() - began < 1.8 * deadline, "a deadline a piece"
        error = broken(workspace, 1.0)
        assert type(error).__name__ == "PeerTimeout", error
        assert (error.peer, error.call_number) == (1, 1), error
        assert error.call == f"all_reduce_rms_norm([{rows * count}, {HIDDEN}], bfloat16, two_shot) (piece 2)", error
        norm, residual_out = wanted(call, rank.world_size)
        for got, want in ((prepared.norm_out, norm), (prepared.residual_out, residual_out)):
            found = got.cpu()
            assert torch.equal(found[:rows].nan_to_num(), want[:rows].nan_to_num())
            assert found[rows:].isnan().all()
    rank.barrier()
    workspace.close()


def check_another_piece(rank: Any) -> None:
    """Rank 1 leaves a call behind its first piece, and makes it again: ranks in two pieces of like calls hear of it."""
    workspace = rank.new_workspace(
        max_tokens=64, hidden=HIDDEN, dtype=torch.bfloat16, deadline=3.0, max_bytes=bytes_for_rows(rank, 4, 1),
        transport=transport_of(rank),
    )  # fmt: skip
    call = Call(tokens=12, hidden=HIDDEN, out="E", strategy=1)
    prepared = Prepared(rank, call)
    rank.barrier()
    if rank.rank == 1:
        break_rule(workspace.handle, "all_pieces")
        for _ in range(2):
            launch_and_wait(rank, prepared, workspace.handle)
    else:
        launch_and_wait(rank, prepared, workspace.handle)
    rank.barrier()
    error = broken(workspace, 1.0)
    assert type(error).__name__ == "CallMismatch", error
    assert "(piece 2)" in str(error), error
    rank.barrier()
    workspace.close()


def launch_and_wait(rank: Any, call: Any, handle: int) -> None:
    """The host transport's call raises if it breaks; a GPU's does not."""
    with contextlib.suppress(*[RuntimeError] * (rank.device.type == "cpu")):
        call.launch(handle)
    rank.synchronize()
