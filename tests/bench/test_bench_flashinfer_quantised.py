"""FlashInfer's fused quantised kinds against a stand-in for FlashInfer: which arguments they are given, and what is
found right and wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flashinfer_comm import NEW, OLD, RELEASES, FlashInfer

from bench import codes, peers, worker
from bench.buffers import Inputs, Outputs, make_inputs, make_outputs, reset
from bench.cells import Cell
from bench.launch import free_port
from bench.peers import flashinfer_quantised
from bench.peers.flashinfer_quantised import PATTERNS, FlashInferQuantised
from bench.quantised import KINDS, SCALE
from bench.variant import Unavailable, Variant

CPU = torch.device("cpu")
CALLS = 12
TP = 4
FORMS = ("one_shot", "one_shot_late", "one_shot_fp32", "one_shot_fp32_late", "two_shot")


@pytest.fixture(autouse=True)
def fp4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_quantised, "has_fp4", lambda device: True)


def peer(comm: FlashInfer, release: str = "0.7.4") -> FlashInferQuantised:
    made = FlashInferQuantised.__new__(FlashInferQuantised)
    team = SimpleNamespace(size=TP, rank=0, device=CPU, all_tensors=lambda x: [x])
    made.comm, made.team, made.about = comm, team, {"version": release}  # type: ignore[assignment]
    made._made, made._oracle, made._expected = {False: (None, torch.empty(0))}, None, None
    return made


def cell(op: str, l2: str = "warm") -> Cell:
    """In tiles of scales the last columns are padding."""
    return Cell(op, TP, 9, 160 if op in ("mxfp8", "nvfp4") else 640, "bfloat16", l2=l2)


def variant_of(comm: FlashInfer, cell: Cell, name: str) -> Variant:
    return next(each for each in peer(comm).variants(cell) if each.name == name)


def judged(comm: FlashInfer, cell: Cell, variant: Variant) -> str | None:
    """As the worker does: two replays of the same calls, each from the start."""
    inputs = make_inputs(cell, 0, CALLS, CPU)
    outputs = make_outputs(cell, inputs)
    call = variant.bind(cell, inputs, outputs)
    for _ in range(2):
        reset(inputs, outputs)
        for i in range(CALLS):
            call(i)
        comm.flush()
    assert variant.judge is not None
    return variant.judge(inputs, outputs, CALLS)


def test_it_has_the_patterns_of_each_release() -> None:
    for release, kinds in RELEASES.items():
        for op in KINDS:
            variants = peer(FlashInfer(release), release).variants(cell(op))
            names = [variant.name for variant in variants]
            if op in kinds:
                assert names == [f"flashinfer/{form}{norm}" for form in FORMS for norm in ("", "/with_norm")]
            elif op in PATTERNS:
                with pytest.raises(Unavailable, match=f"FlashInfer {release} has no kARResidualRMSNorm"):
                    bound(variants[0], cell(op))
            else:
                assert names == []
    assert peer(FlashInfer()).variants(Cell("fused", TP, 9, 640, "bfloat16")) == []
    assert set(NEW) - set(OLD) == {"per_token_fp8", "mxfp8"}
    assert set(PATTERNS) == set(NEW) == set(codes.ALLOWED)


def bound(variant: Variant, cell: Cell) -> Callable[[int], None]:
    inputs = make_inputs(cell, 0, CALLS, CPU)
    return variant.bind(cell, inputs, make_outputs(cell, inputs))


def test_its_fp4_is_left_out_where_it_stores_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_quantised, "has_fp4", lambda device: False)
    (only,) = peer(FlashInfer()).variants(cell("nvfp4"))
    made, why = worker.attempt(lambda: bound(only, cell("nvfp4")))
    assert made is None
    assert why == "FlashInfer's NVFP4 stores zeros and no scales below sm_100"
    assert len(peer(FlashInfer()).variants(cell("mxfp8"))) == 10


def test_the_worker_asks_it_for_quantised_ops_and_no_other_flashinfer() -> None:
    assert "flashinfer_quantised" in peers.ON_GPU
    assert "flashinfer_quantised" in peers.ANY_OP
    assert "flashinfer" not in peers.ANY_OP


ARGUMENTS = {
    "static_fp8": {"scale_factor": SCALE, "layout_code": None},
    "per_token_fp8": {"scale_factor": None, "layout_code": None},
    "group_fp8_packed": {"scale_factor": None, "layout_code": None, "block_quant_group_size": 128},
    "mxfp8": {"scale_factor": None, "layout_code": 0},
    "nvfp4": {"scale_factor": SCALE, "layout_code": 0},
}


@pytest.mark.parametrize("op", ARGUMENTS)
def test_arguments(op: str) -> None:
    for with_norm, form, flags in (
        (False, "one_shot", (True, False, False)),
        (True, "one_shot_fp32_late", (True, True, True)),
        (True, "two_shot", (False, False, True)),
    ):
        comm = FlashInfer()
        inputs = make_inputs(cell(op), 0, CALLS, CPU)
        outputs = make_outputs(cell(op), inputs)
        name = f"flashinfer/{form}" + ("/with_norm" if with_norm else "")
        variant_of(comm, cell(op), name).bind(cell(op), inputs, outputs)(1)
        told = comm.calls[-1]
        assert told["pattern_code"] == NEW[op][1 + with_norm]
        assert (told["use_oneshot"], told["fp32_acc"], told["trigger_completion_at_end"]) == flags
        assert (told["world_size"], told["world_rank"], told["launch_with_pdl"]) == (TP, 0, True)
        assert told["quant_out"] is outputs.quants[0][0]
        assert told["scale_out"] is (outputs.quants[0][1] if len(outputs.quants[0]) > 1 else None)
        assert told["allreduce_in"] is inputs.xs[1]
        assert told["residual_out"] is outputs.residuals[0]
        assert (told["residual_in"] is outputs.residuals[0]) == (form != "one_shot")  # that early ones may not read
        factor = told["scale_factor"]
        told["scale_factor"] = None if factor is None else float(factor)
        assert told.items() >= {"block_quant_group_size": None, **ARGUMENTS[op]}.items()
        assert factor is None or (factor.dtype, factor.numel()) == (torch.float32, 1)


@pytest.mark.parametrize("l2", ["warm", "cold"])
@pytest.mark.parametrize("op", PATTERNS)
def test_every_variant_is_right_by_the_norm_of_its_own(op: str, l2: str) -> None:
    comm = FlashInfer()
    for variant in peer(comm).variants(cell(op, l2)):
        assert judged(comm, cell(op, l2), variant) is None, variant.name
        assert variant.extra == {"version": "0.7.4", "codes_off": 0.0, "scales_off": 0.0}
        stored = {call["norm_out"] is not None for call in comm.calls if call["pattern_code"] in NEW[op][1:]}
        assert variant.name.endswith("/with_norm") or stored == {False, True}  # by one call more
        comm.calls.clear()


def test_early_calls_that_pass_their_residual_on_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the stand-in loads a residual before the call ahead has stored it."""
    monkeypatch.setattr(FlashInferQuantised, "sources", lambda self, cell, inputs, outputs, form: outputs.residuals)
    comm = FlashInfer()
    assert "off by" in str(judged(comm, cell("mxfp8"), variant_of(comm, cell("mxfp8"), "flashinfer/one_shot")))
    late = variant_of(comm, cell("mxfp8"), "flashinfer/one_shot_late")
    assert judged(comm, cell("mxfp8"), late) is None


