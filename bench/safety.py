"""NVLink multicast stays off, whatever a peer would like.

Creating a multicast object on a shared NVSwitch can take other users' GPUs down, so the bench turns multicast off for
itself and all that it starts, unless the person who owns the whole machine says otherwise; and what is off stays off.
"""

from __future__ import annotations

import os

OFF = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "MNNVL_AR_DISABLE_MULTICAST": "1",
}


def forbid_multicast(allow: bool = False) -> None:
    """Sets every variable that turns multicast off. `allow` leaves them alone, and is refused where one is set
    already."""
    off = [f"{name}={value}" for name, value in OFF.items() if os.environ.get(name) == value]
    if allow and off:
        raise SystemExit(f"bench: --multicast, but multicast is forbidden here by {', '.join(off)}")
    if not allow:
        os.environ.update(OFF)


def multicast_allowed() -> bool:
    return not any(os.environ.get(name) == value for name, value in OFF.items())
