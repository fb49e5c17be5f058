"""How a kernel of the twin comes onto a device (mnnvl_ar/dsl/launch.py), without a GPU: it has been built, or it is
compiled now, or it is refused by name.

CUDA's driver is a stand-in, which keeps what it is given to load and to launch. The compiler is the DSL itself, in a
process that has PyTorch too, as with the extra `[dsl]`. To see what `mnnvl_ar.dsl.load` gives the driver there:

    PYTHONPATH=.:tests python tests/unit/test_twin_loading.py SITE-PACKAGES-WITH-THE-DSL FOLDER-OF-CUBINS
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import site
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common import dsl
from common.virtual import VirtualGroup
from mnnvl_ar._library import named
from mnnvl_ar.dsl import all_reduce_rms_norm, build, constants, cubins, launch, load

pytestmark = pytest.mark.timeout(900)  # the DSL may have to be installed first, or waited for: tests/common/dsl.py
ROOT = Path(__file__).parent.parent.parent
EPILOGUE = "common.relu_squared:relu_squared"
PROCESSORS = 100


class Driver:
    """`cuda.bindings.driver`, as far as a kernel calls it. capturing: whether the current stream does."""

    CUresult = SimpleNamespace(CUDA_SUCCESS="success")
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK="most threads")
    CUlaunchAttributeID = SimpleNamespace(
        CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION="cluster",
        CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION="programmatic",
    )
    CUlaunchConfig = SimpleNamespace

    def __init__(self) -> None:
        self.loaded: list[tuple[bytes, str]] = []  # cubins, and the name of the kernel that was taken from each
        self.launched: list[tuple[Any, dict[str, int]]] = []  # configurations, and what the kernel is given, by name
        self.capturing, self.most_threads = False, constants.MOST_THREADS

    def CUlaunchAttribute(self) -> Any:
        return SimpleNamespace(value=SimpleNamespace(clusterDim=SimpleNamespace()))

    def cuModuleLoadData(self, cubin: bytes) -> tuple[str, bytes]:
        assert not self.capturing, "no capture allows it"
        return "success", cubin

    def cuModuleGetFunction(self, module: bytes, name: bytes) -> tuple[str, str]:
        self.loaded.append((module, name.decode()))
        return "success", name.decode()

    def cuFuncGetAttribute(self, attribute: str, function: str) -> tuple[str, int]:
        return "success", self.most_threads

    def cuOccupancyMaxActiveBlocksPerMultiprocessor(self, function: str, threads: int, shared: int) -> tuple[str, int]:
        return "success", 2

    def cuLaunchKernelEx(self, config: Any, function: str, arguments: Any, extra: int) -> tuple[str]:
        self.launched.append((config, dict(zip((*launch.ADDRESSES, *launch.NUMBERS), arguments[0], strict=True))))
        return ("success",)

    def _nothing(self, *_: Any) -> tuple[str, int]:
        return "success", 0

    cuInit = cuDeviceGet = cuDevicePrimaryCtxRetain = cuCtxPushCurrent = cuCtxPopCurrent = _nothing


def in_place_of_a_gpu(patch: pytest.MonkeyPatch, capability: tuple[int, int], folder: Path) -> Driver:
    """The driver that kernels then find, and nobody else: the DSL has the real one. `folder`: of cubins."""
    driver = Driver()

    class Kernel(launch.Kernel):
        def __init__(self, *given: Any) -> None:
            with patch.context() as only:
                only.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=driver))
                super().__init__(*given)

    patch.setattr(launch, "Kernel", Kernel)
    patch.setattr(cubins, "FOLDER", folder)
    patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    patch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=PROCESSORS))
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: driver.capturing)
    forget()
    return driver


def forget() -> None:
    launch._load.cache_clear()
    launch._architecture.cache_clear()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Driver]:
    """Of a GPU of compute capability 9.0; no kernel has been built, and none can be compiled."""

    def no_compiler(*_: Any) -> Any:
        raise AssertionError("compiled")

    monkeypatch.setattr(build, "compile_kernel", no_compiler)
    yield in_place_of_a_gpu(monkeypatch, (9, 0), tmp_path)
    forget()


def test_a_kernel_that_has_been_built_is_loaded_once(driver: Driver) -> None:
    cubins.keep(cubins.Built(b"of two", "two"), 2, "sm_90a", "", cubins.FOLDER)
    cubins.keep(cubins.Built(b"squared", "square"), 2, "sm_90a", EPILOGUE, cubins.FOLDER)
    for _ in range(2):
        load(0, 2)
        load("cuda:0", 2, EPILOGUE)
    assert driver.loaded == [(b"of two", "two"), (b"squared", "square")]
    with pytest.raises(AssertionError, match="compiled"):
        load(0, 4)


def test_a_kernel_that_has_not_is_compiled(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """For this device, ranks and epilogue; also where there is one of other sources."""
    asked: list[Any] = []

    def compiler(*what: Any) -> cubins.Built:
        asked.append(what)
        return cubins.Built(b"compiled", "new")

    monkeypatch.setattr(build, "compile_kernel", compiler)
    cubins.keep(cubins.Built(b"old", "old"), 2, "sm_90a", "", cubins.FOLDER)
    listed = json.loads((cubins.FOLDER / cubins.LIST).read_text())
    listed["one_shot-r2-sm_90a.cubin"]["sources"] = "of yesterday"
    (cubins.FOLDER / cubins.LIST).write_text(json.dumps(listed))
    load(0, 2)
    load(0, 8, EPILOGUE)
    load(0, 2)
    assert asked == [(2, "sm_90a", ""), (8, "sm_90a", EPILOGUE)]
    assert driver.loaded == [(b"compiled", "new")] * 2


def test_a_kernel_for_fewer_threads_is_refused(driver: Driver) -> None:
    """As ptxas would make one that takes too many registers."""
    cubins.keep(cubins.Built(b"cubin", "kernel"), 2, "sm_90a", "", cubins.FOLDER)
    driver.most_threads = 256
    with pytest.raises(launch.TwinUnavailable, match="the twin's kernel runs with 256 threads, wanted 512"):
        load(0, 2)


# ---- under capture


class OnGpu:
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda", 0)

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A call of three rows of 264 by rank 1 of 2, as the library's checks on the host have passed it."""
    group = VirtualGroup(2, 4, 264, torch.bfloat16, "cpu")
    x, weight = torch.ones(3, 264, dtype=torch.bfloat16), torch.ones(264)
    outs = torch.empty_like(x), torch.empty_like(x)
    told = named(torch.ops.mnnvl_ar._norm_call, x, x, weight, 1e-5, *outs, group.handles[1], strategy=0)
    monkeypatch.setattr(launch, "named", lambda *_, **__: told)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    yield lambda: all_reduce_rms_norm(OnGpu(x), x, weight, 1e-5, 0, out=outs)
    group.close()


