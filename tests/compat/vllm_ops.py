"""vLLM's ops as far as its graphs hold them: the names, schemas and meaning of its releases, registered once a process.

The all-reduce is no sum: what is in a graph under its name has to be replaced, or left alone, not run.
"""

from __future__ import annotations

import torch

_libraries = [torch.library.Library(name, "FRAGMENT") for name in ("vllm", "vllm_ir", "_C")]
_VLLM, _IR, _C = _libraries
_ADD_NORM = "(Tensor x, Tensor x_residual, Tensor? weight, float epsilon, int? variance_size=None) -> (Tensor, Tensor)"


def _all_reduce(tensor: torch.Tensor, group_name: str) -> torch.Tensor:
    return tensor.clone()


def _norm(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> torch.Tensor:
    rows = x.float()
    normed = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + epsilon)
    return (normed if weight is None else normed.to(weight.dtype) * weight).to(x.dtype)


def _add_norm(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    added = (x.float() + x_residual.float()).to(x.dtype)
    return _norm(added, weight, epsilon), added


def register() -> None:
    if hasattr(torch.ops.vllm, "all_reduce"):
        return
    _VLLM.define("all_reduce(Tensor tensor, str group_name) -> Tensor")
    _IR.define("rms_norm(Tensor x, Tensor? weight, float epsilon, int? variance_size=None) -> Tensor")
    _IR.define(f"fused_add_rms_norm{_ADD_NORM}")
    _C.define("fused_add_rms_norm(Tensor(a!) input, Tensor(b!) residual, Tensor weight, float epsilon) -> ()")
    for library, name, function in (
        (_VLLM, "all_reduce", _all_reduce),
        (_IR, "rms_norm", _norm),
        (_IR, "fused_add_rms_norm", _add_norm),
    ):
        library.impl(name, function, "CompositeExplicitAutograd")
        library._register_fake(name, function)
    _C._register_fake("fused_add_rms_norm", lambda *arguments: None)
