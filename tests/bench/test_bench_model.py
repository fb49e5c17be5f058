"""bench/model.py: the page is what the model says, and the model agrees with the bench's floor where they meet."""

import pytest

from bench import model
from bench.cells import Cell
from bench.floor import H200, floor_us


def test_the_page_is_the_models():
    assert model.PAGE.read_text() == model.page(), "python -m bench.model --write"
    assert "predictions of a cost model, not measurements" in model.page()


def test_over_unicast_it_is_the_floor():
    for tokens in (1, 64, 2048):
        cell = Cell("fused", 8, tokens, 7168, "bfloat16")
        both = [f(cell.nbytes, 8, H200, multicast=False) for f in (model.one_shot_us, model.two_shot_us)]
        assert min(both) == pytest.approx(floor_us(cell, H200))


def test_the_crossover_is_where_both_take_as_long():
    for ranks in model.TPS:
        nbytes = model.crossover_bytes(ranks)
        assert model.one_shot_us(int(nbytes), ranks) == pytest.approx(model.two_shot_us(int(nbytes), ranks), rel=1e-3)
