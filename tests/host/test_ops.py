"""What callers are told of the ops: text, signatures, types."""

import importlib.util
import inspect
import os
import pydoc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from common.ranks import ROOT
from mnnvl_ar import ops


@pytest.fixture(params=ops.NAMES)
def op(request: pytest.FixtureRequest) -> Any:
    return getattr(ops, request.param)


def test_help_is_of_the_op(op: Any) -> None:
    text = op.__doc__
    assert getattr(torch.ops.mnnvl_ar, op._opname).__doc__ == text
    assert text.splitlines()[0] in pydoc.render_doc(op)
    assert "like `x`" in text
    assert "rrors" in text


def test_help_says_shapes_and_dtypes() -> None:
    assert "[..., hidden]" in ops.all_reduce.__doc__
    assert "bf16, fp16 or fp32" in ops.all_reduce.__doc__
    assert "[hidden], in the dtype of `x` or fp32" in ops.all_reduce_rms_norm.__doc__
    assert "`RuntimeError`, naming argument, got and wanted" in ops.all_reduce.__doc__


def test_signature_is_the_schema_s(op: Any) -> None:
    """What Python says is what C++ takes: names, order, defaults, and which go by keyword only."""
    shown = [
        (p.name, None if p.default is p.empty else p.default, p.kind is p.KEYWORD_ONLY)
        for p in inspect.signature(op).parameters.values()
    ]
    assert shown == [(a.name, a.default_value, a.kwarg_only) for a in op._schema.arguments]


GOOD = """
norm, residual = ops.all_reduce_rms_norm(x, x, x, 1e-6, 1, weight_bias=1.0, strategy=ops.Strategy.ONE_SHOT)
ops.all_reduce_rms_norm_out(x, x, x, 1e-6, x, x, 1, pdl=ops.Pdl.LATE)
ops.all_reduce_out(x, ops.all_reduce(x, 1), 1)
"""
WRONG = {
    "ops.all_reduce(1, 2, 3, 4)": 'Too many positional arguments for "all_reduce"',
    "ops.all_reduce(x, 'handle')": 'Argument 2 to "all_reduce" has incompatible type "str"; expected "int"',
    "ops.all_reduce_rms_norm(x, x, x, 1e-6, 1, weight_bais=1.0)": 'Unexpected keyword argument "weight_bais"',
    "ops.all_reduce_rms_norm(x, x, x, 1e-6, 1).shape": '"tuple[Any, Any]" has no attribute "shape"',
    "ops.all_reduce_out(x, x, 1).shape": '"None" has no attribute "shape"',
}


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="needs mypy: pip install -e '.[dev]'")
def test_mypy_knows_the_ops(tmp_path: Path) -> None:
    # PyTorch is not followed, so tensors are Any: half a minute less.
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-torch.*]\nfollow_imports = skip\n")
    (tmp_path / "calls.py").write_text(
        "from typing import Any\nfrom mnnvl_ar import ops\nx: Any = None\n" + GOOD + "\n".join(WRONG)
    )
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", "calls.py"]
    env = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("calls.py") and ": error:" in line]
    for line, want in zip(found, WRONG.values(), strict=True):
        assert want in line, done.stdout
