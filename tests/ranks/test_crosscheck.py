"""`MNNVL_AR_CHECK=1`: what must be alike on all ranks is compared. Controls: the same without it, where nothing is
said, and with it where nothing differs."""

from typing import Any

import pytest
import torch

from common.cases import crosscheck
from common.ranks import rank_pool
from mnnvl_ar.crosscheck import SWITCH, checksum, odd_ranks

PLACES = [
    pytest.param("cpu", 2, id="host-2"),
    pytest.param("cpu", 3, id="host-3"),
    pytest.param("cuda", 2, id="real-2", marks=pytest.mark.gpu(2)),
]


def pool(device: str, size: int, value: str) -> Any:
    return rank_pool(size, device, env={SWITCH: value})


@pytest.mark.parametrize("value", ["1", "0"])
@pytest.mark.parametrize("argument", crosscheck.INPUTS)
@pytest.mark.parametrize(("device", "size"), PLACES)
def test_an_input_that_differs(device: str, size: int, argument: str, value: str) -> None:
    pool(device, size, value).run(crosscheck.check_input_differs, argument, size - 1, value == "1")


@pytest.mark.parametrize("value", ["1", "0"])
@pytest.mark.parametrize(("device", "size"), PLACES)
def test_an_output_that_differs(device: str, size: int, value: str) -> None:
    pool(device, size, value).run(crosscheck.check_output_differs, 0, value == "1")


@pytest.mark.parametrize(("device", "size"), [*PLACES, pytest.param("cuda", 1, id="real-1", marks=pytest.mark.gpu(1))])
def test_nothing_is_said_where_nothing_differs(device: str, size: int) -> None:
    pool(device, size, "1").run(crosscheck.check_alike)


@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_whatever_the_default_dtype_is(default: torch.dtype) -> None:
    pool("cpu", 2, "1").run(crosscheck.check_default_dtype, default)


@pytest.mark.parametrize("size", [pytest.param(n, marks=pytest.mark.gpu(n)) for n in (1, 2)])
def test_captured_calls_are_not_compared(size: int) -> None:
    pool("cuda", size, "1").run(crosscheck.check_captured)


@pytest.mark.parametrize(("device", "size"), PLACES)
def test_other_calls_are_named_as_such(device: str, size: int) -> None:
    pool(device, size, "1").run(crosscheck.check_peer_is_still_named)


def test_the_variable_must_be_the_same_on_all_ranks() -> None:
    rank_pool(3).run(crosscheck.check_variable_differs)


def test_checksums_see_each_bit_and_its_place() -> None:
    x = torch.arange(45, dtype=torch.int32).to(torch.uint8)
    seen = {int(checksum(x))}
    for byte in range(len(x)):
        for bit in range(8):
            other = x.clone()
            other[byte] ^= 1 << bit
            seen.add(int(checksum(other)))
    rows = torch.arange(64, dtype=torch.float32).reshape(8, 8)
    seen |= {int(checksum(rows)), int(checksum(rows.flip(0))), int(checksum(rows.T))}
    assert len(seen) == 1 + 8 * 45 + 3
    assert int(checksum(rows.T)) == int(checksum(rows.T.contiguous())), "values count, not strides"
    assert int(checksum(torch.tensor(-0.0))) != int(checksum(torch.tensor(0.0)))


def test_the_majority_decides() -> None:
    assert odd_ranks([5, 5, 5]) == []
    assert odd_ranks([5, 5, 6, 5]) == [2]
    assert odd_ranks([5, 6]) == [0, 1]
    assert odd_ranks([5, 6, 5, 6]) == [0, 1, 2, 3]
    assert odd_ranks([5, 6, 7]) == [0, 1, 2]


@pytest.mark.parametrize(("device", "size"), PLACES[::2])
def test_compiled_calls_are_compared(device: str, size: int) -> None:
    pool(device, size, "1").run(crosscheck.check_compiled, "aot_eager")
