"""What one host has, as a dictionary of plain values. Reads only; what cannot be read is left out or says why."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mnnvl_ar import _library
from mnnvl_ar.doctor import nvml
from mnnvl_ar.memory import hosts, multicast_refusal

VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "MNNVL_AR_LIBRARY",
    "MNNVL_AR_DISABLE_MULTICAST",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST",
    "NCCL_NVLS_ENABLE",
    "NVSHMEM_DISABLE_NVLS",
    "NCCL_MNNVL_ENABLE",
    "NCCL_CUMEM_ENABLE",
)


def examine(local_rank: int = 0) -> dict[str, Any]:
    """This host, as this process sees it. `uses` is the index of the GPU that a rank of this `local_rank` would use,
    None if it can use none. A container may show each rank its own GPU only."""
    identity = hosts.identity()
    found: dict[str, Any] = {
        "host": hosts.name_of(identity),
        "identity": identity,
        "library": {"path": str(_library.PATH), "architectures": _library.ARCHITECTURES},
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()},
        "multicast_refusal": multicast_refusal(),
        "container": _container(),
        "imex": _imex(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "gpus": [],
        "p2p": [],
        "p2p_atomics": [],
        "driver": _driver_module(),
        "driver_error": "",
    }
    try:
        found.update(_gpus())
    except Exception as error:  # no driver, no bindings, or a driver too old: that is the finding
        found["driver_error"] = _plain(error)
    more = nvml.look([gpu["uuid"] for gpu in found["gpus"]])
    for gpu, about in zip(found["gpus"], more.pop("gpus"), strict=True):
        gpu.update(about)
    usable = len(found["gpus"]) if torch.version.cuda else 0
    return {**found, **more, "uses": local_rank % usable if usable else None}


def _plain(error: Exception) -> str:
    if type(error).__name__ == "DynamicLibNotFoundError":  # of cuda-bindings
        return "no NVIDIA driver: libcuda.so.1 is not found here"
    if isinstance(error, ImportError):
        return f"cuda-bindings cannot be imported: {error}"
    return f"{type(error).__name__}: {error}"


def _gpus() -> dict[str, Any]:
    from cuda.bindings import driver as cuda

    def call(name: str, *arguments: Any) -> Any:
        status, *results = getattr(cuda, name)(*arguments)
        if status != cuda.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{name}: {status.name}")
        return results[0] if results else None

    call("cuInit", 0)
    devices = [call("cuDeviceGet", index) for index in range(call("cuDeviceGetCount"))]
    names = cuda.CUdevice_attribute

    def attribute(device: Any, name: str) -> int:
        return int(call("cuDeviceGetAttribute", getattr(names, f"CU_DEVICE_ATTRIBUTE_{name}"), device))

    gpus = []
    for index, device in enumerate(devices):
        major, minor = (attribute(device, f"COMPUTE_CAPABILITY_{part}") for part in ("MAJOR", "MINOR"))
        gpus.append(
            {
                "index": index,
                "name": call("cuDeviceGetName", 128, device).split(b"\0")[0].decode(),
                "uuid": bytes(call("cuDeviceGetUuid", device).bytes).hex(),
                "capability": f"{major}.{minor}",
                "memory": int(call("cuDeviceTotalMem", device)),
                "multicast": bool(attribute(device, "MULTICAST_SUPPORTED")),
                "fabric_handles": bool(attribute(device, "HANDLE_TYPE_FABRIC_SUPPORTED")),
                "fd_handles": bool(attribute(device, "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED")),
            }
        )

    def between(name: str) -> list[list[bool]]:
        kind, count = getattr(cuda.CUdevice_P2PAttribute, f"CU_DEVICE_P2P_ATTRIBUTE_{name}_SUPPORTED"), len(devices)
        return [
            [a == b or bool(call("cuDeviceGetP2PAttribute", kind, devices[a], devices[b])) for b in range(count)]
            for a in range(count)
        ]

    found = {"gpus": gpus, "p2p": between("ACCESS"), "p2p_atomics": between("NATIVE_ATOMIC")}
    return {**found, "driver_api": int(call("cuDriverGetVersion"))}


def _try(look: Callable[[], Any], otherwise: Any = None) -> Any:
    try:
        return look()
    except Exception:
        return otherwise


def _driver_module() -> str:
    text = _try(lambda: Path("/proc/driver/nvidia/version").read_text(), "")
    words = text.split("\n")[0].split()
    return next((word for word in words if word.count(".") >= 1 and word[0].isdigit()), "")


def _imex() -> dict[str, Any]:
    channels = Path("/dev/nvidia-caps-imex-channels")
    return {"channels": sorted(_try(lambda: os.listdir(channels), [])), "config": Path("/etc/nvidia-imex").is_dir()}


def _container() -> dict[str, Any]:
    marks = [mark for mark in ("/.dockerenv", "/run/.containerenv") if Path(mark).exists()]
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        marks.append("kubernetes")
    shm = _try(lambda: shutil.disk_usage("/dev/shm").total, 0)
    return {"marks": marks, "shm_bytes": shm, "cpus": len(os.sched_getaffinity(0))}
