"""Loads the compiled library and says clearly what is wrong when it cannot.

`MNNVL_AR_LIBRARY` names another build of it, for tests: a test build with guards that can be switched off, or one
under a sanitizer.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from mnnvl_ar.binary import architectures

GPUS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/nvgpu")  # as in setup.py
_named = os.environ.get("MNNVL_AR_LIBRARY")
PATH = Path(_named or Path(__file__).with_name("_C.so"))

if not PATH.exists():
    advice = "run `make build`, or `pip install -e . --no-build-isolation`"
    raise ImportError(
        f"mnnvl_ar: MNNVL_AR_LIBRARY={_named}: there is no such file; unset it for the library that is installed"
        if _named
        else f"mnnvl_ar: {PATH} has not been built: {advice}"
    )
try:
    torch.ops.load_library(str(PATH))
except OSError as error:
    raise ImportError(
        f"mnnvl_ar: {PATH} does not load under torch {torch.__version__} (CUDA {torch.version.cuda}): {error}"
    ) from error

ARCHITECTURES = architectures(PATH)
if not ARCHITECTURES and any(map(os.path.exists, GPUS)):
    warnings.warn(
        f"mnnvl_ar: this machine has a GPU, but {PATH} was built without nvcc and runs on the host only: install a "
        "wheel whose version does not end in +host, or build with MNNVL_AR_CUDA=1 (docs/install.md)",
        RuntimeWarning,
        stacklevel=2,
    )

ops = torch.ops.mnnvl_ar


def named(op: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
    """Calls an op whose schema names its results; these by name."""
    names = [result.name for result in op.default._schema.returns]
    return dict(zip(names, op(*arguments, **options), strict=True))
