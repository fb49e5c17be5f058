"""`python -m mnnvl_ar doctor`, on a machine with or without GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "mnnvl_ar", "doctor"]


def doctor(*options: str, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*COMMAND, *options], capture_output=True, text=True, timeout=120, cwd=ROOT, env={**os.environ, **env}
    )


def test_text() -> None:
    got = doctor("--seconds", "0.2")
    assert got.returncode == 0, got.stdout + got.stderr
    for words in (
        "PyTorch",
        "GPU code",
        "multicast",
        "Outlook: a group of 2 ranks",
        'strategy "auto" would be one_shot',
        "every bit right",
        "us for 16 KiB",
        "vLLM",
        "SGLang",
        "No problem found",
    ):
        assert words in got.stdout


def test_json() -> None:
    others = dict.fromkeys(
        ("MNNVL_AR_DISABLE_MULTICAST", "TORCH_SYMM_MEM_DISABLE_MULTICAST", "NVSHMEM_DISABLE_NVLS"), ""
    )
    got = doctor("--json", "--seconds", "0", "--group-size", "4", NCCL_NVLS_ENABLE="0", **others)
    found = json.loads(got.stdout)
    assert got.returncode == 0
    assert found["outlook"]["ranks"] == 4
    assert found["self_test"] == {"ran": False}
    assert found["hosts"][0]["multicast_refusal"] == "NCCL_NVLS_ENABLE=0"
