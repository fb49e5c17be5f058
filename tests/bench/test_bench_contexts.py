"""bench/contexts.py, and what the clock takes off; yardsticks. On the host, with times made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import contexts, report, results
from bench.buffers import L2_BYTES, Inputs, make_inputs, make_outputs, reset
from bench.cells import Cell, grid
from bench.check import same_bits
from bench.contexts import Context, around
from bench.peers.yardsticks import Yardsticks
from bench.timing import Clock, interval, slowest

CPU = torch.device("cpu")
SIZE = (3, 64)


def cell(tp: int = 2, **other: Any) -> Cell:
    return Cell(other.pop("op", "fused"), tp, *SIZE, "bfloat16", **other)


def made(one: Cell, rank: int = 0, calls: int = 20) -> tuple[Inputs, Context]:
    inputs = make_inputs(one, rank, calls, CPU)
    return inputs, around(one, inputs, rank, CPU)


def test_a_step_is_the_call_and_what_stands_around_it() -> None:
    log: list[str] = []
    context = Context(
        (lambda i: log.append(f"first {i}"), lambda i: log.append("spin")), lambda i, _: log.append("last")
    )
    outputs: Any = None
    context.step(lambda i: log.append("call"), outputs)(7)
    assert log == ["first 7", "spin", "call", "last"]
    log.clear()
    context.step(None, outputs)(8)
    assert log == ["first 8", "spin", "last"]


def test_in_a_chain_nothing_stands_around_a_call() -> None:
    def call(i: int) -> None: ...

    _, context = made(cell())
    outputs: Any = None
    assert context.is_bare
    assert context.step(call, outputs) is call


@pytest.mark.parametrize("l2", ["warm", "cold"])
def test_gemms_make_the_inputs_and_read_what_the_call_wrote(l2: str) -> None:
    one = cell(context="gemm", l2=l2)
    inputs, context = made(one)
    outputs = make_outputs(one, inputs)
    before = [x.clone() for x in inputs.xs]
    first = context.step(None, outputs)
    for i in range(len(inputs.xs)):
        first(i)
    values = [x.clone() for x in inputs.xs]
    assert not any(torch.equal(x, old) for x, old in zip(values, before, strict=True))
    assert same_bits(values[1], -values[0])
    for i in range(len(inputs.xs), 3 * len(inputs.xs)):  # other weights, the same values
        first(i)
    assert all(same_bits(x, old) for x, old in zip(inputs.xs, values, strict=True))
    others, _ = made(one, rank=1)
    assert not torch.equal(others.xs[0], inputs.xs[0])


def test_the_second_gemm_reads_the_norm_or_the_residual_of_its_call() -> None:
    for op in ("fused", "static_fp8"):
        one = cell(context="gemm", op=op)
        inputs = make_inputs(one, 0, 4, CPU)
        gemms = contexts.Gemms(one, inputs, 0, CPU)
        outputs = make_outputs(one, inputs)
        read = (outputs.outs or outputs.residuals)[0]
        read.fill_(0)
        gemms.after(0, outputs)
        assert not gemms.sink.any()
        read.fill_(1)
        gemms.after(0, outputs)
        assert gemms.sink.any()


def test_weights_take_turns_until_l2_has_forgotten_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=60 << 20))
    pair = 2 * 4096 * 2048 * 2
    assert (contexts.copies(pair, torch.device("cuda")) - 1) * pair >= 2 * L2_BYTES
    assert contexts.copies(1 << 30, torch.device("cuda")) == 2
    gemms = contexts.Gemms(cell(context="gemm"), make_inputs(cell(), 0, 4, CPU), 0, CPU)
    assert len({weight.data_ptr() for pair in gemms.weights for weight in pair}) == 2 * len(gemms.weights)


def test_the_last_rank_spins_longest_and_every_rank_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[int] = []
    monkeypatch.setattr(contexts, "cycles_per_us", lambda _: 1000.0)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append, raising=False)
    outputs: Any = None
    for rank in range(5):
        _, context = made(cell(5, skew_us=2.0), rank)
        assert not context.is_bare
        context.step(None, outputs)(0)
    assert slept == [0, 500, 1000, 1500, 2000]


def test_a_skew_needs_ranks_and_a_graph() -> None:
    asked = (["fused"], ["bfloat16"], [64], [1], ["graph", "eager"], ["warm"], ["chain", "gemm"], [0.0, 2.0])
    cells = list(grid([1, 2], *asked))
    assert {(c.tp, c.mode) for c in cells if c.skew_us} == {(2, "graph")}
    assert len(cells) == 8 + 2
    assert str(cell(context="gemm", skew_us=0.5)) == "fused TP2 T=3 H=64 bfloat16 gemm 0.5 us apart"


def test_what_is_taken_off_is_of_the_same_round_and_of_the_slowest_rank() -> None:
    bases = [[10.0, 20.0, 30.0], [11.0, 19.0, 30.0]]
    found = slowest([[13.0, 22.0, 32.0], [14.0, 23.0, 33.0]], bases)
    assert (found.p50_us, found.p99_us, found.base_us) == (3.0, 3.0, 20.0)
    bare = slowest([[1.0, 2.0, 3.0], [3.0, 4.0, 0.5]], [[0.0] * 3])
    assert (bare.p50_us, bare.p99_us, bare.base_us) == (3.0, 4.0, 0.0)
    assert (bare.low_us, bare.high_us) == (0.5, 4.0), "of the rank whose p50 counts"


@pytest.mark.parametrize(
    ("count", "low", "high"), [(3, 1, 3), (6, 1, 6), (10, 2, 9), (20, 6, 15), (40, 14, 27), (100, 40, 61)]
)
def test_the_interval_around_the_median_is_that_of_the_sign_test(count: int, low: int, high: int) -> None:
    """As in printed tables of distribution-free limits of the median, 95 %."""
    assert interval([float(i) for i in range(count, 0, -1)]) == (low, high)


def test_the_clock_takes_the_base_off_and_gives_it_its_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock: Any = Clock.__new__(Clock)
    clock.team = SimpleNamespace(gather=lambda item: [item])
    orders: list[list[str]] = []

    def a_round(_: Cell, replays: list[Any]) -> list[float]:
        orders.append([replay.name for replay in replays])
        drift = len(orders)  # of the whole machine, round by round
        return [replay.us + drift for replay in replays]

    monkeypatch.setattr(clock, "_round", a_round)
    one, other, base = (
        SimpleNamespace(name=name, us=us) for name, us in (("one", 15.0), ("other", 12.0), ("base", 10.0))
    )
    found = clock.measure(cell(context="gemm"), [one, other], 6, base)
    assert [(t.p50_us, t.low_us, t.high_us) for t in found] == [(5.0, 5.0, 5.0), (2.0, 2.0, 2.0)]
    assert {order[0] for order in orders} == {"one", "other", "base"}
    assert clock.measure(cell(), [one], 6)[0].base_us == 0


@pytest.mark.parametrize("op", ["fused", "plain", "static_fp8"])
@pytest.mark.parametrize("l2", ["warm", "cold"])
def test_a_yardstick_that_did_not_do_its_work_is_wrong(op: str, l2: str) -> None:
    one, calls = cell(op=op, l2=l2), 5
    inputs = make_inputs(one, 0, calls, CPU)
    team: Any = SimpleNamespace(device=CPU)
    limits: Any = None
    variants = Yardsticks(team, limits).variants(one)
    assert [variant.name for variant in variants] == ["yardstick/trivial", "yardstick/copy"]
    for variant in variants:
        assert variant.judge is not None
        outputs = make_outputs(one, inputs)
        reset(inputs, outputs)
        call = variant.bind(one, inputs, outputs)
        assert variant.judge(inputs, outputs, calls) is not None
        for i in range(calls):
            call(i)
        assert variant.judge(inputs, outputs, calls) is None
        (outputs.outs or outputs.residuals)[-1].zero_()
        assert variant.judge(inputs, outputs, calls) is not None


def test_a_yardstick_is_no_peer_and_other_contexts_stay_out_of_tables() -> None:
    old = {"op": "fused", "tp": 2, "tokens": 3, "hidden": 64, "dtype": "bfloat16", "p50_us": 3.0, "ok": True}
    assert results.cell_key(old) == results.cell_key(cell())
    ours, trivial, peer = (
        {**cell().key(), "variant": name, "p50_us": us, "ok": True}
        for name, us in (("mnnvl_ar", 3.0), ("yardstick/trivial", 1.0), ("nccl", 6.0))
    )
    assert results.ours_and_best([ours, trivial, peer]) == (ours, peer)
    shown = [{**old, "variant": "mnnvl_ar"}, ours, peer]
    between = [{**row, "context": "gemm"} for row in shown] + [{**row, "skew_us": 2.0} for row in shown]
    assert report.usual([*shown, trivial, *between]) == shown
