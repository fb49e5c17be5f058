"""What comes of each kind of machine, by the simulated driver: the transport and why, or an error that helps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist

from memory import faults, ranks
from memory.simulated_driver import SimulatedDriver, allow_simulated_multicast
from memory.test_allocate import check_content, check_shared, make
from memory.test_rendezvous import on_host, one
from mnnvl_ar.errors import BringUpError
from mnnvl_ar.memory import DriverError
from mnnvl_ar.memory.failures import advise

NO_PEER, NO_DEVICE = "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED", "CUDA_ERROR_INVALID_DEVICE"
REFUSED, UNSUPPORTED = "CUDA_ERROR_NOT_PERMITTED", "CUDA_ERROR_NOT_SUPPORTED"
TOPO = "nvidia-smi topo -p2p w"


@dataclass(frozen=True)
class Machine:
    """Of three ranks: the host of each (a letter), its device, and what its driver refuses, see `SimulatedDriver`."""

    hosts: str = "aaa"
    devices: tuple[int, ...] = (0, 1, 2)
    fail: dict[int, dict[str, str]] = field(default_factory=dict)
    multicast: bool = True
    transport: str = "auto"


def everywhere(**refused: str) -> dict[int, dict[str, str]]:
    return {rank: {verb.replace("__", " "): code for verb, code in refused.items()} for rank in range(3)}


def out_of_reach(verb: str, code: str, *pairs: tuple[int, int]) -> dict[int, dict[str, str]]:
    """`verb` is refused to rank a for the memory of GPU b, and the other way round. GPU n is that of rank n."""
    fail: dict[int, dict[str, str]] = {}
    for a, b in pairs:
        fail.setdefault(a, {})[f"{verb} of a-gpu-{b}"] = code
        fail.setdefault(b, {})[f"{verb} of a-gpu-{a}"] = code
    return fail


NO_COMMON_DOMAIN = {
    0: {"import fabric of b-gpu-2": REFUSED},
    1: {"import fabric of b-gpu-2": REFUSED},
    2: {"import fabric of a-gpu-0": REFUSED, "import fabric of a-gpu-1": REFUSED},
}

# transport, handle kind, what the reason says
WORKS: dict[str, tuple[Machine, str, str, list[str]]] = {
    "NVSwitch": (Machine(), "multicast", "fabric", ["multicast over fabric, 3 ranks on 1 host"]),
    "GPUs offset from ranks": (Machine(devices=(4, 5, 6)), "multicast", "fabric", []),
    "GPUs in another order": (Machine(devices=(2, 0, 1)), "multicast", "fabric", []),
    "no NVSwitch": (Machine(multicast=False), "unicast", "fabric", ["the device of rank 0 (a-gpu-0) has no multicast"]),
    "container without IMEX channel": (
        Machine(fail={1: {"create fabric": REFUSED}}, transport="unicast"),
        "unicast",
        "posix_fd",
        [f"not fabric, since rank 1 failed at allocate (cuMemCreate: {REFUSED}"],
    ),
    "fabric handles not imported between cgroups": (
        Machine(fail={2: {"import fabric of a-gpu-0": NO_DEVICE}}, transport="unicast"),
        "unicast",
        "posix_fd",
        [f"not fabric, since rank 2 failed at import (cuMemImportFromShareableHandle: {NO_DEVICE}"],
    ),
    "confidential computing": (
        Machine(fail=everywhere(multicast_create=UNSUPPORTED)),
        "unicast",
        "fabric",
        [f"not multicast, since rank 0 failed at multicast create (cuMulticastCreate: {UNSUPPORTED}"],
    ),
    "two hosts of one IMEX domain": (
        Machine(hosts="aab"),
        "multicast",
        "fabric",
        ["3 ranks on 2 hosts", "no file descriptors to other hosts, and rank 2 is not on the host of rank 0"],
    ),
}

# rank, step, what the cause says, what the advice says
FAILS: dict[str, tuple[Machine, int, str, list[str], str]] = {
    "two GPUs that are not peers": (
        Machine(fail=out_of_reach("map", NO_PEER, (1, 2))),
        1,
        "map",
        [f"cuMemSetAccess: {NO_PEER}", "not fabric, since rank 1 failed at map"],
        "Its GPU cannot reach a peer's",
    ),
    "no peers at all": (
        Machine(fail=out_of_reach("map", NO_PEER, (0, 1), (0, 2), (1, 2)), multicast=False),
        0,
        "map",
        [f"cuMemSetAccess: {NO_PEER}", "not fabric, since rank 0 failed at map"],
        TOPO,
    ),
    "access refused by another code": (
        Machine(fail={2: {"map of a-gpu-1": NO_DEVICE}}),
        2,
        "map",
        [f"cuMemSetAccess: {NO_DEVICE}"],
        "no NVLink or P2P between them",
    ),
    "container that does not see a peer": (
        Machine(fail=out_of_reach("import", NO_DEVICE, (1, 2))),
        1,
        "import",
        [f"cuMemImportFromShareableHandle: {NO_DEVICE}", "not fabric, since rank 1 failed at import"],
        "a container that does not see the peer's",
    ),
    "two hosts without a common IMEX domain": (
        Machine(hosts="aab", fail=NO_COMMON_DOMAIN),
        0,
        "import",
        [f"cuMemImportFromShareableHandle: {REFUSED}", "no file descriptors to other hosts, and rank 2 is not"],
        "across hosts, one IMEX domain",
    ),
    "two hosts, one without IMEX channel": (
        Machine(hosts="aab", fail={2: {"create fabric": REFUSED}}),
        2,
        "allocate",
        [f"cuMemCreate: {REFUSED}"],
        "/dev/nvidia-caps-imex-channels",
    ),
    "two hosts, one out of memory": (  # the same call as above, and no business of IMEX
        Machine(hosts="aab", fail={2: {"create fabric": "CUDA_ERROR_OUT_OF_MEMORY"}}),
        2,
        "allocate",
        ["cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY"],
        "Free GPU memory",
    ),
    "confidential computing, multicast asked for": (
        Machine(fail=everywhere(multicast_create=UNSUPPORTED), transport="multicast"),
        0,
        "multicast create",
        [f"cuMulticastCreate: {UNSUPPORTED}"],
        "confidential computing",
    ),
}


def body(rank: int, size: int, store: dist.Store, machine: Machine) -> Any:
    allow_simulated_multicast()
    group = ranks.group(store, "first", rank, size)
    host, device = machine.hosts[rank], machine.devices[rank]
    driver = SimulatedDriver(device, fail=machine.fail.get(rank), multicast=machine.multicast, host=host)
    with on_host(host):
        try:
            memory = make(group, device=torch.device("cuda", device), transport=machine.transport, driver=driver)
        except BringUpError as error:
            faults.check_given_back(driver)
            return error.rank, error.step, error.cause, error.advice
    check_content(memory)
    check_shared(memory, group)
    memory.close()
    faults.check_given_back(driver)
    return memory.transport, memory.handle_kind, memory.reason


@pytest.mark.parametrize("name", WORKS)
def test_what_works(name: str) -> None:
    machine, transport, kind, says = WORKS[name]
    told = one(ranks.values(ranks.launch(3, body, machine)))
    assert told[:2] == (transport, kind), told
    for words in says:
        assert words in told[2]


@pytest.mark.parametrize("name", FAILS)
def test_what_does_not(name: str) -> None:
    machine, rank, step, says, hint = FAILS[name]
    told = one(ranks.values(ranks.launch(3, body, machine)))
    assert told[:2] == (rank, step), told
    for words in says:
        assert words in told[2]
    assert hint in told[3]


@pytest.mark.parametrize(
    ("error", "kind", "hint"),
    [
        (DriverError("cuInit", "CUDA_ERROR_SYSTEM_NOT_READY", ""), "fabric", "fabric manager"),
        (DriverError("cuMemCreate", "CUDA_ERROR_SYSTEM_NOT_READY", ""), "fabric", "fabric manager"),
        (DriverError("cuMemExportToShareableHandle", REFUSED, ""), "fabric", "IMEX channel"),
        (DriverError("cuMemExportToShareableHandle", REFUSED, ""), "posix_fd", ""),
        (DriverError("cuMulticastBindMem", UNSUPPORTED, ""), "fabric", "NVSwitch"),
        (DriverError("memfd_create", "EMFILE", ""), "memfd", "ulimit"),
        (KeyError("anything"), "fabric", ""),
    ],
)
def test_advice(error: BaseException, kind: str, hint: str) -> None:
    assert hint in advise(error, kind)
    assert bool(hint) == bool(advise(error, kind))
