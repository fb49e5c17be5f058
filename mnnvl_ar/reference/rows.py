"""The sum over ranks, the residual and the norm: steps 1 to 5 of docs/numerics.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch

VECTOR_BYTES = 16
GROUP = 32  # neighbouring vectors that are summed by a butterfly
SUMS = 4  # of groups: group i goes to sum i % SUMS


def all_reduce(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum over ranks: `inputs[r]` is rank r's [..., hidden] tensor of bf16, fp16 or fp32; so is the sum."""
    total = torch.zeros_like(inputs[0], dtype=torch.float32)
    for x in inputs:
        total = total + x.float()
    return total.to(inputs[0].dtype)


def all_reduce_rms_norm(
    inputs: Sequence[torch.Tensor],
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_bias: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(norm, residual_out)`, both like `residual`: residual_out = sum + residual, norm = RMSNorm(residual_out).

    weight: [hidden], in the rows' dtype or fp32; the factor is `weight_bias + weight`.
    """
    dtype = residual.dtype
    z = (all_reduce(inputs).float() + residual.float()).to(dtype)
    q = square_sum(z)
    hidden = torch.tensor(z.shape[-1], dtype=torch.float32)
    mean = q / hidden + torch.tensor(eps, dtype=torch.float32)
    # PyTorch's fp32 square root may come from MKL, which is not always correctly rounded. Of an fp32 value the fp64
    # root, rounded to fp32, is.
    root = torch.sqrt(mean.double()).float()
    rstd = torch.ones_like(root) / root
    factor = torch.tensor(weight_bias, dtype=torch.float32) + weight.float()
    norm = (z.float() * rstd.unsqueeze(-1)) * factor
    return norm.to(dtype), z


def square_sum(z: torch.Tensor) -> torch.Tensor:
    """Sum of squares over the last dimension in fp32, in the library's order (docs/numerics.md, step 3)."""
    per_vector = VECTOR_BYTES // z.element_size()
    x = z.float().unflatten(-1, (-1, per_vector))
    q = torch.zeros(x.shape[:-1])
    for i in range(per_vector):
        q = q + x[..., i] * x[..., i]
    q = torch.nn.functional.pad(q, (0, -q.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    step = GROUP // 2
    while step:
        q = q[..., :step] + q[..., step : 2 * step]
        step //= 2
    q = q.squeeze(-1)
    sums = torch.zeros(*q.shape[:-1], SUMS)
    for groups in torch.nn.functional.pad(q, (0, -q.shape[-1] % SUMS)).split(SUMS, dim=-1):
        sums = sums + groups
    return (sums[..., 0] + sums[..., 1]) + (sums[..., 2] + sums[..., 3])
