"""Ranks whose tensors differ, with `MNNVL_AR_CHECK=1` and without."""

from __future__ import annotations

import pickle
from typing import Any
from unittest import mock

import pytest
import torch

from common.cases.bad_input import expect
from common.cases.calls import Call, check_calls

ROWS, HIDDEN = 3, 128
SMALL = {"max_tokens": 8, "hidden": HIDDEN, "dtype": torch.bfloat16, "monitor": False}

# By argument: the op, and which of its tensors differs.
INPUTS = {
    "weight": "all_reduce_rms_norm",
    "residual": "all_reduce_rms_norm",
    "scale": "all_reduce_rms_norm_static_fp8",
    "global_scale": "all_reduce_rms_norm_nvfp4",
}


def tensors(rank: Any) -> dict[str, torch.Tensor]:
    made = {
        "residual": torch.arange(ROWS * HIDDEN).reshape(ROWS, HIDDEN).to(torch.bfloat16) / 64,
        "weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        "scale": torch.ones(1, dtype=torch.float32),
        "global_scale": torch.ones(1, dtype=torch.float32),
    }
    return {name: each.to(rank.device) for name, each in made.items()}


def call(rank: Any, handle: int, op: str, given: dict[str, torch.Tensor]) -> Any:
    x = torch.full((ROWS, HIDDEN), rank.rank + 1.0, dtype=torch.bfloat16, device=rank.device)
    if op == "all_reduce":
        return torch.ops.mnnvl_ar.all_reduce(x, handle)
    scales = [given[name] for name, of in INPUTS.items() if of == op and "scale" in name]
    return getattr(torch.ops.mnnvl_ar, op)(x, given["residual"], given["weight"], 1e-6, *scales, handle)


def check_input_differs(rank: Any, argument: str, odd: int, is_on: bool) -> None:
    """One bit of one rank's input. With the variable all ranks say which input, whose, and in which call, and the next
    call is compared again; without it, the control, nobody says anything."""
    import mnnvl_ar

    workspace = rank.new_workspace(**SMALL)
    op, given = INPUTS[argument], tensors(rank)
    call(rank, workspace.handle, op, given)
    if rank.rank == odd:
        given[argument].view(torch.uint8).view(-1)[-1] ^= 1
    if not is_on:
        call(rank, workspace.handle, op, given)
        rank.synchronize()
        workspace.check()
    else:
        for number in (1, 2):
            with pytest.raises(mnnvl_ar.RanksDiffer) as caught:
                call(rank, workspace.handle, op, given)
            check_error(rank, caught.value, argument, odd)
            assert f"{op}([{ROWS}, {HIDDEN}], bfloat16), call number {number}," in str(caught.value)
        workspace.check()
        call(rank, workspace.handle, op, tensors(rank))
    rank.barrier()
    workspace.close()


def check_default_dtype(rank: Any, default: torch.dtype) -> None:
    """A user's default dtype changes nothing: what is alike passes, what differs is named by its whole checksums."""
    torch.set_default_dtype(default)
    try:
        check_alike(rank)
        check_input_differs(rank, "weight", rank.world_size - 1, True)
    finally:
        torch.set_default_dtype(torch.float32)


def check_error(rank: Any, error: Any, argument: str, odd: int) -> None:
    two = rank.world_size == 2
    assert (error.rank, error.argument) == (rank.rank, argument), error
    assert error.peers == ([0, 1] if two else [odd]), error
    assert len(error.checksums) == rank.world_size
    assert len(set(error.checksums)) == 2
    wanted = "on ranks 0, 1: no majority has one" if two else f"on rank {odd} and not on the others"
    assert f"{argument} differs between ranks" in str(error), error
    assert wanted in str(error), error
    assert all(f"rank {each}: {value:016x}" for each, value in enumerate(error.checksums)), error
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), vars(again)) == (str(error), vars(error))