def test_no_kernel_is_loaded_under_capture(driver: Driver, call: Any) -> None:
    """Not by a call, nor by `load`: it says what to do, and nothing is launched. Done so, the same call is launched."""
    cubins.keep(cubins.Built(b"cubin", "kernel"), 2, "sm_90a", "", cubins.FOLDER)
    said = "the twin's kernel is not loaded, and this stream captures: mnnvl_ar.dsl.load() first"
    driver.capturing = True
    for attempt in (call, lambda: load(0, 2)):
        with pytest.raises(launch.TwinUnavailable, match=re.escape(said)):
            attempt()
    assert (driver.loaded, driver.launched) == ([], [])
    driver.capturing = False
    load(0, 2)
    driver.capturing = True
    call()
    ((config, given),) = driver.launched
    assert (config.gridDimX, config.blockDimX, config.hStream) == (3, 32, 77)
    assert (given["rank"], given["tokens"], given["vectors"], given["peer_2"]) == (1, 3, 33, 0)
    assert driver.loaded == [(b"cubin", "kernel")]


# ---- compiled by the DSL


WANTED = {(9, 0): ("", EPILOGUE), (10, 0): ("",)}  # epilogues, by compute capability


def what_is_loaded(folder: Path) -> dict[str, list[str]]:
    """By architecture and epilogue: digest and kernel's name of what came to the driver. All is compiled here."""
    told: dict[str, list[str]] = {}
    assert "cutlass" not in sys.modules
    for capability, epilogues in WANTED.items():
        with pytest.MonkeyPatch.context() as patch:
            driver = in_place_of_a_gpu(patch, capability, folder)
            for epilogue in epilogues:
                load(0, 2, epilogue)
                cubin, kernel = driver.loaded[-1]
                name = cubins.file_name(2, constants.ARCHITECTURES[capability], epilogue)
                told[name] = [hashlib.sha256(cubin).hexdigest(), kernel]
            assert len(driver.loaded) == len(epilogues)
    assert "cutlass" in sys.modules
    return told


def test_what_is_compiled_here_is_what_is_built_elsewhere(tmp_path: Path) -> None:
    """The same bytes, in a process with PyTorch that launches them, as from `build.py` in one without."""
    try:
        python = dsl.python()
    except dsl.NoDsl as why:
        pytest.skip(str(why))
    code = "import sys, sysconfig; print(sys.implementation.cache_tag, sysconfig.get_path('platlib'))"
    tag, packages = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    if tag != sys.implementation.cache_tag:
        pytest.skip(f"the DSL is there for {tag}, and PyTorch for {sys.implementation.cache_tag}")
    command = [sys.executable, __file__, packages, str(tmp_path / "nothing")]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    got = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert got.returncode == 0, got.stdout + got.stderr
    assert not (tmp_path / "nothing").exists(), "nothing is kept where no one asked for it"
    for epilogue in ("", EPILOGUE):
        dsl.build(tmp_path, "--ranks", "2", *(["--epilogue", epilogue, "--archs", "sm_90a"] if epilogue else []))
    built = {
        name: [hashlib.sha256((tmp_path / name).read_bytes()).hexdigest(), entry["kernel"]]
        for name, entry in cubins.listed(tmp_path).items()
    }
    assert json.loads(got.stdout) == built
    assert len({digest for digest, _ in built.values()}) == 3, "each of its own"


if __name__ == "__main__":
    site.addsitedir(sys.argv[1])
    print(json.dumps(what_is_loaded(Path(sys.argv[2]))))
