"""NVML by ctypes: the driver's own library, libnvidia-ml.so.1, so that nothing has to be installed to ask it.

Only what the doctor asks. Structures and numbers are those of NVML's header, which keeps them for ever: a structure
that grows gets a function of a new name.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

NAME = "libnvidia-ml.so.1"

P2P_READ, P2P_NVLINK, P2P_OK = 0, 2, 0
SWITCH, UNKNOWN = 2, 0xFF  # what is at the other end of an NVLink; 0 is a GPU


class NvmlError(OSError):
    """A call that NVML refused, or that this NVML does not have."""


class PciInfo(ctypes.Structure):
    _fields_ = (
        ("busIdLegacy", ctypes.c_char * 16),
        *((name, ctypes.c_uint) for name in ("domain", "bus", "device", "pciDeviceId", "pciSubSystemId")),
        ("busId", ctypes.c_char * 32),
    )


class FabricInfo(ctypes.Structure):
    _fields_ = (
        ("clusterUuid", ctypes.c_ubyte * 16),
        ("status", ctypes.c_uint),
        ("cliqueId", ctypes.c_uint),
        ("state", ctypes.c_ubyte),
    )


class Settings(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint) for name in ("version", "environment", "ccFeature", "devToolsMode", "multiGpuMode")
    )


class State(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint) for name in ("environment", "ccFeature", "devToolsMode"))


class Nvml:
    """`NvmlError` from each method. `gpu`: a handle, as `gpu_of` gives it."""

    def __init__(self, library: Any = None) -> None:
        """Loads and starts NVML. library: what has NVML's functions, if it is not to be loaded."""
        if library is None:
            try:
                library = ctypes.CDLL(NAME)
            except OSError as error:
                raise NvmlError(f"{NAME} cannot be loaded: {error}") from None
        self._library = library
        self._call("nvmlInit_v2")

    def gpu_of(self, uuid: str) -> Any:
        """uuid: as NVML writes it, "GPU-..." or "MIG-..."."""
        return self._get(ctypes.c_void_p, "nvmlDeviceGetHandleByUUID", uuid.encode())

    def is_divided(self, gpu: Any) -> bool:
        """Whether MIG is on."""
        pending = ctypes.c_uint()
        mode = ctypes.c_uint()
        self._call("nvmlDeviceGetMigMode", gpu, ctypes.byref(mode), ctypes.byref(pending))
        return bool(mode.value)

    def bus_id(self, gpu: Any) -> bytes:
        return bytes(self._get(PciInfo, "nvmlDeviceGetPciInfo_v3", gpu).busId)

    def link_is_up(self, gpu: Any, link: int) -> bool:
        return bool(self._get(ctypes.c_uint, "nvmlDeviceGetNvLinkState", gpu, ctypes.c_uint(link)).value)

    def far_end(self, gpu: Any, link: int) -> int:
        """What the link leads to: 0, a GPU, `SWITCH`, `UNKNOWN`."""
        return int(self._get(ctypes.c_uint, "nvmlDeviceGetNvLinkRemoteDeviceType", gpu, ctypes.c_uint(link)).value)

    def far_bus_id(self, gpu: Any, link: int) -> bytes:
        return bytes(self._get(PciInfo, "nvmlDeviceGetNvLinkRemotePciInfo_v2", gpu, ctypes.c_uint(link)).busId)

    def p2p_status(self, a: Any, b: Any, what: int) -> int:
        """what: P2P_READ, P2P_NVLINK. 0 is OK."""
        return int(self._get(ctypes.c_uint, "nvmlDeviceGetP2PStatus", a, b, ctypes.c_uint(what)).value)

    def common_ancestor(self, a: Any, b: Any) -> int:
        """On PCIe: NVML_TOPOLOGY_*."""
        return int(self._get(ctypes.c_uint, "nvmlDeviceGetTopologyCommonAncestor", a, b).value)

    def fabric(self, gpu: Any) -> FabricInfo:
        info: FabricInfo = self._get(FabricInfo, "nvmlDeviceGetGpuFabricInfo", gpu)
        return info

    def confidential_settings(self) -> Settings:
        about = Settings(version=ctypes.sizeof(Settings) | 1 << 24)
        self._call("nvmlSystemGetConfComputeSettings", ctypes.byref(about))
        return about

    def confidential_state(self) -> State:
        state: State = self._get(State, "nvmlSystemGetConfComputeState")
        return state

    def _get(self, kind: Callable[[], Any], name: str, *arguments: Any) -> Any:
        found = kind()
        self._call(name, *arguments, ctypes.byref(found))
        return found

    def _call(self, name: str, *arguments: Any) -> None:
        try:
            function = getattr(self._library, name)
        except AttributeError:
            raise NvmlError(f"{name}: not in this driver's NVML") from None
        status = function(*arguments)
        if status != 0:
            raise NvmlError(f"{name}: {self._said(status)}")

    def _said(self, status: int) -> str:
        try:
            text = self._library.nvmlErrorString
        except AttributeError:
            return f"NVML error {status}"
        text.restype = ctypes.c_char_p
        return str((text(status) or b"").decode())


def tried(look_up: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns; None where NVML refuses it."""
    try:
        return functools.partial(look_up, *arguments)()
    except NvmlError:
        return None