@pytest.mark.parametrize("op", PATTERNS)
def test_codes_of_another_norm_are_wrong(op: str) -> None:
    """Control: by our norm, which differs from the stand-in's in each seventh element, the same codes are wrong."""
    comm = FlashInfer()
    inputs = make_inputs(cell(op), 0, 1, CPU)
    outputs = make_outputs(cell(op), inputs)
    variant_of(comm, cell(op), "flashinfer/two_shot").bind(cell(op), inputs, outputs)(0)
    norms = peer(comm).norms(cell(op), inputs, outputs, flashinfer_quantised.forms(cell(op))[-1])
    assert codes.judge(op, norms, outputs.quants, CPU) == ({"codes_off": 0.0, "scales_off": 0.0}, None)
    ours = [norm.clone() for norm in norms]
    for norm in ours:
        norm.view(torch.int16)[..., ::7] ^= 1
    found, _ = codes.judge(op, ours, outputs.quants, CPU)
    assert found["codes_off"] > 0


def step(quant: tuple[torch.Tensor, ...], at: int, by: int) -> None:
    """Moves a code to a neighbour, or one further; not past 0 or the largest, and of FP4 the low half of a byte."""
    flat = quant[0].view(torch.uint8).view(-1)
    most = 7 if flat.numel() * 2 == 9 * 160 else 0x7E
    flat[at] += by if int(flat[at]) & most <= most - by and int(flat[at]) & 15 <= 15 - by else -by


