"""Bound calls: the bits of the op, again and again, and its errors."""

from typing import Any

import pytest
import torch

from common.cases.calls import Call, Prepared
from common.places import gpus, host, virtual

CALLS = (
    Call("all_reduce_rms_norm", 1, 264, "bf16", out="E"),
    Call("all_reduce_rms_norm", 40, 264, "fp16", out="E", weight_bias=1.0, pdl=2),
    Call("all_reduce", 7, 264, "fp32", out="E"),
)


def bind(each: Prepared, handle: int) -> Any:
    from mnnvl_ar import bind, ops

    call, options = each.call, {"pdl": each.call.pdl, "strategy": each.call.strategy}
    if call.op == "all_reduce":
        each.outputs = (each.norm_out,)
        return bind(ops.all_reduce_out, each.x, each.norm_out, handle, **options)
    each.outputs = (each.norm_out, each.residual_out)
    given = (each.x, each.residual, each.weight, call.eps, *each.outputs, handle)
    return bind(ops.all_reduce_rms_norm_out, *given, weight_bias=call.weight_bias, **options)


def check_bound(rank: Any) -> None:
    """Alone, mixed with calls of the op, and in pieces: 16 KiB more than the slots of 16 fp32 rows by one-shot."""
    workspace = rank.new_workspace(max_tokens=40, hidden=264, max_bytes=16384 + 3 * 16 * rank.world_size * 264 * 4)
    prepared = [Prepared(rank, call) for call in CALLS]
    bound = [bind(each, workspace.handle) for each in prepared]
    for turn in range(4):
        for call, each in zip(bound, prepared, strict=True):
            for output in each.outputs:
                output.fill_(3.0)
            rank.synchronize()
            rank.barrier()
            if turn == 2:
                each.launch(workspace.handle)
            else:
                call()
            rank.synchronize()
            assert not each.wrong(), each.wrong()
    rank.barrier()
    workspace.close()
    with pytest.raises(RuntimeError, match="is closed"):
        bound[0]()


def check_refusals(rank: Any) -> None:
    from mnnvl_ar import bind as bind_call
    from mnnvl_ar import ops

    handle = rank.workspace().handle
    x = torch.ones(2, 64, device=rank.device)
    with pytest.raises(ValueError, match=r"op: is all_reduce.*, wanted an op that writes"):
        bind_call(ops.all_reduce, x, handle)
    with pytest.raises(RuntimeError, match="out: "):
        bind_call(ops.all_reduce_out, x, x[:1], handle)()
    bind_call(ops.all_reduce_out, x, x, handle)()  # what was refused left nothing behind
    rank.synchronize()
    assert bool(x.eq(rank.world_size).all())


def check_sharing(rank: Any) -> None:
    """Launch shapes go by how many workspaces share the device: a call bound before a second one is bound anew."""
    from mnnvl_ar import bind as bind_call
    from mnnvl_ar import ops

    first = rank.new_workspace(max_tokens=4, hidden=64)
    x, out = torch.ones(4, 64, device=rank.device), torch.zeros(4, 64, device=rank.device)
    call = bind_call(ops.all_reduce_out, x, out, first.handle)
    before = call._number
    call()
    assert call._number == before
    second = rank.new_workspace(max_tokens=4, hidden=64)
    call()
    rank.synchronize()
    assert call._number != before
    assert bool(out.eq(rank.world_size).all())
    rank.barrier()
    first.close()
    second.close()


@pytest.mark.parametrize("ranks", [host(2), virtual(2), virtual(3), gpus(2)], indirect=True)
def test_the_bits_of_the_op(ranks: Any) -> None:
    ranks.run(check_bound)


@pytest.mark.parametrize("ranks", [host(2), virtual(2)], indirect=True)
def test_refusals(ranks: Any) -> None:
    ranks.run(check_refusals)


@pytest.mark.parametrize("ranks", [gpus(2)], indirect=True)
def test_another_workspace_on_the_device(ranks: Any) -> None:
    ranks.run(check_sharing)
