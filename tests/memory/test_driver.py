"""The CUDA driver's thin module, as far as it goes without a GPU: the real bindings' types, scripted calls."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from common import sass
from memory import ranks
from memory.test_allocate import make
from mnnvl_ar.errors import BringUpError
from mnnvl_ar.memory import DriverError, cuda_driver
from mnnvl_ar.memory.cuda_driver import CudaDriver
from mnnvl_ar.memory.failures import advise

cuda = pytest.importorskip("cuda.bindings.driver")


class Scripted:
    """The bindings' module with every function replaced by one that notes the call and answers from a script."""

    def __init__(self, **answers: Any) -> None:
        self.answers, self.log = answers, []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            return getattr(cuda, name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.log.append((name, arguments))
            if name == "cuGetErrorString":
                return cuda.CUresult.CUDA_SUCCESS, b"in words"
            answer = self.answers.get(name, ())
            if isinstance(answer, cuda.CUresult):
                return (answer, *[None] * 1)
            return (cuda.CUresult.CUDA_SUCCESS, *answer)

        return call


def opened(**answers: Any) -> tuple[CudaDriver, Scripted]:
    fake = Scripted(**answers)
    real = CudaDriver()
    real._cuda, real._device, real._context, real._stream = fake, 3, object(), object()
    return real, fake


def test_a_driver_too_old_for_a_call_is_an_error_like_others() -> None:
    def missing(*_: Any) -> None:
        raise RuntimeError('Function "cuMemCreate" not found')

    real, fake = opened()
    fake.cuMemCreate = missing
    with pytest.raises(DriverError, match="TOO_OLD"):
        real.create(2 << 20, "posix_fd")


def names(fake: Scripted) -> list[str]:
    return [name for name, _ in fake.log if name != "cuGetErrorString"]


def test_errors_carry_call_code_and_text() -> None:
    real, _ = opened(cuMemCreate=cuda.CUresult.CUDA_ERROR_NOT_PERMITTED)
    with pytest.raises(DriverError) as caught:
        real.create(2 << 20, "fabric")
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.call, error.code, error.text) == ("cuMemCreate", "CUDA_ERROR_NOT_PERMITTED", "in words")
    assert "/dev/nvidia-caps-imex-channels" in advise(error, "fabric")


def test_properties_name_our_device_and_the_handle_kind() -> None:
    real, fake = opened(cuMemCreate=(77,), cuMulticastCreate=(78,))
    assert real.create(2 << 20, "posix_fd") == 77
    nbytes, properties, flags = fake.log[0][1]
    assert (nbytes, flags) == (2 << 20, 0)
    assert properties.location.id == 3
    assert properties.location.type == cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    assert properties.type == cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    kinds = cuda.CUmemAllocationHandleType
    assert properties.requestedHandleTypes == kinds.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    assert real._properties("fabric").requestedHandleTypes == kinds.CU_MEM_HANDLE_TYPE_FABRIC
    wanted = real._multicast_properties(4, 4 << 20, "posix_fd")
    assert (wanted.numDevices, wanted.size) == (4, 4 << 20)
    assert wanted.handleTypes == kinds.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR.value

    assert real._properties("").requestedHandleTypes == kinds.CU_MEM_HANDLE_TYPE_NONE


NO = cuda.CUresult.CUDA_ERROR_NOT_SUPPORTED


def sms(count: int) -> tuple[Any, ...]:
    return (SimpleNamespace(sm=SimpleNamespace(smCount=count)),)


def affinity(count: int) -> tuple[Any, ...]:
    return (SimpleNamespace(param=SimpleNamespace(smCount=SimpleNamespace(val=count))),)


