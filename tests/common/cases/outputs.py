"""The contract of an epilogue (csrc/epilogues/epilogue.h), held by one that only test builds have: outputs that are not
like x, one of them from a second reduction over the row (csrc/epilogues/row_peak.h).

Every function is run by all ranks, of a test build.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from common.cases.calls import Call, Prepared, inputs, wanted
from common.cases.rules import DEADLINES, launch_that_breaks

SHAPES = ((1, 64), (3, 264), (7, 2880), (40, 4096), (300, 264), (2, 8192))
SCALE = 0.75  # exact in fp32, and so is no product with it by chance
GUARD = 64  # bytes around an output that nobody may write
UNWRITTEN = 0xA5


def _same(got: torch.Tensor, want: torch.Tensor, same_bits: Any) -> bool:
    return torch.equal(got, want) if got.dtype == torch.uint8 else bool(same_bits(got, want))


class Output:
    """A tensor between guards. strides: of a tensor that does not lie row by row; it may leave places out."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: Any, strides: tuple[int, ...] | None = None
    ) -> None:
        elements = torch.Size(shape).numel()
        if strides is not None and elements:
            elements = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        nbytes = elements * dtype.itemsize
        self.memory = torch.full((nbytes + 2 * GUARD,), UNWRITTEN, dtype=torch.uint8, device=device)
        self.flat = self.memory[GUARD : GUARD + nbytes].view(dtype)
        self.tensor = self.flat.view(shape) if strides is None else self.flat.as_strided(shape, strides)

    def is_overrun(self) -> bool:
        guards = torch.cat([self.memory[:GUARD], self.memory[-GUARD:]])
        return bool(guards.ne(UNWRITTEN).any())


class RowPeak:
    """A call of `_row_peak_out`, and what it should leave."""

    def __init__(self, rank: Any, call: Call) -> None:
        self.rank, self.call = rank, call
        self.prepared = Prepared(rank, dataclasses.replace(call, out="E"))
        self.high = Output(call.shape, torch.uint8, rank.device)
        self.peak = Output((call.tokens,), torch.float32, rank.device)
        self.scale = torch.full((1,), SCALE, device=rank.device)

    def launch(self, handle: int) -> None:
        p, c = self.prepared, self.call
        torch.ops.mnnvl_ar._row_peak_out(
            p.x, p.residual, p.weight, c.eps, self.scale, self.high.tensor, self.peak.tensor, p.residual_out, handle,
            strategy=c.strategy, pdl=c.pdl,
        )  # fmt: skip

    def launch_fresh(self, handle: int) -> None:
        """The functional form. The inputs are as they were."""
        p, c = self.prepared, self.call
        self.fresh = torch.ops.mnnvl_ar._row_peak(
            p.x, p.residual, p.weight, c.eps, self.scale, handle, strategy=c.strategy, pdl=c.pdl
        )

    def wrong_when_fresh(self) -> list[str]:
        """What the functional form said otherwise than the `_out` form did."""
        from mnnvl_ar.reference import same_bits

        c = self.call
        kept = {"high": self.high.tensor, "peak": self.peak.tensor, "residual_out": self.prepared.residual_out}
        pairs = zip(self.fresh, kept.items(), strict=True)
        return [f"{c}: fresh {name} differs" for got, (name, want) in pairs if not (_same(got, want, same_bits))]

    def wrong(self) -> list[str]:
        from mnnvl_ar.reference import same_bits

        norm, residual_out = wanted(self.call, self.rank.world_size)
        bits = norm.float().view(torch.int32)
        high, want_high = self.high.tensor.cpu(), ((bits >> 24) & 0xFF).to(torch.uint8)
        peak, want_peak = self.peak.tensor.cpu(), (bits & 0x7FFFFFFF).amax(-1).view(torch.float32) * SCALE
        nan = norm.isnan()
        right = {
            # The sign of a NaN is not defined, so neither is the top bit of its byte.
            "high": torch.equal(torch.where(nan, high & 0x7F, high), torch.where(nan, want_high & 0x7F, want_high)),
            "peak": torch.equal(peak.isnan(), nan.any(-1)) and same_bits(peak, want_peak),
            "residual_out": same_bits(self.prepared.residual_out, residual_out),
        }
        found = [f"{self.call}: {name} of rank {self.rank.rank} differs" for name, ok in right.items() if not ok]
        over = {"high": self.high.is_overrun(), "peak": self.peak.is_overrun()}
        return found + [f"{self.call}: {name} of rank {self.rank.rank} is overrun" for name, bad in over.items() if bad]

    def is_poisoned(self) -> bool:
        """Every output is NaN, and nothing else is written."""
        high, peak = self.high.tensor, self.peak.tensor
        nan = bool((high & 0x7F).eq(0x7F).all() and peak.isnan().all() and self.prepared.residual_out.isnan().all())
        return nan and not self.high.is_overrun() and not self.peak.is_overrun()


# Comparing may load kernels, which waits for the device. So nothing is compared while a virtual rank waits for a call.


def check_out_form(rank: Any, handle: int, calls: Sequence[Any]) -> None:
    """Makes the calls back to back, in their `_out` form, then checks every output of each."""
    rank.barrier()
    for call in calls:
        call.launch(handle)
    rank.synchronize()
    wrong = [line for call in calls for line in call.wrong()]
    assert not wrong, "\n".join(wrong[:8])
    rank.barrier()