def spoilt(op: str, spoil: Callable[[tuple[torch.Tensor, ...]], None], with_norm: bool = True) -> tuple[Variant, Any]:
    comm = FlashInfer(spoil=spoil)
    variant = variant_of(comm, cell(op), "flashinfer/one_shot" + ("/with_norm" if with_norm else ""))
    return variant, judged(comm, cell(op), variant)


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("op", PATTERNS)
def test_one_wrong_code(op: str, with_norm: bool) -> None:
    """A neighbour is wrong where the bits must be the same, and otherwise told; the one after it is always wrong."""
    variant, wrong = spoilt(op, lambda quant: step(quant, 5, 1), with_norm)
    assert variant.extra["codes_off"] == pytest.approx(1 / torch.Size(cell(op).shape).numel())
    assert variant.extra["scales_off"] == 0
    if op in ("group_fp8_packed", "mxfp8"):
        assert wrong is not None
        assert "codes are more than 0 off" in wrong
    else:
        assert wrong is None
    _, wrong = spoilt(op, lambda quant: step(quant, 5, 2), with_norm)
    assert f"1 of {torch.Size(cell(op).shape).numel()} codes are more than" in str(wrong)


@pytest.mark.parametrize("op", ["static_fp8", "per_token_fp8", "nvfp4"])
def test_too_many_neighbours_are_another_way_of_rounding(op: str) -> None:
    def some(quant: tuple[torch.Tensor, ...], every: int) -> None:
        for at in range(0, quant[0].numel(), every):
            step(quant, at, 1)

    _, wrong = spoilt(op, lambda quant: some(quant, 50))
    assert wrong is None
    _, wrong = spoilt(op, lambda quant: some(quant, 7))
    assert "codes are off, wanted" in str(wrong)


@pytest.mark.parametrize("op", [op for op in PATTERNS if op != "static_fp8"])
def test_a_wrong_scale(op: str) -> None:
    """Only an fp32 one may be off, and by two units in the last place."""

    def off(by: int) -> Callable[[tuple[torch.Tensor, ...]], None]:
        def spoil(quant: tuple[torch.Tensor, ...]) -> None:
            bits = torch.int32 if quant[1].dtype in (torch.float32, torch.int32) else torch.uint8
            scale = quant[1].view(bits)
            scale[(0,) * scale.dim()] += by << 8 if quant[1].dtype == torch.int32 else by

        return spoil

    allowed = 2 if op == "per_token_fp8" else 0
    variant, wrong = spoilt(op, off(allowed))
    assert wrong is None
    assert (variant.extra["scales_off"] > 0) == (allowed > 0)
    _, wrong = spoilt(op, off(allowed + 1))
    assert f"scales are more than {allowed} off" in str(wrong)


def test_a_nan_is_no_neighbour_of_the_largest() -> None:
    norm = torch.full((1, 640), 448 * SCALE, dtype=torch.bfloat16)
    quant = KINDS["static_fp8"].of_norm(norm)
    assert codes.judge("static_fp8", [norm], [quant], CPU)[1] is None
    quant[0].view(torch.uint8)[0, 3] += 1
    assert "1 of 640 codes are more than 1 off" in str(codes.judge("static_fp8", [norm], [quant], CPU)[1])