@pytest.mark.parametrize(
    ("current", "device", "resource", "exec_affinity", "wanted"),
    [
        (0, 3, sms(132), NO, 132),
        (5, 3, sms(48), NO, 48),  # a green context
        (5, 1, sms(132), NO, 132),  # a context of another device
        (0, 3, NO, affinity(66), 66),  # MPS, and a driver before green contexts
        (0, 3, sms(132), affinity(0), 132),
        (0, 3, NO, NO, 132),
    ],
)
def test_what_the_callers_context_has(
    current: int, device: int, resource: Any, exec_affinity: Any, wanted: int
) -> None:
    real, fake = opened(
        cuCtxGetCurrent=(cuda.CUcontext(current),),
        cuCtxGetDevice=(device,),
        cuDeviceGetAttribute=(132,),
        cuCtxGetDevResource=resource,
        cuCtxGetExecAffinity=exec_affinity,
    )
    traits = real.open(0)
    assert (traits.processors, traits.device_processors) == (wanted, 132)
    asked = next(arguments[0] for name, arguments in fake.log if name == "cuCtxGetDevResource")
    assert (asked is real._context) == (current == 0 or device != 3)
    assert names(fake)[-3:] == ["cuCtxPushCurrent", "cuCtxGetExecAffinity", "cuCtxPopCurrent"]


def test_map_gives_our_device_access_and_undoes_itself() -> None:
    real, fake = opened()
    real.map(1 << 30, 2 << 20, 77)
    (access,) = fake.log[1][1][2]
    assert access.location.id == 3
    assert access.flags == cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    real, fake = opened(cuMemSetAccess=cuda.CUresult.CUDA_ERROR_INVALID_DEVICE)
    with pytest.raises(DriverError, match="CUDA_ERROR_INVALID_DEVICE"):
        real.map(1 << 30, 2 << 20, 77)
    assert names(fake) == ["cuMemMap", "cuMemSetAccess", "cuMemUnmap"]


def test_work_on_memory_runs_in_our_context_and_leaves_it() -> None:
    real, fake = opened(cuMemsetD32Async=cuda.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS)
    with pytest.raises(DriverError, match="ILLEGAL_ADDRESS"):
        real.fill(1 << 30, 64, 0x80000000)
    assert names(fake) == ["cuCtxPushCurrent", "cuMemsetD32Async", "cuCtxPopCurrent"]
    assert fake.log[1][1][:3] == (1 << 30, 0x80000000, 16)


def test_a_fabric_token_is_bytes_and_a_posix_token_a_descriptor() -> None:
    handle = cuda.CUmemFabricHandle()
    handle.data = bytes(range(64))
    real, _ = opened(cuMemExportToShareableHandle=(handle,))
    assert real.export(77, "fabric") == bytes(range(64))
    real, _ = opened(cuMemExportToShareableHandle=(9,))
    assert real.export(77, "posix_fd") == 9


def test_both_granularities_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "require_multicast_allowed", lambda: None)  # nothing here reaches a driver
    real, fake = opened(cuMulticastGetGranularity=(2 << 20,))
    assert real.multicast_granularity(4, 4 << 20, "posix_fd") == (2 << 20, 2 << 20)
    flags = cuda.CUmulticastGranularity_flags
    asked = [flags.CU_MULTICAST_GRANULARITY_MINIMUM, flags.CU_MULTICAST_GRANULARITY_RECOMMENDED]
    assert [arguments[1] for _, arguments in fake.log] == asked


def test_a_multicast_store_is_a_kernel_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "require_multicast_allowed", lambda: None)
    wanted = ["cuCtxPushCurrent", "cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel", "cuStreamSynchronize"]
    after = ["cuModuleUnload", "cuCtxPopCurrent"]
    real, fake = opened(cuModuleLoadData=("module",), cuModuleGetFunction=("kernel",))
    real.multicast_store(1 << 30, 0x80000000)
    assert names(fake) == wanted + after
    kernel, *shape, shared, stream, (values, _), extra = fake.log[3][1]
    assert (kernel, shape, shared, stream, extra) == ("kernel", [1] * 6, 0, real._stream, 0)
    assert values == (1 << 30, 0x80000000)
    failed = cuda.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    real, fake = opened(cuModuleLoadData=("m",), cuModuleGetFunction=("k",), cuStreamSynchronize=failed)
    with pytest.raises(DriverError, match="ILLEGAL_ADDRESS"):
        real.multicast_store(1 << 30, 1)
    assert names(fake) == wanted + after


