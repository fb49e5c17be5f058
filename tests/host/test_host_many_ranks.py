"""What tests/gpu/test_many_ranks.py runs on a GPU, by threads of the host: calls, comparison, and its controls."""

import pytest

from common.cases.calls import inputs, wanted
from common.cases.many import HIDDENS, TOKENS, WORLDS, calls_of_many
from common.many_ranks import ManyRanks, fits_one_cta
from mnnvl_ar import MnnvlArError


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("dtype", list(HIDDENS))
def test_many_ranks(world: int, dtype: str) -> None:
    calls = calls_of_many(dtype)[::7]  # an odd step, so that both strategies are among them
    with ManyRanks(world, TOKENS, max(HIDDENS[dtype]), dtype, "cpu", deadline=60.0) as ranks:
        assert ranks.run(calls) == []


def test_every_call_is_of_one_cta_and_all_kinds_are_there() -> None:
    for dtype in HIDDENS:
        calls = calls_of_many(dtype)
        assert all(fits_one_cta(call.hidden, dtype) for call in calls)
        assert {call.hidden for call in calls} == set(HIDDENS[dtype])
        assert {(call.op, call.strategy) for call in calls} == {
            (op, strategy) for op in ("all_reduce", "all_reduce_rms_norm") for strategy in (0, 1)
        }
    assert not fits_one_cta(3592, "bf16")
    with pytest.raises(ValueError, match="wanted a row that one CTA holds"):
        ManyRanks(3, 1, 7168, "bf16", "cpu")


@pytest.mark.parametrize("world", WORLDS)
def test_the_order_of_addition_can_be_seen(world: int) -> None:
    """In a call of one row, too: with rank 0 added last the bits are others, and none of them is NaN."""
    from mnnvl_ar import reference

    call = next(call for call in calls_of_many("fp32") if call.hidden == 132 and call.tokens == 1)
    xs, residual, weight = inputs(call, world)
    norm, _ = wanted(call, world)
    other, _ = reference.all_reduce_rms_norm(xs[1:] + xs[:1], residual, weight, call.eps, call.weight_bias)
    assert norm.isfinite().all()
    assert not reference.same_bits(norm, other)


def test_a_wrong_bit_of_one_rank_is_found() -> None:
    call = next(call for call in calls_of_many("bf16") if call.hidden == 264)
    with ManyRanks(12, TOKENS, 264, "bf16", "cpu") as ranks:
        launch_of = ranks._launch_of

        def spoiled(prepared, in_line):  # type: ignore[no-untyped-def]
            launch = launch_of(prepared, in_line)

            def run() -> None:
                launch()
                row = prepared[11].norm_out[0]
                row[row.isfinite().nonzero()[0]] = float("inf")

            return run

        ranks._launch_of = spoiled  # type: ignore[method-assign]
        wrong = ranks.run([call])
    assert len(wrong) == 1
    assert "norm_out of rank 11 differs in 1," in wrong[0]


def test_a_rank_that_does_not_come_is_named() -> None:
    """As where a GPU has no room for its kernel: the others end by their deadline and say who is missing."""
    (call,) = calls_of_many("bf16")[:1]
    with ManyRanks(12, TOKENS, max(HIDDENS["bf16"]), "bf16", "cpu", deadline=2.0) as ranks:
        each = ranks.group.each
        ranks.group.each = lambda work: each(lambda rank: rank == 7 or work(rank))  # type: ignore[method-assign]
        with pytest.raises((MnnvlArError, RuntimeError), match="rank 7"):
            ranks.run([call])
