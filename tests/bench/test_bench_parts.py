"""The bench's parts that need neither processes nor a GPU."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import launch, options, progress, results, table
from bench.buffers import Inputs, Outputs, make_inputs, make_outputs, reset, sets
from bench.cells import Cell, grid
from bench.check import Oracle, verdict
from bench.floor import H200, floor_us, machine_of
from bench.quantised import KINDS, memory_of
from bench.timing import calls_of, percentile, rounds_of
from mnnvl_ar.memory import MULTICAST_SWITCHES, multicast_refusal
from mnnvl_ar.tuning import machines


def cell(tp: int = 8, tokens: int = 1, **other: Any) -> Cell:
    return Cell("fused", tp, tokens, 7168, "bfloat16", **other)


def test_the_floor_is_one_hop_for_small_and_wire_time_for_large():
    machine = H200.machine
    fixed = 0.45 + machine.read_l2_us + machine.reduction_us
    assert floor_us(cell(), H200) == pytest.approx(fixed + machine.hop_us + 7 * 7168 * 2 / 365e3)
    large = cell(tokens=2048)
    assert floor_us(large, H200) == pytest.approx(fixed + 2 * machine.hop_us + 14 / 8 * large.nbytes / 365e3)
    assert floor_us(cell(l2="cold"), H200) > floor_us(cell(), H200)


def test_between_gemms_the_floor_has_the_gap_of_there_and_alone_it_has_no_wire():
    assert floor_us(cell(context="gemm"), H200) - floor_us(cell(), H200) == pytest.approx(1.3 - 0.45)
    alone = floor_us(cell(1, 64), H200)
    assert alone == floor_us(cell(1), H200) == pytest.approx(0.45 + H200.machine.read_l2_us + H200.machine.reduction_us)
    assert floor_us(cell(skew_us=2.0), H200) == floor_us(cell(), H200)


def test_the_floor_is_that_of_the_machine():
    large = cell(tokens=2048)
    assert machine_of("8 x NVIDIA H200") == H200
    gb200 = machine_of("4 x NVIDIA GB200")
    assert gb200 is not None
    saved = 14 / 8 * large.nbytes * (1 / 365e3 - 1 / 690e3)
    assert floor_us(large, gb200) == pytest.approx(floor_us(large, H200) - saved)
    for name, machine in machines.shipped().items():
        figures = machine_of(f"8 x NVIDIA {name.upper()}")
        assert figures is not None
        assert figures.machine == machine


@pytest.mark.parametrize("name", ["2 x x86_64 host", "8 x NVIDIA A100-SXM4-80GB", "4 x NVIDIA B200 + 4 x NVIDIA H200"])
def test_other_machines_have_no_floor(name: str):
    assert machine_of(name) is None


def test_calls_are_even_and_fewer_for_large_sizes():
    counts = [calls_of(c) for c in grid([2, 4, 8], ["fused"], ["bfloat16"], [2880, 8192], [1, 64, 2048])]
    assert all(count % 2 == 0 and 20 <= count <= 200 for count in counts)
    assert calls_of(cell()) == 200
    assert calls_of(cell(tokens=2048)) == 20
    assert calls_of(cell(), shared=True) == 6


def test_percentiles_are_samples():
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([float(i) for i in range(100)], 0.99) == 98.0
    assert percentile([5.0], 0.99) == 5.0


def test_p99_of_small_sizes_is_not_the_slowest_round_while_there_is_time():
    rounds = rounds_of(cell(tokens=64), quick=False, hurried=False)
    samples = [float(i) for i in range(rounds)]
    assert percentile(samples, 0.99) < max(samples)
    assert rounds_of(cell(tokens=128), quick=False, hurried=False) == 40
    assert rounds_of(cell(), quick=False, hurried=True) == 40
    assert rounds_of(cell(), quick=True, hurried=False) == 15


def test_cold_buffers_cover_the_cache_and_warm_ones_cancel():
    warm = make_inputs(Cell("fused", 2, 4, 64, "bfloat16"), 0, 20, torch.device("cpu"))
    assert len(warm.residuals) == 1
    assert torch.equal(warm.xs[0], -warm.xs[1])
    assert sets(cell(l2="cold"), 200) == 200
    large = cell(tokens=2048, l2="cold")
    assert 2 <= sets(large, 20) < 20
    assert sets(large, 20) * large.nbytes > 2 * 64 << 20
    cold = make_inputs(Cell("fused", 2, 4, 64, "bfloat16", l2="cold"), 0, 6, torch.device("cpu"))
    assert len(cold.xs) == len(cold.residuals) == 6
    assert not torch.equal(cold.xs[0], cold.xs[1])


def outputs(out: torch.Tensor) -> Outputs:
    return Outputs([out.clone()], [out.clone()])


def test_one_wrong_bit_is_wrong_for_us_and_fine_for_a_peer():
    want = torch.randn(4, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    near = want.clone()
    near.view(torch.int16)[0, 0] ^= 1
    assert verdict(cell(), outputs(want), outputs(want), exact=True) is None
    assert verdict(cell(), outputs(near), outputs(want), exact=False) is None
    assert "other bits" in str(verdict(cell(), outputs(near), outputs(want), exact=True))


def test_a_peer_that_leaves_out_a_rank_or_a_row_is_wrong():
    generator = torch.Generator().manual_seed(1)
    ranks = [torch.randn(8, 256, generator=generator) for _ in range(8)]
    want = outputs(torch.stack(ranks).sum(0).bfloat16())
    without = outputs(torch.stack(ranks[1:]).sum(0).bfloat16())
    assert verdict(cell(), without, want, exact=False) is not None
    row = outputs(want.outs[0])
    row.outs[0][3] = row.outs[0][2]
    assert verdict(cell(), row, want, exact=False) is not None
    row.outs[0][3] = float("nan")
    assert verdict(cell(), row, want, exact=False) == "out: not finite"


def test_reset_poisons_what_is_to_be_written():
    inputs = Inputs([], [torch.ones(2, 8)], torch.ones(8))
    made = make_outputs(cell(), inputs)
    made.residuals[0].zero_()
    reset(inputs, made)
    assert torch.equal(made.residuals[0], inputs.residuals[0])
    assert made.outs[0].isnan().all()


@pytest.mark.parametrize("op", KINDS)
def test_one_wrong_byte_of_a_quantised_output_is_wrong(op: str):
    """Of what pads a scale, too; and what nobody wrote is never right by what a call before left there."""
    one = Cell(op, 2, 3, 384, "bfloat16")
    inputs = make_inputs(one, 0, 1, torch.device("cpu"))
    want = Oracle(torch.device("cpu")).expected(one, inputs, inputs.xs[:1], 1)
    got = make_outputs(one, inputs)
    reset(inputs, got)
    assert verdict(one, got, want, exact=True) is not None
    for made, wanted in ((got.residuals, want.residuals), (got.quants[0], want.quants[0])):
        for g, w in zip(made, wanted, strict=True):
            memory_of(g).copy_(memory_of(w))
    assert verdict(one, got, want, exact=True) is None
    for i, each in enumerate(got.quants[0]):
        memory_of(each)[-1] ^= 1
        assert verdict(one, got, want, exact=True) == f"quantised output {i}: other bytes than the reference"
        memory_of(each)[-1] ^= 1


def test_only_cells_that_there_are():
    asked = {"tps": [2], "ops": ["fused", "group_fp8", "nvfp4"], "hidden": [2880, 4096], "tokens": [1]}
    cells = list(grid(**asked, dtypes=["bfloat16", "float32"]))
    assert [(c.op, c.hidden) for c in cells if c.dtype == "bfloat16"] == [
        *(("fused", hidden) for hidden in (2880, 4096)),
        ("group_fp8", 4096),
        *(("nvfp4", hidden) for hidden in (2880, 4096)),
    ]
    assert {c.op for c in cells if c.dtype == "float32"} == {"fused"}


def test_file_names_of_machines():
    assert results.machine_slug("8 x NVIDIA H200") == "h200x8"
    assert results.machine_slug("4 x NVIDIA GB200") == "gb200x4"


def test_rows_of_other_sources_are_not_resumed(tmp_path: Path):
    file = tmp_path / "r.json"
    before = results.Results("m", "digest", file)
    before.rows = [{**cell().key(), "variant": "mnnvl_ar"}]
    before.save()
    same, other = results.Results("m", "digest", file), results.Results("m", "changed", file)
    same.resume(file)
    other.resume(file)
    assert same.done() == {results.cell_key(cell())}
    assert other.done() == set()


def test_a_line_names_the_best_right_peer_and_whoever_is_wrong():
    base = {**cell().key(), "p99_us": 9.0, "floor_us": 2.0}
    rows = [
        {**base, "variant": "mnnvl_ar", "p50_us": 3.0, "ok": True},
        {**base, "variant": "nccl", "p50_us": 1.0, "ok": False},
        {**base, "variant": "vllm", "p50_us": 6.0, "ok": True},
    ]
    line = table.line("cell", rows)
    assert "vllm" in line
    assert "2.00x" in line
    assert line.endswith("NO: nccl")


def test_a_line_without_a_floor_has_dashes():
    row = {**cell().key(), "variant": "mnnvl_ar", "p50_us": 3.0, "p99_us": 9.0, "floor_us": None, "ok": True}
    assert table.line("cell", [row]).endswith("-        -  yes")


def test_multicast_stays_off(monkeypatch: pytest.MonkeyPatch):
    for name in MULTICAST_SWITCHES:
        monkeypatch.delenv(name, raising=False)
    assert not multicast_refusal()
    options.settle_multicast(allow=True)
    assert not multicast_refusal()
    options.settle_multicast(allow=False)
    assert all(os.environ[name] == value for name, value in MULTICAST_SWITCHES.items())
    with pytest.raises(SystemExit, match="forbidden"):
        options.settle_multicast(allow=True)


WORKER = """
import os, pathlib, sys, time
sys.path.insert(0, sys.argv[1])
from bench import progress
if "--without" in sys.argv:
    assert any(word.startswith("bad=") for word in sys.argv) and "--resume" in sys.argv
    sys.exit(0)
