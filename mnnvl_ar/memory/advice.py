"""From the error of a driver call to what an operator can do. Only causes seen in the field are listed."""

from __future__ import annotations

from .verbs import DriverError

_BY_CODE = {
    "CUDA_ERROR_OUT_OF_MEMORY": "Free GPU memory on that rank, or ask for a smaller workspace.",
    "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED": "Its GPU cannot reach a peer's: look at `nvidia-smi topo -p2p w`.",
    "CUDA_ERROR_MPS_CONNECTION_FAILED": "The MPS daemon of that host does not answer.",
    "CUDA_ERROR_SYSTEM_NOT_READY": "The fabric manager of that host is not running, or not ready yet.",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "An earlier kernel of that process faulted; this is only where it shows.",
    "NO_DRIVER": 'Run where an NVIDIA driver is installed, or use device="cpu" for the host transport.',
    "TOO_OLD": "The NVIDIA driver of that host, or cuda-bindings, is too old.",
    "ENOMEM": "Not enough memory on that host (look at the container's limit).",
    "ENOSPC": "Not enough memory on that host (look at the container's limit).",
    "EMFILE": "Raise `ulimit -n`.",
}
_HANDLE_CALLS = ("cuMemCreate", "cuMemExportToShareableHandle", "cuMemImportFromShareableHandle")
_FABRIC = (
    "Fabric handles need an IMEX channel in the container (/dev/nvidia-caps-imex-channels) and, across hosts, one IMEX "
    "domain with its daemon running."
)
_MULTICAST = (
    "The driver refuses NVLink multicast: no NVSwitch, confidential computing, or a container without it. "
    'transport="auto" or "unicast" does without.'
)
_ACCESS = (
    "GPUs whose memory cannot be mapped: no NVLink or P2P between them, or a container that does not see the peer's. "
    "Look at `nvidia-smi topo -p2p w`."
)


def advise(error: BaseException, kind: str) -> str:
    """One sentence or two; empty if nothing useful is known."""
    if not isinstance(error, DriverError):
        return ""
    if error.code in _BY_CODE:
        return _BY_CODE[error.code]
    if error.call.startswith("cuMulticast"):
        return _MULTICAST
    if kind == "fabric" and error.call in _HANDLE_CALLS:
        return _FABRIC
    return _ACCESS if error.call in ("cuMemSetAccess", "cuMemMap", "cuMemImportFromShareableHandle") else ""
