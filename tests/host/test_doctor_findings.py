"""What the doctor concludes from machines that are not here: several hosts, containers, NVML."""

import ctypes
import json
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from mnnvl_ar.doctor import machine, merge, nvml, outlook, show
from mnnvl_ar.doctor.problems import problems

UUIDS = [f"{n:032x}" for n in range(8)]
MACHINE = {**machine.examine(), "driver_error": "", "multicast_refusal": "", "environment": {}}


def gpu(n: int, **more: Any) -> dict[str, Any]:
    traits = {"multicast": True, "fabric_handles": True, "fd_handles": True, "nvlinks": 18, "fabric": None}
    return {"index": 0, "name": "G", "uuid": UUIDS[n], "capability": "9.0", "memory": 141 << 30, **traits, **more}


def here(*gpus: dict[str, Any], host: str = "a", uses: int | None = 0, **more: Any) -> dict[str, Any]:
    about = {"host": host, "identity": f"{host}/boot/1", "gpus": list(gpus), "uses": uses if gpus else None}
    about |= {"p2p": [[True] * len(gpus) for _ in gpus], "imex": {"channels": ["channel0"], "config": True}}
    about |= {"torch": {"version": "2", "cuda": "13.0", "python": "3.11"}}
    about |= {"library": {"path": "_C.so", "architectures": ["sm_90"]}}
    return {**MACHINE, **about, **more}


def report(machines: dict[int, dict[str, Any]], size: int = 0) -> dict[str, Any]:
    size = size or len(machines)
    found = {
        "hosts": merge.hosts(machines),
        "self_test": {"ran": False},
        "world_size": size,
        "missing": [],
        "servers": [],
    }
    found["outlook"] = outlook.of(merge.members(machines, size))
    found["problems"] = problems(found)
    json.dumps(found)
    return found


BOTH = (gpu(0), gpu(1))


@pytest.mark.parametrize(
    ("about", "transport", "why", "problem"),
    [
        (here(*BOTH), "multicast if", "fabric handles first, else file descriptors", ""),
        (here(*BOTH, multicast_refusal="NCCL_NVLS_ENABLE=0"), "unicast", "off on rank 0 by NCCL_NVLS_ENABLE=0", ""),
        (here(gpu(0), gpu(1, multicast=False)), "unicast", "the device of rank 1 (G) has no multicast", ""),
        (here(gpu(0), gpu(1, fabric_handles=False)), "multicast if", "; file descriptors", ""),
        (here(), "host", "no GPU can be used", ""),
        (here(*BOTH, p2p=[[True, False], [False, True]]), "multicast if", "", "cannot reach"),
        (here(*BOTH, library={"path": "", "architectures": []}), "multicast if", "", "no GPU code"),
        (here(gpu(0, capability="8.0"), gpu(1)), "multicast if", "", "GPU 0 is 8.0"),
        (here(*BOTH, torch={**MACHINE["torch"], "cuda": None}, uses=None), "host", "", "a build without CUDA"),
        (here(*BOTH, confidential_computing={"on": True, "multi_gpu": "none"}), "multicast if", "confidential", ""),
    ],
)
def test_one_process(about: dict[str, Any], transport: str, why: str, problem: str) -> None:
    found = report({0: about}, size=2)
    assert found["outlook"]["transport"].startswith(transport)
    assert why in found["outlook"]["why"]
    assert bool(found["problems"]) == bool(problem)
    assert problem in " ".join(found["problems"])


def test_more_ranks_than_gpus_have_no_multicast() -> None:
    """As bring-up has it, which is asked itself."""
    plan = report({0: here(*BOTH)}, size=3)["outlook"]
    assert plan["transport"] == "unicast"
    assert plan["why"].startswith("ranks 0 and 2 share a device, which multicast cannot")
    plan = report({0: here(gpu(0)), 1: here(gpu(0))})["outlook"]
    assert plan["why"].startswith("ranks 0 and 1 share a device, which multicast cannot")


def test_one_rank_has_no_multicast() -> None:
    assert report({0: here(gpu(0))})["outlook"]["transport"] == "unicast"


def test_a_switch_on_one_rank_only() -> None:
    found = report({0: here(gpu(0)), 1: here(gpu(1), multicast_refusal="NCCL_NVLS_ENABLE=0")})
    assert "switched off on rank 1 by" in found["outlook"]["why"]
    assert "multicast  switched off by NCCL_NVLS_ENABLE=0" in show.text(found)


