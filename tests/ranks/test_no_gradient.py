"""That the ops have no gradient, as their module says: nothing flows back, and PyTorch says so."""

from typing import Any

import pytest
import torch

from common.places import gpus, host


def check_no_gradient(rank: Any) -> None:
    x = torch.ones(2, 64, device=rank.device, requires_grad=True)
    y = torch.ops.mnnvl_ar.all_reduce(x * 1, rank.workspace().handle)
    with pytest.warns(UserWarning, match="an autograd kernel was not registered"):
        y.sum().backward()
    assert x.grad is None
    out = torch.zeros(2, 64, device=rank.device)
    before = out._version
    torch.ops.mnnvl_ar.all_reduce_out(torch.ones_like(out), out, rank.workspace().handle)
    assert bool(out.eq(1).all())
    assert out._version == before, "once it is counted up, the docstring of mnnvl_ar.ops says less than is true"


@pytest.mark.parametrize("ranks", [host(1), gpus(1)], indirect=True)
def test_ops_have_no_gradient(ranks: Any) -> None:
    ranks.run(check_no_gradient)