@pytest.mark.parametrize("arch", ["sm_90", "sm_90a", "sm_100f"])
def test_the_multicast_store_is_that_of_the_kernels(arch: str, tmp_path: Path) -> None:
    """As ptxas compiles it: a 128-bit store of system scope. With a store that no hardware has, it does not compile."""
    try:
        ptxas = sass.find_tool("ptxas")
    except sass.NoDisassembly as reason:
        pytest.skip(str(reason))
    source, cubin = tmp_path / "store.ptx", tmp_path / "store.cubin"

    def compiles(text: bytes) -> bool:
        source.write_bytes(text)
        return subprocess.run([ptxas, f"-arch={arch}", source, "-o", cubin], capture_output=True).returncode == 0

    if not compiles(b".version 8.1\n.target sm_90\n.address_size 64\n"):
        pytest.skip(f"this ptxas does not build for {arch}")
    assert not compiles(cuda_driver.MULTICAST_STORE.replace(b".v4.f32", b".v4.u32"))
    assert compiles(cuda_driver.MULTICAST_STORE)
    try:
        (kernel,) = sass.disassemble(cubin)
    except sass.NoDisassembly as reason:
        pytest.skip(str(reason))
    stores = [one.opcode for one in kernel.code if one.opcode.startswith("ST")]
    assert stores == ["STG.E.128.STRONG.SYS"]


def test_closing_gives_the_context_back_once() -> None:
    real, fake = opened(cuStreamDestroy=cuda.CUresult.CUDA_ERROR_DEINITIALIZED)
    with pytest.raises(DriverError):
        real.close()
    real.close()
    assert names(fake).count("cuDevicePrimaryCtxRelease") == 1


def no_gpu_body(rank: int, size: int, store: dist.Store) -> Any:
    group = ranks.group(store, "first", rank, size)
    with pytest.raises(BringUpError) as caught:
        make(group, device=torch.device("cuda", rank))
    return caught.value.rank, caught.value.step, caught.value.cause, caught.value.advice


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has an NVIDIA driver")
def test_without_a_driver_the_error_says_so() -> None:
    told = ranks.values(ranks.launch(2, no_gpu_body))
    assert told[0] == told[1]
    rank, step, cause, hint = told[0]
    assert (rank, step) == (0, "probe")
    assert "no usable NVIDIA driver" in cause
    assert 'device="cpu"' in hint


def test_the_package_imports_without_cuda() -> None:
    code = "import sys; sys.modules['cuda'] = None; from mnnvl_ar.memory.cuda_driver import CudaDriver; CudaDriver()"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_errors_travel() -> None:
    error = pickle.loads(pickle.dumps(BringUpError(3, "import", "no.", "Do this.")))
    assert (error.rank, error.step, error.cause, error.advice) == (3, "import", "no.", "Do this.")
    assert str(error) == "symmetric memory bring-up failed on rank 3 at step 'import': no. Do this."


def test_what_a_thread_gives_back_disturbs_no_capture() -> None:
    """`parting.py` gives back in a thread of its own, while another one may capture."""
    modes = cuda.CUstreamCaptureMode
    real, fake = opened(cuThreadExchangeStreamCaptureMode=(modes.CU_STREAM_CAPTURE_MODE_GLOBAL,))
    with real.aside():
        real.release(7)
    assert fake.log == [
        ("cuThreadExchangeStreamCaptureMode", (modes.CU_STREAM_CAPTURE_MODE_RELAXED,)),
        ("cuMemRelease", (7,)),
        ("cuThreadExchangeStreamCaptureMode", (modes.CU_STREAM_CAPTURE_MODE_GLOBAL,)),
    ]
    real, fake = opened(cuThreadExchangeStreamCaptureMode=cuda.CUresult.CUDA_ERROR_NOT_SUPPORTED)
    with real.aside():
        real.release(7)
    assert names(fake) == ["cuThreadExchangeStreamCaptureMode", "cuMemRelease"]
