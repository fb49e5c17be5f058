"""CUDA's driver API, as `verbs.Verbs`. The only file that calls it for memory.

`cuda.bindings` is imported when a driver is opened, so that the package works on machines without CUDA. Work that
touches memory runs on a stream of its own, which never waits for the legacy stream: another thread may be capturing on
its streams.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .verbs import DriverError, Token, Traits, require_multicast_allowed

# Only multimem instructions may touch a multicast address (PTX ISA, "multimem"): a memset may not. This is the store of
# the kernels (kernels/ptx.cuh), and what makes it seen through other addresses of the same memory. The driver compiles
# it when multicast is brought up, and never otherwise.
MULTICAST_STORE = b"""
.version 8.1
.target sm_90
.address_size 64
.visible .entry multicast_store(.param .u64 address, .param .u32 word)
{
  .reg .b64 %address;
  .reg .b32 %word;
  .reg .f32 %bits;
  ld.param.u64 %address, [address];
  ld.param.u32 %word, [word];
  mov.b32 %bits, %word;
  multimem.st.relaxed.sys.global.v4.f32 [%address], {%bits, %bits, %bits, %bits};
  fence.proxy.alias;
  ret;
}
"""


class CudaDriver:
    """`verbs.Verbs` on one CUDA device. A handle is a CUmemGenericAllocationHandle as an int."""

    # What works is found by trying: an attribute that reads 1 proves nothing.
    kinds: tuple[str, ...] = ("fabric", "posix_fd")

    def __init__(self) -> None:
        self._cuda: Any = None
        self._device: Any = None
        self._context: Any = None
        self._stream: Any = None
        self._traits = Traits("", "", False)

    def open(self, index: int) -> Traits:
        """Takes the device's primary context, the one PyTorch uses. If it is open already, only looks anew at what the
        caller's context has."""
        if self._context is not None:
            here, of_device = self._processors(self._call("cuCtxGetCurrent"))
            self._traits = replace(self._traits, processors=here, device_processors=of_device)
            return self._traits
        try:
            from cuda.bindings import driver as cuda
        except ImportError as error:
            raise DriverError("import cuda.bindings", "NO_BINDINGS", str(error)) from error
        self._cuda = cuda
        self._call("cuInit", 0)
        self._device = self._call("cuDeviceGet", index)
        attribute = cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED
        name = self._call("cuDeviceGetName", 128, self._device).split(b"\0")[0].decode()
        uid = bytes(self._call("cuDeviceGetUuid", self._device).bytes).hex()
        multicast = bool(self._call("cuDeviceGetAttribute", attribute, self._device))
        current = self._call("cuCtxGetCurrent")  # the caller's, maybe a green one
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        try:
            self._traits = Traits(name, uid, multicast, *self._processors(current))
            with self._current():
                self._stream = self._call("cuStreamCreate", cuda.CUstream_flags.CU_STREAM_NON_BLOCKING.value)
        except DriverError:
            self.close()
            raise
        return self._traits

    def _processors(self, current: Any) -> tuple[int, int]:
        """SMs of the caller's context, if it is of this device, else of the primary one; and of the device."""
        cuda = self._cuda
        attribute = cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
        of_device = int(self._call("cuDeviceGetAttribute", attribute, self._device))
        is_ours = bool(int(current)) and int(self._call("cuCtxGetDevice")) == int(self._device)
        context, found = current if is_ours else self._context, [of_device]
        with contextlib.suppress(DriverError):  # a driver older than green contexts
            resource = self._call("cuCtxGetDevResource", context, cuda.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM)
            found.append(int(resource.sm.smCount))
        self._call("cuCtxPushCurrent", context)
        try:
            with contextlib.suppress(DriverError):  # known under MPS alone
                kind = cuda.CUexecAffinityType.CU_EXEC_AFFINITY_TYPE_SM_COUNT
                found.append(int(self._call("cuCtxGetExecAffinity", kind).param.smCount.val))
        finally:
            self._call("cuCtxPopCurrent")
        return min(count for count in found if count > 0), of_device

    def close(self) -> None:
        if self._context is None:
            return
        try:
            if self._stream is not None:
                with self._current():
                    self._call("cuStreamDestroy", self._stream)
        finally:
            self._stream = self._context = None
            self._call("cuDevicePrimaryCtxRelease", self._device)

    def granularity(self, kind: str) -> int:
        flag = self._cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        return int(self._call("cuMemGetAllocationGranularity", self._properties(kind), flag))

    def reserve(self, nbytes: int, alignment: int) -> int:
        return int(self._call("cuMemAddressReserve", nbytes, alignment, 0, 0))

    def free(self, address: int, nbytes: int) -> None:
        self._call("cuMemAddressFree", address, nbytes)

    def create(self, nbytes: int, kind: str) -> int:
        return int(self._call("cuMemCreate", nbytes, self._properties(kind), 0))

    def release(self, handle: int) -> None:
        self._call("cuMemRelease", handle)

    def map(self, address: int, nbytes: int, handle: int) -> None:
        self._call("cuMemMap", address, nbytes, 0, handle, 0)
        access = self._cuda.CUmemAccessDesc()
        access.location = self._location()
        access.flags = self._cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        try:
            self._call("cuMemSetAccess", address, nbytes, [access], 1)
        except DriverError:
            self._call("cuMemUnmap", address, nbytes)
            raise

    def unmap(self, address: int, nbytes: int) -> None:
        self._call("cuMemUnmap", address, nbytes)

    def export(self, handle: int, kind: str) -> Token:
        token = self._call("cuMemExportToShareableHandle", handle, self._handle_type(kind), 0)
        return bytes(token.data) if kind == "fabric" else int(token)

    def import_(self, token: Token, kind: str) -> int:
        return int(self._call("cuMemImportFromShareableHandle", token, self._handle_type(kind)))

    def fill(self, address: int, nbytes: int, word: int) -> None:
        with self._current():
            self._call("cuMemsetD32Async", address, word, nbytes // 4, self._stream)
            self._call("cuStreamSynchronize", self._stream)

    def read(self, address: int, nbytes: int) -> bytes:
        found = bytearray(nbytes)
        with self._current():
            self._call("cuMemcpyDtoHAsync", found, address, nbytes, self._stream)
            self._call("cuStreamSynchronize", self._stream)
        return bytes(found)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        cuda, before = self._cuda, None
        with contextlib.suppress(DriverError):
            relaxed = cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
            before = self._call("cuThreadExchangeStreamCaptureMode", relaxed)
        try:
            yield
        finally:
            if before is not None:
                with contextlib.suppress(DriverError):
                    self._call("cuThreadExchangeStreamCaptureMode", before)

    def multicast_granularity(self, members: int, nbytes: int, kind: str) -> tuple[int, int]:
        require_multicast_allowed()
        flags, about = self._cuda.CUmulticastGranularity_flags, self._multicast_properties(members, nbytes, kind)
        minimum = self._call("cuMulticastGetGranularity", about, flags.CU_MULTICAST_GRANULARITY_MINIMUM)
        recommended = self._call("cuMulticastGetGranularity", about, flags.CU_MULTICAST_GRANULARITY_RECOMMENDED)
        return int(minimum), int(recommended)

    def multicast_create(self, members: int, nbytes: int, kind: str) -> int:
        require_multicast_allowed()
        return int(self._call("cuMulticastCreate", self._multicast_properties(members, nbytes, kind)))

    def multicast_add_device(self, multicast: int) -> None:
        require_multicast_allowed()
        self._call("cuMulticastAddDevice", multicast, self._device)

    def multicast_bind(self, multicast: int, handle: int, nbytes: int) -> None:
        require_multicast_allowed()
        self._call("cuMulticastBindMem", multicast, 0, handle, 0, nbytes, 0)

    def multicast_unbind(self, multicast: int, nbytes: int) -> None:
        self._call("cuMulticastUnbind", multicast, self._device, 0, nbytes)

    def multicast_store(self, address: int, word: int) -> None:
        require_multicast_allowed()
        with self._current():
            module = self._call("cuModuleLoadData", MULTICAST_STORE)
            try:
                kernel = self._call("cuModuleGetFunction", module, b"multicast_store")
                arguments = ((address, word), (ctypes.c_uint64, ctypes.c_uint32))
                self._call("cuLaunchKernel", kernel, 1, 1, 1, 1, 1, 1, 0, self._stream, arguments, 0)
                self._call("cuStreamSynchronize", self._stream)
            finally:
                self._call("cuModuleUnload", module)

    def _call(self, name: str, *arguments: Any) -> Any:
        """One driver call: its result, or `DriverError`."""
        try:
            status, *results = getattr(self._cuda, name)(*arguments)
        except (RuntimeError, AttributeError) as error:  # no libcuda, or one (or bindings) too old for this call
            code, what = ("NO_DRIVER", "no usable NVIDIA driver") if name == "cuInit" else ("TOO_OLD", "no such call")
            raise DriverError(name, code, f"{what} in this process: {error}") from error
        if status == self._cuda.CUresult.CUDA_SUCCESS:
            return results[0] if results else None
        _, text = self._cuda.cuGetErrorString(status)
        raise DriverError(name, status.name, text.decode() if text else "no text")

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """Our context, whatever device the caller's thread is on."""
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    def _handle_type(self, kind: str) -> Any:
        types = self._cuda.CUmemAllocationHandleType
        if kind == "":
            return types.CU_MEM_HANDLE_TYPE_NONE
        if kind == "fabric":
            return types.CU_MEM_HANDLE_TYPE_FABRIC
        return types.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR

    def _location(self) -> Any:
        location = self._cuda.CUmemLocation()
        location.type = self._cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = int(self._device)
        return location

    def _properties(self, kind: str) -> Any:
        properties = self._cuda.CUmemAllocationProp()
        properties.type = self._cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location = self._location()
        properties.requestedHandleTypes = self._handle_type(kind)
        return properties

    def _multicast_properties(self, members: int, nbytes: int, kind: str) -> Any:
        properties = self._cuda.CUmulticastObjectProp()
        properties.numDevices = members
        properties.size = nbytes
        properties.handleTypes = self._handle_type(kind).value
        return properties