def test_zeros_and_no_scales_are_wrong() -> None:
    """What it leaves below sm_100, were it raced there."""
    inputs = make_inputs(cell("nvfp4"), 0, 1, CPU)
    outputs = make_outputs(cell("nvfp4"), inputs)
    reset(inputs, outputs)
    outputs.quants[0][0].zero_()
    assert codes.judge("nvfp4", inputs.residuals, outputs.quants, CPU)[1] is not None


@pytest.mark.parametrize("with_norm", [False, True])
def test_codes_of_a_wrong_sum_are_wrong(with_norm: bool) -> None:
    """Whatever norm it made, and stored: residual and norm must be near the right ones."""
    comm = FlashInfer()
    variant = variant_of(comm, cell("mxfp8"), "flashinfer/two_shot" + ("/with_norm" if with_norm else ""))
    inputs = make_inputs(cell("mxfp8"), 0, CALLS, CPU)
    outputs = make_outputs(cell("mxfp8"), inputs)
    call = variant.bind(cell("mxfp8"), without_a_rank(inputs), outputs)
    reset(inputs, outputs)
    for i in range(CALLS - 1):
        call(i)
    assert variant.judge is not None
    assert "off by" in str(variant.judge(inputs, outputs, CALLS - 1))


def without_a_rank(inputs: Inputs) -> Inputs:
    return Inputs([torch.zeros_like(x) for x in inputs.xs], inputs.residuals, inputs.weight)


def test_a_norm_that_nobody_stored_is_wrong() -> None:
    comm = FlashInfer()
    variant = variant_of(comm, cell("mxfp8"), "flashinfer/two_shot/with_norm")
    inputs = make_inputs(cell("mxfp8"), 0, CALLS, CPU)
    outputs = make_outputs(cell("mxfp8"), inputs)
    variant.bind(cell("mxfp8"), inputs, outputs)
    expected = peer(comm).oracle().expected(cell("mxfp8"), inputs, inputs.xs, CALLS)
    filled = Outputs(expected.residuals, [], expected.quants)
    assert variant.judge is not None
    assert variant.judge(inputs, filled, CALLS) == "out: not finite"


RANK = """
import sys
from types import SimpleNamespace
sys.path[:0] = sys.argv[1:3]
import torch
from flashinfer_comm import FlashInfer
from bench import options, peers
from bench.peers import flashinfer_quantised
from bench.worker import work

class Peer(flashinfer_quantised.FlashInferQuantised):
    def __init__(self, team, limits):
        self.comm, self.team, self.about = FlashInfer("0.6.13", early=False), team, {"version": "0.6.13"}
        self._made, self._oracle, self._expected = {False: (None, torch.empty(0))}, None, None

flashinfer_quantised.FlashInferQuantised = Peer
grid = "--device cpu --tp 1 --op fused,group_fp8,group_fp8_packed,mxfp8 --tokens 3 --hidden 384 --rounds 2"
sys.exit(work(options.parser().parse_args([*grid.split(), "--peers", "flashinfer_quantised", "--json", sys.argv[3]])))
"""


def test_rows_of_a_run_say_how_many_codes_are_off(root: Path, tmp_path: Path) -> None:
    """The worker with the stand-in, in a world of one, where its sum is the right one."""
    (tmp_path / "rank.py").write_text(RANK)
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    words = [sys.executable, str(tmp_path / "rank.py"), str(root), str(Path(__file__).parent), str(tmp_path / "r.json")]
    environment = {**os.environ, **place, "MASTER_PORT": str(free_port())}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    theirs = [row for row in rows if row["variant"].startswith("flashinfer")]
    assert len(theirs) == 10
    for row in theirs:
        assert (row["op"], row["ok"], row["version"]) == ("group_fp8_packed", True, "0.6.13"), row
        assert (row["codes_off"], row["scales_off"]) == (0, 0)
    assert "skipped flashinfer, mxfp8 TP1 T=3 H=384 bfloat16 eager: " in done.stdout
    assert "FlashInfer 0.6.13 has no kARResidualRMSNormMXFP8Quant" in (tmp_path / "r.skipped.txt").read_text()