def test_containers_with_a_gpu_each_are_one_host() -> None:
    machines = {
        rank: here(gpu(rank), environment={"NVIDIA_VISIBLE_DEVICES": str(rank), "NCCL_CUMEM_ENABLE": "1"})
        for rank in range(3)
    }
    found = report(machines)
    (host,) = found["hosts"]
    assert [(g["index"], g["uuid"], g["ranks"]) for g in host["gpus"]] == [(n, UUIDS[n], [n]) for n in range(3)]
    assert host["p2p"] == [[True, None, None], [None, True, None], [None, None, True]]
    text = show.text(found)
    assert "Host a (ranks 0, 1 and 2)" in text
    assert "GPU 2 (rank 2): G" in text
    assert "P2P        unknown" in text
    assert "NVIDIA_VISIBLE_DEVICES=0 on rank 0; 1 on rank 1; 2 on rank 2" in text
    assert "NCCL_CUMEM_ENABLE=1\n" in text


def test_ranks_that_see_all_gpus_are_one_host() -> None:
    found = report({rank: here(*BOTH, uses=rank) for rank in range(2)})
    (host,) = found["hosts"]
    assert [g["ranks"] for g in host["gpus"]] == [[0], [1]]
    assert host["p2p"] == [[True, True], [True, True]]
    assert found["outlook"]["transport"].startswith("multicast")
    assert "each GPU reaches every other" in show.text(found)


def test_one_name_is_not_one_host() -> None:
    found = report({0: here(gpu(0)), 1: here(gpu(1), identity="a/boot/2")})
    assert [host["ranks"] for host in found["hosts"]] == [[0], [1]]
    assert "fabric handles only" in found["outlook"]["why"]


def test_several_hosts_without_imex() -> None:
    without = {"channels": [], "config": False}
    found = report({0: here(gpu(0)), 1: here(gpu(1), host="b", imex=without)})
    (line,) = found["problems"]
    assert line.startswith("b: no IMEX channel")
    assert "/dev/nvidia-caps-imex-channels/channel0" in line
    assert report({0: here(*BOTH, imex=without)})["problems"] == []
    one_container = {0: here(gpu(0)), 1: here(gpu(1), imex=without), 2: here(gpu(2), host="b")}
    assert [line[:18] for line in report(one_container)["problems"]] == ["a: no IMEX channel"]


@pytest.mark.parametrize(
    ("second", "why"),
    [
        (here(host="b"), "rank 1 can use no GPU, others can"),
        (here(gpu(1, fabric_handles=False), host="b"), "which the GPU of rank 1 does not have"),
    ],
)
def test_hosts_that_cannot_form_a_group(second: dict[str, Any], why: str) -> None:
    found = report({0: here(gpu(0)), 1: second})
    assert found["outlook"]["transport"] == "none"
    assert why in " ".join(found["problems"])
    assert f"Outlook: no group of 2 ranks: {found['outlook']['why']}." in show.text(found)


def test_hosts_without_gpus_cannot_form_a_group() -> None:
    found = report({0: here(), 1: here(host="b")})
    assert "joins processes of one host only" in " ".join(found["problems"])


def test_nobody_was_heard_of() -> None:
    """Not even rank 0, which did not get so far as to look at its machine."""
    found = report({}, size=2)
    assert found["outlook"]["transport"] == "none"
    assert "no rank was heard of" in show.text(found)


def test_p2p_that_differs_is_a_matrix() -> None:
    rows = [[True, False, True], [False, True, True], [True, True, True]]
    text = show.text(report({0: here(gpu(0), gpu(1), gpu(2), p2p=rows)}))
    assert "P2P        x.x" in text
    assert "\n             .xx\n             xxx" in text


class Info(ctypes.Structure):
    _fields_ = (
        ("clusterUuid", ctypes.c_uint8 * 16),
        ("status", ctypes.c_uint),
        ("cliqueId", ctypes.c_uint),
        ("state", ctypes.c_uint),
    )


class Settings(ctypes.Structure):
    _fields_ = (("ccFeature", ctypes.c_uint), ("multiGpuMode", ctypes.c_uint))