if os.environ["RANK"] == "1":
    file = pathlib.Path(sys.argv[sys.argv.index("--scratch") + 1]).with_name("progress")
    while progress.read(file)[0].peer != "bad":  # a busy machine starts one rank long after the other
        time.sleep(0.02)
    progress.report("by rank 1, which nobody asked")
else:
    progress.report("setting up bad", "bad", float(sys.argv[2]))
if os.environ["RANK"] == "1" and sys.argv[3] == "crash":
    sys.exit(7)
time.sleep(60)
"""


@pytest.mark.parametrize(("limit", "how"), [("60", "crash"), ("1", "hang")])
def test_a_peer_that_crashes_or_hangs_is_left_out(
    tmp_path: Path, root: Path, limit: str, how: str, capsys: pytest.CaptureFixture[str]
):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [str(script), str(root), limit, how]
    assert launch.run(command, 2, deadline=time.monotonic() + 200) == 0
    assert "going on without bad" in capsys.readouterr().out


def test_a_crash_of_our_own_ends_the_run(tmp_path: Path):
    script = tmp_path / "worker.py"
    script.write_text("import sys; sys.exit(5)")
    assert launch.run([str(script)], 2, deadline=time.monotonic() + 200) == 1
    assert progress.read(tmp_path / "none")[0].peer is None


def test_what_is_left_goes_by_what_was_done() -> None:
    assert progress.so_far(7, 20, 35.0) == "7 of 20, 35 s, some 65 s left"
    assert progress.so_far(20, 20, 35.0) == "20 of 20, 35 s, some 0 s left"
