"""When two results are the same."""

from __future__ import annotations

import torch

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def same_bits(got: torch.Tensor, want: torch.Tensor) -> bool:
    """`torch.equal` with NaN equal to NaN, and -0.0 told from +0.0. Of one-byte types, such as fp8 codes, every bit
    counts, NaN included: which NaN is stored is part of the answer. Strides do not count.
    """
    got, want = got.cpu(), want.cpu()
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    integer = _INTEGER[got.element_size()]
    equal = got.contiguous().view(integer) == want.contiguous().view(integer)
    if got.is_floating_point() and got.element_size() > 1:
        equal |= got.isnan() & want.isnan()
    return bool(torch.all(equal))
