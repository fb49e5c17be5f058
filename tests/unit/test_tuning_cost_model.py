"""The cost model: its crossover is where its costs cross, and moves as it should."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnnvl_ar.tuning.cost_model import ANY_BYTES, one_shot_bytes, one_shot_us, two_shot_us
from mnnvl_ar.tuning.machines import Machine, shipped

H200 = shipped()["h200"]

sizes = st.integers(2, 72)
machines = st.sampled_from(list(shipped().values()))


@given(machines, sizes, st.integers(0, ANY_BYTES))
def test_the_crossover_is_where_the_costs_cross(machine: Machine, size: int, nbytes: int) -> None:
    quicker = one_shot_us(machine, size, nbytes) <= two_shot_us(machine, size, nbytes) + 1e-6
    assert quicker == (nbytes <= one_shot_bytes(machine, size) or abs(nbytes - one_shot_bytes(machine, size)) <= 1)


@given(machines, sizes, st.integers(0, 1 << 30), st.integers(1, 1 << 30))
def test_costs_rise_with_bytes_and_ranks(machine: Machine, size: int, nbytes: int, more: int) -> None:
    for cost in (one_shot_us, two_shot_us):
        assert cost(machine, size, nbytes) < cost(machine, size, nbytes + more)
        assert cost(machine, size, nbytes) <= cost(machine, size + 1, nbytes)


@given(machines, sizes, st.floats(1.01, 100.0))
def test_the_crossover_falls_with_ranks_and_rises_with_hop_and_bandwidth(
    machine: Machine, size: int, factor: float
) -> None:
    here = one_shot_bytes(machine, size)
    assert one_shot_bytes(machine, size + 1) <= here <= ANY_BYTES
    assert here <= one_shot_bytes(replace(machine, hop_us=factor * machine.hop_us), size)
    faster = replace(machine, crossover_bytes_per_us=factor * machine.crossover_bytes_per_us)
    assert here <= one_shot_bytes(faster, size)


@pytest.mark.parametrize(("size", "least", "most"), [(8, 115e3, 150e3), (16, 40e3, 50e3), (72, 1, 14336)])
def test_blackwell_crosses_where_its_stores_are_expected_to(size: int, least: float, most: float) -> None:
    """In bytes of a message. Of 72 ranks not even one row of 7168 goes by one-shot."""
    assert least <= one_shot_bytes(shipped()["gb200"], size) < most
    datasheet = replace(shipped()["gb200"], crossover_bytes_per_us=900e3)
    assert size == 72 or one_shot_bytes(datasheet, size) > most, "which is why the datasheet's rate is not taken"


@pytest.mark.parametrize(("size", "bytes"), [(1, ANY_BYTES), (2, ANY_BYTES), (72, 5_932)])
def test_the_ends(size: int, bytes: int) -> None:
    assert one_shot_bytes(H200, size) == bytes
