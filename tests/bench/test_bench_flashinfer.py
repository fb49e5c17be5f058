"""FlashInfer's wrapper against a stand-in for FlashInfer that starts as early as PDL lets the real kernels start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import plots
from bench.buffers import Inputs, Outputs, make_inputs, make_outputs, reset
from bench.cells import Cell
from bench.check import Oracle, verdict
from bench.peers.flashinfer_trtllm import FlashInferTrtllm
from mnnvl_ar import reference

CPU = torch.device("cpu")
CALLS = 40


class Early:
    """A call's results reach memory only when the next call waits for it, after that has loaded its residual; of a call
    that triggers at its end, before. The sum over ranks is this rank's x."""

    AllReduceFusionPattern = SimpleNamespace(kAllReduce=0, kARResidualRMSNorm=1)

    def __init__(self) -> None:
        self.due: list[tuple[torch.Tensor, torch.Tensor]] = []

    def flush(self) -> None:
        for memory, value in self.due:
            memory.copy_(value)
        self.due = []

    def trtllm_allreduce_fusion(self, **the: Any) -> None:
        if the["pattern_code"] == self.AllReduceFusionPattern.kAllReduce:
            self.flush()
            self.due = [(the["allreduce_out"], the["allreduce_in"].clone())]
            return
        if not the["launch_with_pdl"]:
            self.flush()
        loaded = the["residual_in"].clone()
        self.flush()
        norm, z = reference.all_reduce_rms_norm([the["allreduce_in"]], loaded, the["rms_gamma"], the["rms_eps"])
        self.due = [(the["residual_out"], z), (the["norm_out"], norm)]
        if the["trigger_completion_at_end"] or not the["use_oneshot"]:
            self.flush()


def peer(comm: Early) -> FlashInferTrtllm:
    made = FlashInferTrtllm.__new__(FlashInferTrtllm)
    made.comm, made.team = comm, SimpleNamespace(size=4, rank=0)  # type: ignore[assignment]
    made.about = {"version": "0"}
    made._made = {False: (None, torch.empty(0))}
    return made


def cell(op: str = "fused", l2: str = "warm") -> Cell:
    return Cell(op, 4, 8, 256, "bfloat16", l2=l2)


def prepared(cell: Cell) -> tuple[Inputs, Outputs, Outputs]:
    inputs = make_inputs(cell, 0, CALLS, CPU)
    return inputs, make_outputs(cell, inputs), Oracle(CPU).expected(cell, inputs, inputs.xs, CALLS)


@pytest.mark.parametrize("cell", [cell(), cell(l2="cold"), cell("plain")], ids=str)
def test_every_variant_is_right_where_kernels_start_early(cell: Cell):
    comm = Early()
    variants = peer(comm).variants(cell)
    late = {"one_shot_late", "one_shot_fp32_late"} if cell.op == "fused" else set()
    names = {variant.name.removeprefix("flashinfer/") for variant in variants}
    assert names == {"one_shot", "one_shot_fp32", "two_shot"} | late
    assert {variant.name for variant in variants} <= plots.COLOURS.keys()
    for variant in variants:
        inputs, outputs, want = prepared(cell)
        starts = [residual.clone() for residual in inputs.residuals]
        call = variant.bind(cell, inputs, outputs)
        for _ in range(2):  # replays
            reset(inputs, outputs)
            for i in range(CALLS):
                call(i)
            comm.flush()
            assert verdict(cell, outputs, want, exact=False) is None, variant.name
        assert all(torch.equal(a, b) for a, b in zip(starts, inputs.residuals, strict=True))


def test_a_chain_that_reads_the_residual_of_two_calls_ago_is_wrong():
    comm, fused = Early(), cell()
    inputs, outputs, want = prepared(fused)
    fixed = peer(comm)._fixed(fused, inputs, one_shot=True, fp32_acc=False, early=True)
    for i in range(CALLS):
        z = outputs.residuals[0]
        comm.trtllm_allreduce_fusion(
            allreduce_in=inputs.xs[i % 2], residual_in=z, residual_out=z, norm_out=outputs.outs[0], **fixed
        )
    comm.flush()
    assert "off by 1.1" in str(verdict(fused, outputs, want, exact=False))
