"""The CUDA driver by cuda.bindings: its answers, and the kernels of a captured graph."""

from __future__ import annotations

from typing import Any


def ask(answer: Any) -> Any:
    """The values that a call of cuda.bindings returned. Raises RuntimeError if its status is an error."""
    code, *values = answer
    if int(code) != 0:
        raise RuntimeError(f"CUDA: {code!r}")
    return values[0] if len(values) == 1 else values or None


def kernel_of(node: Any) -> str | None:
    """The mangled name of the kernel that a node of a graph is; None for a node of another kind."""
    from cuda.bindings import driver

    if ask(driver.cuGraphNodeGetType(node)) != driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL:
        return None
    about = ask(driver.cuGraphKernelNodeGetParams(node))
    name = ask(driver.cuFuncGetName(about.func) if int(about.func) else driver.cuKernelGetName(about.kern))
    return str(name.decode())