def fake(settings: int | None, state: int | None) -> Any:
    """A pynvml of GPUs with four links up, a fabric in progress, and confidential computing as its two calls say, which
    fail if None."""
    module: Any = types.ModuleType("pynvml")
    module.byref, module.c_nvmlGpuFabricInfo_t = ctypes.pointer, Info
    module.c_nvmlSystemConfComputeSettings_v1_t = Settings
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetHandleByUUID = lambda name: {f"GPU-00000000-0000-0000-0000-{n:012x}": n for n in (0, 1)}[name]

    def link(_: int, n: int) -> int:
        if n >= 6:
            raise OSError("invalid argument")
        return int(n < 4)

    def fabric(_: int, info: Any) -> None:
        info.contents.state, info.contents.cliqueId = 2, 7

    def confidential(about: Any) -> int:
        if settings is None:
            return 13  # NVML_ERROR_FUNCTION_NOT_FOUND: this one call does not raise
        about.contents.ccFeature, about.contents.multiGpuMode = settings, 1
        return 0

    def older() -> Any:
        if state is None:
            raise OSError("not supported")
        return types.SimpleNamespace(ccFeature=state)

    module.nvmlDeviceGetNvLinkState, module.nvmlDeviceGetGpuFabricInfo = link, fabric
    module.nvmlSystemGetConfComputeSettings, module.nvmlSystemGetConfComputeState = confidential, older
    return module


def seen(module: Any) -> tuple[dict[str, Any], str]:
    """What NVML says of two GPUs, and how it is shown."""
    with mock.patch.dict(sys.modules, {"pynvml": module}):
        found = nvml.look(UUIDS[:2])
    gpus = [gpu(n, **about) for n, about in enumerate(found.pop("gpus"))]
    return {**found, "gpus": gpus}, show.text(report({0: here(*gpus, **found)}, size=2))


@pytest.mark.parametrize(
    ("settings", "state", "wanted", "shown"),
    [
        (1, None, {"on": True, "multi_gpu": "protected PCIe"}, "conf. computing: ON, multi-GPU mode: protected PCIe"),
        (0, None, {"on": False, "multi_gpu": "protected PCIe"}, "conf. computing: off\n"),
        (None, 1, {"on": True, "multi_gpu": None}, "conf. computing: ON\n"),
        (None, None, None, "conf. computing: unknown"),
    ],
)
def test_nvml(settings: int | None, state: int | None, wanted: Any, shown: str) -> None:
    found, text = seen(fake(settings, state))
    assert found["confidential_computing"] == wanted
    assert shown in text
    assert [g["nvlinks"] for g in found["gpus"]] == [4, 4]
    assert found["gpus"][1]["fabric"] == {"state": "in progress", "status": 0, "cluster": "00" * 16, "clique": 7}
    assert "4 NVLinks up, fabric in progress" in text


def test_an_older_nvidia_ml_py() -> None:
    module = fake(1, 1)
    for name in ("c_nvmlSystemConfComputeSettings_v1_t", "nvmlSystemGetConfComputeState", "c_nvmlGpuFabricInfo_t"):
        delattr(module, name)
    found, text = seen(module)
    assert found["confidential_computing"] is None
    assert [(g["nvlinks"], g["fabric"]) for g in found["gpus"]] == [(4, None)] * 2
    assert "4 NVLinks up\n" in text


def test_without_nvidia_ml_py() -> None:
    found, text = seen(None)
    assert found["gpus"][0]["nvlinks"] is None
    assert "unknown: nvidia-ml-py is not installed; pip install 'mnnvl_ar[doctor]'" in text
    assert '\ndoctor = ["nvidia-ml-py' in (Path(__file__).parents[2] / "pyproject.toml").read_text()


def test_nvml_that_does_not_start() -> None:
    module = fake(1, 1)
    module.nvmlInit = mock.Mock(side_effect=OSError("Driver/library version mismatch"))
    _, text = seen(module)
    assert "NVML does not start: Driver/library version mismatch" in text


def test_a_gpu_that_nvml_does_not_know() -> None:
    with mock.patch.dict(sys.modules, {"pynvml": fake(1, 1)}):
        found = nvml.look([UUIDS[0], UUIDS[5]])
    assert [g["nvlinks"] for g in found["gpus"]] == [4, None]
