"""NVML without a driver: its functions by C's calling convention, for `mnnvl_ar.doctor.libnvml.Nvml(library)`.

GPU n has the UUID ...n and the PCI bus n. What a real NVML refuses is refused here, by the same numbers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Mapping
from ctypes import POINTER, c_char_p, c_uint, c_void_p
from typing import Any

from mnnvl_ar.doctor import libnvml

INVALID, NOT_SUPPORTED, NOT_FOUND = 2, 3, 6
UUIDS = [f"{n:032x}" for n in range(8)]
Pair = frozenset[int]


def pair(a: int, b: int) -> Pair:
    return frozenset((a, b))


class SimulatedNvml:
    """count: of GPUs, the first of `UUIDS`. switched: NVLinks that are up of each GPU, all to a switch. direct: of a
    pair, so many links from one to the other. pcie: NVML_TOPOLOGY_* of all pairs. refusals: NVML_P2P_STATUS_* of a pair
    that has no peer access. divided: GPUs in MIG mode. parts: UUIDs that are parts of a GPU. fabric: a state, None
    where there is none. settings, state: of confidential computing, by either call; None where the call fails. without:
    functions that this NVML has not. start: what nvmlInit returns."""

    def __init__(
        self,
        count: int,
        *,
        switched: int | Mapping[int, int] = 0,
        direct: Mapping[Pair, int] | None = None,
        pcie: int = 50,
        refusals: Mapping[Pair, int] | None = None,
        divided: Collection[int] = (),
        parts: Collection[str] = (),
        fabric: int | None = None,
        settings: int | None = None,
        state: int | None = None,
        without: Collection[str] = (),
        start: int = 0,
    ) -> None:
        self._refusals, self._direct = dict(refusals or {}), dict(direct or {})
        self._switched = dict.fromkeys(range(count), switched) if isinstance(switched, int) else dict(switched)
        self._handles = {f"GPU-00000000-0000-0000-0000-{n:012x}": n for n in range(count)}
        self._handles |= {f"MIG-{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}": 99 for text in parts}
        self._pcie, self._divided, self._fabric = pcie, divided, fabric
        self._settings, self._state, self._start = settings, state, start
        texts = [ctypes.create_string_buffer(b"error %d, it says" % status) for status in range(1000)]
        self.nvmlErrorString = ctypes.CFUNCTYPE(c_void_p, c_uint)(lambda status: ctypes.addressof(texts[status]))
        gpu, number, bus = c_void_p, POINTER(c_uint), POINTER(libnvml.PciInfo)
        for name, action, types in (
            ("nvmlInit_v2", lambda: self._start, ()),
            ("nvmlDeviceGetHandleByUUID", self._find, (c_char_p, POINTER(c_void_p))),
            ("nvmlDeviceGetMigMode", self._mig, (gpu, number, number)),
            ("nvmlDeviceGetPciInfo_v3", self._bus, (gpu, bus)),
            ("nvmlDeviceGetNvLinkState", self._link, (gpu, c_uint, number)),
            ("nvmlDeviceGetNvLinkRemoteDeviceType", self._end, (gpu, c_uint, number)),
            ("nvmlDeviceGetNvLinkRemotePciInfo_v2", self._far_bus, (gpu, c_uint, bus)),
            ("nvmlDeviceGetP2PStatus", self._p2p, (gpu, gpu, c_uint, number)),
            ("nvmlDeviceGetTopologyCommonAncestor", self._ancestor, (gpu, gpu, number)),
            ("nvmlDeviceGetGpuFabricInfo", self._fabric_info, (gpu, POINTER(libnvml.FabricInfo))),
            ("nvmlSystemGetConfComputeSettings", self._confidential, (POINTER(libnvml.Settings),)),
            ("nvmlSystemGetConfComputeState", self._older, (POINTER(libnvml.State),)),
        ):
            if name not in without:
                setattr(self, name, ctypes.CFUNCTYPE(c_uint, *types)(_whole(action)))

    def _links(self, n: int) -> list[int | None]:
        """Where each of the GPU's links leads: a GPU, or None for a switch."""
        there = [b for ends, links in self._direct.items() if n in ends for b in ends - {n} for _ in range(links)]
        return [*there, *[None] * self._switched[n]]

    def _find(self, name: bytes, found: Any) -> int:
        if name.decode() not in self._handles:
            return NOT_FOUND
        found[0] = self._handles[name.decode()] + 1
        return 0

    def _mig(self, gpu: int, mode: Any, pending: Any) -> int:
        mode[0] = pending[0] = int(gpu - 1 in self._divided)
        return 0

    def _bus(self, gpu: int, info: Any) -> int:
        info[0].busId = b"00000000:%02X:00.0" % gpu
        return 0

    def _link(self, gpu: int, link: int, up: Any) -> int:
        if link >= 18:
            return INVALID
        up[0] = int(link < len(self._links(gpu - 1)))
        return 0

    def _end(self, gpu: int, link: int, kind: Any) -> int:
        kind[0] = libnvml.SWITCH if self._links(gpu - 1)[link] is None else 0
        return 0

    def _far_bus(self, gpu: int, link: int, info: Any) -> int:
        end = self._links(gpu - 1)[link]
        return NOT_SUPPORTED if end is None else self._bus(end + 1, info)

    def _p2p(self, a: int, b: int, what: int, status: Any) -> int:
        ends = pair(a - 1, b - 1)
        linked = ends in self._direct or all(self._switched[n] for n in ends)
        status[0] = self._refusals.get(ends, 5 if what == libnvml.P2P_NVLINK and not linked else 0)
        return 0

    def _ancestor(self, a: int, b: int, level: Any) -> int:
        level[0] = self._pcie
        return 0

    def _fabric_info(self, gpu: int, info: Any) -> int:
        if self._fabric is None:
            return NOT_SUPPORTED
        info[0].state, info[0].cliqueId = self._fabric, 7
        return 0

    def _confidential(self, about: Any) -> int:
        if self._settings is None or about[0].version != (1 << 24 | 20):
            return NOT_SUPPORTED
        about[0].ccFeature, about[0].multiGpuMode = self._settings, 1
        return 0

    def _older(self, about: Any) -> int:
        if self._state is None:
            return NOT_SUPPORTED
        about[0].ccFeature = self._state
        return 0


def _whole(action: Callable[..., int]) -> Callable[..., int]:
    """ctypes swallows what a callback raises: that is a status of its own here, which no test takes for NVML's."""

    def call(*arguments: Any) -> int:
        try:
            return action(*arguments)
        except Exception as error:
            print(f"simulated NVML: {error!r}")
            return 999

    return call
