"""What the right answer is, bit for bit: docs/numerics.md in plain PyTorch on the CPU.

Every step is an elementwise fp32 operation that IEEE 754 defines, so these lines give the bits that every transport,
strategy, world size and grid must give. Slow, and meant to be read. Nothing here calls the library's C++.

    norm, residual_out = all_reduce_rms_norm(xs, residual, weight, eps)     rows
    codes = static_fp8(norm, scale)                                         fp8: of `norm` as stored
    codes, scales = per_token_fp8(norm) | per_token_group_fp8(norm, ...) | mxfp8(norm, ...) | nvfp4(norm, scale, ...)
"""

from mnnvl_ar.reference.bits import same_bits
from mnnvl_ar.reference.fp4 import nvfp4
from mnnvl_ar.reference.fp8 import mxfp8, per_token_fp8, per_token_group_fp8, static_fp8
from mnnvl_ar.reference.rows import all_reduce, all_reduce_rms_norm, square_sum

__all__ = [
    "all_reduce",
    "all_reduce_rms_norm",
    "mxfp8",
    "nvfp4",
    "per_token_fp8",
    "per_token_group_fp8",
    "same_bits",
    "square_sum",
    "static_fp8",
]
