"""What `bind` keeps, with stand-ins for an op and for what C++ notes: no GPU is needed to copy, drop or fail."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from types import FrameType
from typing import Any
from unittest import mock

import pytest
import torch

from common.interrupts import interrupted
from mnnvl_ar import bound


class OnGpu(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


@pytest.fixture
def told() -> Iterator[list[Any]]:
    """What C++ is told."""
    told: list[Any] = []
    begin, end = (lambda who: told.append("begin")), (lambda who: told.append("end") or 7)
    with mock.patch.object(bound, "ops") as ops, mock.patch.multiple(bound, _begin=begin, _end=end):
        ops._bind_forget = lambda number: told.append(number)
        yield told


def all_reduce_out(*_: Any, **__: Any) -> None:
    pass


@pytest.fixture
def x() -> torch.Tensor:
    return torch.ones(1).as_subclass(OnGpu)


def test_tensors_may_be_given_by_name(told: list[Any], x: torch.Tensor) -> None:
    assert bound.bind(all_reduce_out, x=x, out=x, workspace=1)._number == 7
    assert bound.bind(all_reduce_out, x=torch.ones(1), out=torch.ones(1), workspace=1)._number == 0


def test_a_copy_is_the_call(told: list[Any], x: torch.Tensor) -> None:
    call = bound.bind(all_reduce_out, x, x, 1)
    assert copy.copy(call) is copy.deepcopy([call])[0] is call
    assert 7 not in told, "it is not forgotten with a copy"
    with pytest.raises(TypeError, match="BoundCall cannot be pickled"):
        pickle.dumps(call)
    del call
    assert told == ["begin", "end", 7]


def test_the_memory_that_was_bound_stays(told: list[Any], x: torch.Tensor) -> None:
    """Though the tensor has another one by now: a kernel that writes there writes into nobody else's."""
    call, before = bound.bind(all_reduce_out, x, x, 1), x.untyped_storage().data_ptr()
    x.data = torch.zeros(4)
    assert x.untyped_storage().data_ptr() != before
    assert [memory.data_ptr() for memory in call._memory] == [before, before]
    assert all(memory.nbytes() for memory in call._memory)


def test_half_a_call_is_not_kept(told: list[Any], x: torch.Tensor) -> None:
    """Whose second piece is refused."""
    op = mock.Mock(__name__="all_reduce_out", side_effect=[None, RuntimeError("as ordered")])
    call = bound.bind(op, x, x, 1)
    with pytest.raises(RuntimeError, match="as ordered"):
        call._bind()  # as when other workspaces have come to share the device
    assert call._number == 0
    assert told == ["begin", "end", 7, "begin", "end", 7]


def is_binding(frame: FrameType) -> bool:
    return frame.f_code is bound.BoundCall._bind.__code__


def test_whatever_interrupts_it_the_thread_binds_no_longer(x: torch.Tensor) -> None:
    call = bound.bind(all_reduce_out, x, x, 1)
    at = 1
    while interrupted(call._bind, at, is_binding):
        bound.ops._bind_begin(1 << 40)  # an error if it still does
        bound.ops._bind_end(1 << 40)
        at += 1
    assert at > 5


def test_nobody_ends_what_another_binds() -> None:
    bound.ops._bind_begin(1 << 40)
    assert bound.ops._bind_end(1 << 41) == 0
    with pytest.raises(RuntimeError, match="is binding a call already"):
        bound.ops._bind_begin(1 << 41)
    bound.ops._bind_end(1 << 40)


def test_with_checks_a_call_is_not_bound(told: list[Any], x: torch.Tensor) -> None:
    with mock.patch.dict(bound.crosscheck._checked, {3: mock.Mock()}):
        assert bound.bind(all_reduce_out, x, x, 1)._number == 0
    assert told == []
