"""The twin: the one-shot kernel of `all_reduce_rms_norm` once more, in CuTe DSL (docs/twin.md).

    from mnnvl_ar import dsl
    norm, residual_out = dsl.all_reduce_rms_norm(x, residual, weight, eps, workspace.handle)

It gives the library's bits, on the library's workspaces, beside the library's calls: call by call, and rank by rank.
Nothing of `mnnvl_ar` imports this, and nothing here imports the DSL until a kernel has to be compiled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnnvl_ar.dsl.launch import all_reduce_rms_norm, load

__all__ = ["all_reduce_rms_norm", "load"]


def __getattr__(name: str) -> Any:
    """`build` runs where there is no PyTorch."""
    if name not in __all__:
        raise AttributeError(f"mnnvl_ar.dsl has no {name}")
    from mnnvl_ar.dsl import launch

    return getattr(launch, name)
