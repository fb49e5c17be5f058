"""The library says what is wrong when it cannot be loaded, or can do less than this machine."""

import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from mnnvl_ar import _library, binary

ROOT = Path(__file__).parent.parent.parent
WARNING = "this machine has a GPU, but .* was built without nvcc and runs on the host only"


def test_a_variable_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MNNVL_AR_LIBRARY": str(tmp_path / "none.so")}
    command = [sys.executable, "-c", "import mnnvl_ar"]
    got = subprocess.run(command, env=environment, capture_output=True, text=True)
    wanted = f"ImportError: mnnvl_ar: MNNVL_AR_LIBRARY={tmp_path}/none.so: there is no such file"
    assert got.stderr.splitlines()[-1].startswith(wanted)


@pytest.mark.parametrize(
    ("codes", "gpu", "warned"), [([], True, 1), ([], False, 0), (["sm_90"], True, 0), (["sm_90"], False, 0)]
)
def test_a_host_only_build_on_a_machine_with_a_gpu_says_so(
    codes: list[str], gpu: bool, warned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: gpu if path in _library.GPUS else exists(path))
    monkeypatch.setattr(binary, "architectures", lambda path: codes)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        runpy.run_path(str(_library.__file__))
    assert len(told) == warned
    for each in told:
        assert each.category is RuntimeWarning
        assert re.search(WARNING, str(each.message))