def check_functional_form(rank: Any, handle: int, calls: Sequence[Any]) -> None:
    """The same in the functional form, behind `check_out_form`, whose outputs are what these are compared with."""
    for call in calls:
        call.launch_fresh(handle)
    rank.barrier()
    wrong = [line for call in calls for line in call.wrong_when_fresh()]
    assert not wrong, "\n".join(wrong)
    rank.barrier()


def check_outputs(rank: Any) -> None:
    """Right bits of every output, in both strategies, for rows of every dtype and many sizes."""
    workspace = rank.new_workspace(max_tokens=300, hidden=4096, deadline=DEADLINES[rank.device.type])
    calls = [
        RowPeak(rank, Call("all_reduce_rms_norm", tokens, hidden, dtype, strategy=strategy, seed=seed))
        for seed, (tokens, hidden) in enumerate(SHAPES)
        for dtype in ("bf16", "fp16", "fp32")
        for strategy in (0, 1)
        if workspace_takes(tokens, hidden, dtype)
    ]
    check_out_form(rank, workspace.handle, calls)
    check_functional_form(rank, workspace.handle, calls[:4])
    workspace.close()


def check_refusals(rank: Any) -> None:
    """What is wrong with a tensor that is not like x is refused, naming it, before anything is launched."""
    workspace = rank.new_workspace(max_tokens=8, hidden=264, deadline=DEADLINES[rank.device.type])
    call = Call("all_reduce_rms_norm", 4, 264, "bf16", strategy=0)
    on = {"device": rank.device}
    flat = torch.zeros(4 * 264 + 64, dtype=torch.uint8, **on)
    bad = {
        "high: is int8, wanted uint8": {"high": torch.zeros(4, 264, dtype=torch.int8, **on)},
        r"high: has shape \[264, 4\], wanted \[4, 264\]": {"high": torch.zeros(264, 4, dtype=torch.uint8, **on)},
        "high: is not contiguous": {"high": torch.zeros(264, 4, dtype=torch.uint8, **on).t()},
        "high: starts 1 bytes past a 16-byte": {"high": flat[1 : 1 + 4 * 264].view(4, 264)},
        "high: overlaps peak": {"high": flat[: 4 * 264].view(4, 264), "peak": flat[16:32].view(torch.float32)},
        r"peak: has shape \[5\], wanted \[4\]": {"peak": torch.zeros(5, **on)},
        "scale: is float64, wanted float32": {"scale": torch.ones(1, dtype=torch.float64, **on)},
        r"scale: has shape \[2\], wanted \[1\]": {"scale": torch.ones(2, **on)},
    }
    for says, changes in bad.items():
        made = RowPeak(rank, call)
        for name, tensor in changes.items():
            if name == "scale":
                made.scale = tensor
            else:
                getattr(made, name).tensor = tensor
        with pytest.raises(RuntimeError, match=says):
            made.launch(workspace.handle)
    rank.barrier()
    good = RowPeak(rank, call)  # nothing has been broken
    good.launch(workspace.handle)
    rank.synchronize()
    assert not good.wrong()
    rank.barrier()
    workspace.close()


def workspace_takes(tokens: int, hidden: int, dtype: str) -> bool:
    return hidden * (4 if dtype == "fp32" else 2) <= 32768 and tokens * hidden <= 300 * 4096


def check_poison(rank: Any) -> None:
    """A call whose peers never come leaves NaN in every output, whatever its size and type."""
    for strategy in (0, 1):
        workspace = rank.new_workspace(max_tokens=8, hidden=264, deadline=0.5)
        rank.barrier()
        if rank.rank == 0:
            call = RowPeak(rank, Call("all_reduce_rms_norm", 5, 264, "bf16", strategy=strategy))
            launch_that_breaks(rank, call, workspace.handle)
            assert call.is_poisoned(), (strategy, call.high.tensor, call.peak.tensor, call.prepared.residual_out)
            with pytest.raises(RuntimeError, match="in row_peak"):
                workspace.check()
        rank.barrier()
        workspace.close()


# Of several peers, any may be the one that is held against rank 0.
OTHER_OP = (
    r"^rank 0 (\(this one\) )?called row_peak\(.* where rank [1-9].* called all_reduce_rms_norm\("
    r"|^rank [1-9] (\(this one\) )?called all_reduce_rms_norm\(.* where rank 0.* called row_peak\("
)


def check_other_op(rank: Any) -> None:
    """Rank 0 calls an op of another epilogue than its peers: the two ops are named, and the ranks that called them."""
    workspace = rank.new_workspace(max_tokens=8, hidden=264, deadline=DEADLINES[rank.device.type])
    call = Call("all_reduce_rms_norm", 5, 264, "bf16", strategy=0)
    made = RowPeak(rank, call) if rank.rank == 0 else Prepared(rank, call)
    rank.barrier()
    try:
        made.launch(workspace.handle)
        rank.synchronize()
    except RuntimeError:
        assert rank.device.type == "cpu"
    rank.barrier()
    with pytest.raises(RuntimeError, match=OTHER_OP):
        workspace.check()
    rank.barrier()
    workspace.close()


CHECKS = {"outputs": check_outputs, "refusals": check_refusals, "poison": check_poison, "other_op": check_other_op}
# What the inputs hold decides whether the checks can fail: NaN, infinities and plain numbers are all among them.


def check_inputs_are_hostile(world_size: int = 2) -> None:
    rows = [
        wanted(Call("all_reduce_rms_norm", tokens, hidden, "bf16", seed=seed), world_size)[0]
        for seed, (tokens, hidden) in enumerate(SHAPES)
    ]
    assert any(row.isnan().any() for row in rows)
    assert any(bool(line.isfinite().all()) for row in rows for line in row)
    assert inputs(Call(), world_size)
