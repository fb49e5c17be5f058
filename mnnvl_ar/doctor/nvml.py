"""What NVML alone knows: NVLinks, fabric and confidential computing. Needs nvidia-ml-py, which is optional."""

from __future__ import annotations

import functools
import importlib
import uuid
from collections.abc import Callable, Sequence
from typing import Any

_FABRIC = ("not supported", "not started", "in progress", "completed")  # by NVML_GPU_FABRIC_STATE_*
_MODES = {0: "none", 1: "protected PCIe", 2: "NVLink encryption"}  # by NVML_CC_SYSTEM_MULTIGPU_*
_LINKS = 18  # of a GPU, at most, where an older nvidia-ml-py does not say


def look(uuids: Sequence[str]) -> dict[str, Any]:
    """{nvml_error, confidential_computing, gpus}. `gpus`, in the order of `uuids` (hex digits only): {nvlinks, fabric}.

    What NVML does not say is None; `nvml_error` is "" unless NVML as a whole is out of reach."""
    nothing = [{"nvlinks": None, "fabric": None} for _ in uuids]
    if not uuids:
        return {"nvml_error": "", "confidential_computing": None, "gpus": nothing}
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        why = "nvidia-ml-py is not installed; pip install 'mnnvl_ar[doctor]'"
        return {"nvml_error": why, "confidential_computing": None, "gpus": nothing}
    try:
        nvml.nvmlInit()
    except Exception as error:
        return {"nvml_error": f"NVML does not start: {error}", "confidential_computing": None, "gpus": nothing}
    gpus = [_try(functools.partial(_gpu, nvml, name)) or dict(none) for name, none in zip(uuids, nothing, strict=True)]
    return {"nvml_error": "", "confidential_computing": _confidential(nvml), "gpus": gpus}


def _gpu(nvml: Any, name: str) -> dict[str, Any]:
    handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.UUID(name)}")
    links = range(getattr(nvml, "NVML_NVLINK_MAX_LINKS", _LINKS))
    states = [_try(functools.partial(nvml.nvmlDeviceGetNvLinkState, handle, n)) for n in links]
    return {"nvlinks": sum(state or 0 for state in states), "fabric": _try(lambda: _fabric(nvml, handle))}


def _fabric(nvml: Any, handle: Any) -> dict[str, Any]:
    info = nvml.c_nvmlGpuFabricInfo_t()
    nvml.nvmlDeviceGetGpuFabricInfo(handle, nvml.byref(info))
    state = int(info.state)
    return {
        "state": _FABRIC[state] if state < len(_FABRIC) else f"state {state}",
        "status": int(info.status),
        "cluster": bytes(info.clusterUuid).hex(),
        "clique": int(info.cliqueId),
    }


def _confidential(nvml: Any) -> dict[str, Any] | None:
    """{on, multi_gpu}; `multi_gpu` is None where the driver tells only whether it is on."""

    def settings() -> dict[str, Any]:
        about = nvml.c_nvmlSystemConfComputeSettings_v1_t()
        if nvml.nvmlSystemGetConfComputeSettings(nvml.byref(about)) not in (0, None):  # it does not raise
            raise OSError("not supported")
        mode = int(about.multiGpuMode)
        return {"on": bool(about.ccFeature), "multi_gpu": _MODES.get(mode, f"mode {mode}")}

    def state() -> dict[str, Any]:
        return {"on": bool(nvml.nvmlSystemGetConfComputeState().ccFeature), "multi_gpu": None}

    found: dict[str, Any] | None = _try(settings) or _try(state)
    return found


def _try(look_up: Callable[[], Any]) -> Any:
    try:
        return look_up()
    except Exception:
        return None
