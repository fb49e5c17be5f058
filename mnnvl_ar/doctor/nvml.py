"""What NVML alone knows: NVLinks, what lies between two GPUs, fabric, MIG and confidential computing."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from mnnvl_ar.doctor.libnvml import P2P_NVLINK, P2P_OK, P2P_READ, SWITCH, UNKNOWN, Nvml, NvmlError, tried

_FABRIC = ("not supported", "not started", "in progress", "completed")  # by NVML_GPU_FABRIC_STATE_*
_MODES = {0: "none", 1: "protected PCIe", 2: "NVLink encryption"}  # by NVML_CC_SYSTEM_MULTIGPU_*
_PCIE = {0: "PIX", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}  # by NVML_TOPOLOGY_*, as nvidia-smi has it
_REFUSALS = {  # by NVML_P2P_STATUS_*
    1: "the chipset does not support it",
    2: "the GPU does not support it",
    3: "the I/O hub's topology does not support it",
    4: "a registry key of the driver has switched it off",
    5: "it is not supported",
}
_MOST_LINKS = 36  # of a GPU: twice what any has; NVML refuses a number that is too large


def look(uuids: Sequence[str], library: Any = None) -> dict[str, Any]:
    """{nvml_error, confidential_computing, gpus, links, p2p_refusals}. `gpus`, in the order of `uuids` (hex digits
    only): {nvlinks, fabric, mig}. `links` and `p2p_refusals` are matrices in that order: what lies between two GPUs
    ("NV18": 18 NVLinks; "PIX", "PXB", "PHB", "NODE", "SYS": the PCIe path, from near to far), and why they have no peer
    access, as far as NVML says so, else "".

    What NVML does not say is None; `nvml_error` is "" unless NVML as a whole is out of reach. library: stands in for
    NVML's."""
    found: dict[str, Any] = {"nvml_error": "", "confidential_computing": None}
    found["gpus"] = [{"nvlinks": None, "fabric": None, "mig": None} for _ in uuids]
    found["links"] = [[None for _ in uuids] for _ in uuids]
    found["p2p_refusals"] = [["" for _ in uuids] for _ in uuids]
    if not uuids:
        return found
    try:
        nvml = Nvml(library)
    except NvmlError as error:
        return {**found, "nvml_error": f"NVML does not start: {error}"}
    gpus = [_Gpu(nvml, name) for name in uuids]
    found["gpus"] = [gpu.about for gpu in gpus]
    found["links"] = [[None if a is b else _between(nvml, a, b) for b in gpus] for a in gpus]
    found["p2p_refusals"] = [["" if a is b else _refusal(nvml, a, b) for b in gpus] for a in gpus]
    return {**found, "confidential_computing": _confidential(nvml)}


class _Gpu:
    """handle: None if NVML does not know it, or it is a part of a GPU, which has neither links nor peers. leads_to: of
    each NVLink that is up the bus id of the GPU at its end, b"" for a switch or what NVML does not name."""

    def __init__(self, nvml: Nvml, name: str) -> None:
        self.about: dict[str, Any] = {"nvlinks": None, "fabric": None, "mig": None}
        self.bus_id: bytes | None = None
        self.leads_to: list[bytes] = []
        text = uuid.UUID(name)
        self.handle = tried(nvml.gpu_of, f"GPU-{text}")
        if self.handle is None:
            if tried(nvml.gpu_of, f"MIG-{text}") is not None:
                self.about["mig"] = True
            return
        self.about["mig"] = tried(nvml.is_divided, self.handle) or False
        self.bus_id = tried(nvml.bus_id, self.handle)
        self.about["fabric"] = tried(_fabric, nvml, self.handle)
        for link in range(_MOST_LINKS):
            if tried(nvml.link_is_up, self.handle, link):
                kind = tried(nvml.far_end, self.handle, link)
                is_gpu = kind not in (None, SWITCH, UNKNOWN)
                self.leads_to.append((tried(nvml.far_bus_id, self.handle, link) or b"") if is_gpu else b"")
        self.about["nvlinks"] = len(self.leads_to)

    @property
    def is_whole(self) -> bool:
        return self.handle is not None and not self.about["mig"]


def _between(nvml: Nvml, a: _Gpu, b: _Gpu) -> str | None:
    if not (a.is_whole and b.is_whole):
        return None
    if direct := sum(end == b.bus_id for end in a.leads_to):
        return f"NV{direct}"
    linked = tried(nvml.p2p_status, a.handle, b.handle, P2P_NVLINK)
    if linked is None:
        return None
    if linked == P2P_OK:
        through = min(a.leads_to.count(b""), b.leads_to.count(b""))  # of a switch each GPU uses all its links
        return f"NV{through or '?'}"
    return _PCIE.get(tried(nvml.common_ancestor, a.handle, b.handle))


def _refusal(nvml: Nvml, a: _Gpu, b: _Gpu) -> str:
    if not (a.is_whole and b.is_whole):
        return ""
    return _REFUSALS.get(tried(nvml.p2p_status, a.handle, b.handle, P2P_READ), "")


def _fabric(nvml: Nvml, gpu: Any) -> dict[str, Any]:
    info = nvml.fabric(gpu)
    return {
        "state": _FABRIC[info.state] if info.state < len(_FABRIC) else f"state {info.state}",
        "status": int(info.status),
        "cluster": bytes(info.clusterUuid).hex(),
        "clique": int(info.cliqueId),
    }


def _confidential(nvml: Nvml) -> dict[str, Any] | None:
    """{on, multi_gpu}; `multi_gpu` is None where the driver tells only whether it is on."""
    if (settings := tried(nvml.confidential_settings)) is not None:
        mode = int(settings.multiGpuMode)
        return {"on": bool(settings.ccFeature), "multi_gpu": _MODES.get(mode, f"mode {mode}")}
    if (state := tried(nvml.confidential_state)) is not None:
        return {"on": bool(state.ccFeature), "multi_gpu": None}
    return None