def check_output_differs(rank: Any, odd: int, is_on: bool) -> None:
    """An output that something else has written to on one rank, while all inputs are alike."""
    import mnnvl_ar
    from mnnvl_ar import crosscheck

    workspace, real = rank.new_workspace(**SMALL), crosscheck._run

    def damaged(op: Any, *rest: Any) -> Any:
        result = real(op, *rest)
        if rank.rank == odd and op is torch.ops.mnnvl_ar.all_reduce_rms_norm.default:
            result[1].view(torch.uint8).view(-1)[0] ^= 1
        return result

    with mock.patch.object(crosscheck, "_run", damaged):
        try:
            call(rank, workspace.handle, "all_reduce_rms_norm", tensors(rank))
        except mnnvl_ar.RanksDiffer as error:
            assert is_on
            check_error(rank, error, "residual_out", odd)
        else:
            assert not is_on
    rank.barrier()
    workspace.close()


def check_alike(rank: Any) -> None:
    """Nothing is said where nothing differs: every op, in place too, calls in pieces and in either strategy; and all
    bits are what they are without."""
    from mnnvl_ar import Workspace

    workspace = rank.new_workspace(**SMALL)
    for op in ("all_reduce", *INPUTS.values(), "all_reduce_rms_norm_per_token_fp8", "all_reduce_rms_norm_mxfp8"):
        call(rank, workspace.handle, op, tensors(rank))
    with torch.inference_mode():
        call(rank, workspace.handle, "all_reduce_rms_norm", tensors(rank))
    calls = [
        Call(op=op, tokens=t, strategy=s, out=out, seed=t, dtype=dtype)
        for t in (0, 1, 8)
        for s in (0, 1)
        for out in ("", "A", "E")
        for op, dtype in (("all_reduce", "fp32"), ("all_reduce_rms_norm", "bf16"))
    ]
    check_calls(rank, calls, handle=workspace.handle)
    assert workspace.fits(4000, HIDDEN, torch.bfloat16)
    check_calls(rank, [Call(tokens=4000, hidden=HIDDEN)], handle=workspace.handle)
    least = Workspace.bytes_for(rank.world_size, 1, HIDDEN, torch.bfloat16, device=rank.device)
    tight = rank.new_workspace(**{**SMALL, "max_tokens": 1, "max_bytes": least})
    check_calls(rank, [Call(tokens=5)], handle=tight.handle)
    rank.barrier()
    for each in (workspace, tight):
        each.close()


def check_captured(rank: Any) -> None:
    """Captured calls are not compared, and can be captured and replayed as ever."""
    workspace, given = rank.new_workspace(**SMALL), tensors(rank)
    if rank.rank == 0:
        given["weight"][3] += 1
    graph = rank.capture(lambda: call(rank, workspace.handle, "all_reduce_rms_norm", given))
    for _ in range(3):
        rank.barrier()
        graph.replay()
        rank.synchronize()
    workspace.check()
    rank.barrier()
    workspace.close(force=True)


def check_peer_is_still_named(rank: Any) -> None:
    """Ranks in other calls are told so, not that their tensors differ."""
    workspace = rank.new_workspace(**SMALL, deadline=10.0)
    rank.barrier()
    text = ""
    try:
        call(rank, workspace.handle, "all_reduce" if rank.rank else "all_reduce_rms_norm", tensors(rank))
        rank.synchronize()
    except RuntimeError as error:
        text = str(error)
    assert "called all_reduce" in text, text
    rank.barrier()
    workspace.close()


def check_variable_differs(rank: Any) -> None:
    """The variable on one rank alone, and one that says neither yes nor no: every rank is told at once."""
    import os

    from mnnvl_ar import BringUpError, crosscheck

    for value, said in (("1", "MNNVL_AR_CHECK differs"), ("yes", "MNNVL_AR_CHECK: is 'yes', wanted 1 or 0")):
        with mock.patch.dict(os.environ, {crosscheck.SWITCH: value if rank.rank == 1 else "0"}):
            expect(lambda: rank.new_workspace(**SMALL), said, value, BringUpError)
    rank.new_workspace(**SMALL).close()


def check_compiled(rank: Any, backend: str) -> None:
    """What torch.compile makes of a call is compared as well."""
    import mnnvl_ar

    workspace, given = rank.new_workspace(**SMALL), tensors(rank)
    compiled = torch.compile(
        lambda: call(rank, workspace.handle, "all_reduce_rms_norm", given)[0] + 1, backend=backend, fullgraph=True
    )
    with torch.no_grad():
        compiled()
        if rank.rank == 0:
            given["weight"][3] += 1
        expect(compiled, "weight differs between ranks", backend, mnnvl_ar.RanksDiffer)
    rank.barrier()
    workspace.close()
