"""bench/model.py: the page is what the model says, and the model agrees with the bench's floor where they meet."""

import pytest

from bench import expected, model, published
from bench.cells import Cell
from bench.floor import H200, Figures, Reach, floor_us
from mnnvl_ar.ops import Strategy
from mnnvl_ar.tuning import Table, table_of


def test_the_page_is_the_models():
    assert model.PAGE.read_text() == model.page(), "python -m bench.model --write"
    assert "predictions of a cost model, not measurements" in model.page()


def test_over_unicast_it_is_the_floor_of_a_link_as_its_datasheet_has_it():
    machine = H200.machine
    datasheet = Figures(machine, Reach(machine.launch_us + machine.write_us, 0.0, machine.bytes_per_us))
    for tokens in (1, 64, 2048):
        cell = Cell("fused", 8, tokens, 7168, "bfloat16")
        both = [f(cell.nbytes, 8, machine, multicast=False) for f in (model.one_shot_us, model.two_shot_us)]
        assert min(both) == pytest.approx(floor_us(cell, datasheet))


def test_the_strategies_are_those_that_the_library_takes():
    page = model.page().partition("## The floor")[2]
    for ranks in model.TPS:
        table = table_of("NVIDIA GB200", ranks)
        assert table == Table(model.crossover_bytes(ranks), source="cost model")
    for tokens in model.TOKENS:
        line = next(line for line in page.splitlines() if line.startswith(f"| {tokens} |"))
        labels = [entry[-2] for entry in line.strip("| ").split(" | ")[1:]]
        bounds = [table_of("NVIDIA GB200", ranks).one_shot_bytes for ranks in model.TPS]
        assert labels == ["1" if tokens * 7168 * 2 <= bound else "2" for bound in bounds]


def test_the_strategy_taken_is_slower_by_the_second_wait_at_most():
    for ranks in model.TPS:
        for tokens in range(1, 65):
            nbytes = tokens * 7168 * 2
            one, two = model.one_shot_us(nbytes, ranks), model.two_shot_us(nbytes, ranks)
            taken = one if nbytes <= model.crossover_bytes(ranks) else two
            assert taken <= min(one, two) + model.GB200.stage_us


def test_what_is_expected_is_never_below_the_floor():
    for ranks in expected.TPS:
        for tokens in expected.TOKENS:
            nbytes = tokens * expected.HIDDEN * 2
            assert expected.LOW.one_shot_us(tokens, ranks) > model.one_shot_us(nbytes, ranks)
            assert expected.LOW.two_shot_us(tokens, ranks) > model.two_shot_us(nbytes, ranks)


def test_ranges_hold_what_is_likely_and_say_something():
    for each in expected.INPUTS.values():
        slower = each.low < each.likely < each.high
        assert slower if each.unit == "us" else each.low > each.likely > each.high
    for what, likely, least, most, _ in expected.falsifiers():
        assert least < likely < most, what
        assert most - least < max(abs(least), abs(most)), f"{what}: anything would do"


def test_a_figure_of_another_machine_is_outside():
    """H200's, for one: the page could be refuted by it."""
    arrive = next(row for row in expected.falsifiers() if "T=128 less T=64" in row[0])
    assert not arrive[2] < 362 < arrive[3]
    assert expected.LOW.two_shot_us(1024, 8) < 43.5 < expected.HIGH.two_shot_us(1024, 8)
    assert not expected.LOW.two_shot_us(1024, 8) < 43.5 * 690 / 362 < expected.HIGH.two_shot_us(1024, 8)


def test_pieces_are_those_of_the_library():
    """Of a workspace of 64 MiB, from 64 rows on by two-shot and one-shot, own rows included."""
    from mnnvl_ar.handle import Layout

    assert Layout(expected.SLOT_BYTES // 16 * 16).nbytes <= 64 << 20 < Layout(expected.SLOT_BYTES + 64).nbytes
    row = expected.HIDDEN * 2
    for ranks in (8, 16, 72):
        for strategy, nbytes in ((Strategy.ONE_SHOT, ranks * row), (Strategy.TWO_SHOT, None)):
            width = -(-row // 16 // ranks)
            of_one = nbytes or (ranks * width * 16 + row)
            fits = expected.SLOT_BYTES // of_one
            want = Table(0 if strategy == Strategy.TWO_SHOT else 1 << 30).slot_bytes(ranks, fits, row, strategy)
            assert want <= expected.SLOT_BYTES < want // fits * (fits + 1)


def test_what_peers_have_published_stands_beside_the_quicker_strategy():
    page = model.PAGE.read_text()
    for each in published.PUBLISHED:
        low, likely, high = (each.predicted(case) for case in (expected.LOW, expected.LIKELY, expected.HIGH))
        assert low < likely < high
        assert f"| {each.us:g} | {likely:.1f} ({low:.1f}-{high:.1f}) | {each.source} |" in page
    two_nodes = next(each for each in published.PUBLISHED if each.tokens == 1024)
    assert two_nodes.predicted() == expected.LIKELY.two_shot_us(1024, 8) < expected.LIKELY.one_shot_us(1024, 8)
