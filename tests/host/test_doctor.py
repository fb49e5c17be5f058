"""`python -m mnnvl_ar doctor`, on a machine with or without GPUs."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mnnvl_ar.doctor import outlook

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
        "library",
        "multicast",
        "A group of",
        "strategy auto: one_shot",
        "all bits right",
        "us a call",
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


def test_under_torchrun() -> None:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    command = [*COMMAND, "--seconds", "0.2", "--json"]
    ranks = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **env, "RANK": str(r)}
        )
        for r in range(2)
    ]
    texts = [process.communicate(timeout=100)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    assert texts[1] == ""
    found = json.loads(texts[0])
    assert found["world_size"] == found["self_test"]["ranks"] == 2


GPU = {"index": 0, "name": "G", "capability": "9.0", "multicast": True, "fabric_handles": True}


def host(**more: object) -> dict[str, object]:
    library = {"architectures": ["sm_90"]}
    about = {"host": "h", "gpus": [GPU, GPU], "p2p": [[True, True], [True, True]], "library": library}
    return {**about, "torch": {"version": "2", "cuda": "13"}, "multicast_refusal": "", "driver_error": "", **more}


@pytest.mark.parametrize(
    ("more", "transport", "problem"),
    [
        ({}, "multicast if", ""),
        ({"multicast_refusal": "NCCL_NVLS_ENABLE=0"}, "unicast", ""),
        ({"gpus": [{**GPU, "multicast": False}] * 2}, "unicast", ""),
        ({"gpus": []}, "host", ""),
        ({"p2p": [[True, False], [False, True]]}, "multicast if", "cannot reach"),
        ({"library": {"architectures": []}}, "multicast if", "no CUDA code"),
        ({"gpus": [{**GPU, "capability": "8.0"}] * 2}, "multicast if", "GPU 0 is 8.0"),
    ],
)
def test_outlook(more: dict[str, object], transport: str, problem: str) -> None:
    hosts = [host(**more)]
    assert outlook.of(hosts, 2)["transport"].startswith(transport)
    lines = outlook.problems({"hosts": hosts, "self_test": {"ran": False}})
    assert bool(lines) == bool(problem)
    assert problem in " ".join(lines)
