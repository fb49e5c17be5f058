"""bench/model.py: the page is what the model says, and the model agrees with the bench's floor where they meet."""

import pytest

from bench import model
from bench.cells import Cell
from bench.floor import H200, Figures, Reach, floor_us
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
    page = model.page()
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
