"""Two small kernels: one that lets its successor start at once and never waits, and one that occupies SMs.

Compiled by NVRTC at run time and launched through the driver, since PyTorch offers no programmatic launches. Make a
`Kernels` before anything is captured.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from tools.driver import ask

SOURCE = rb"""
extern "C" __global__ void impatient() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

extern "C" __global__ void hog(unsigned long long ns) {
  unsigned long long now, began;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(began));
  do {
    __nanosleep(200);
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (now - began < ns);
}
"""
HOG_THREADS = 1024  # two CTAs fill an SM


class Kernels:
    """Of one device."""

    def __init__(self, device: torch.device) -> None:
        from cuda.bindings import driver

        torch.zeros(1, device=device)  # a context
        self.device = device
        with torch.cuda.device(device):
            self.module = ask(driver.cuModuleLoadData(_compiled(torch.cuda.get_device_capability(device))))
            self.functions = {
                name: ask(driver.cuModuleGetFunction(self.module, name.encode())) for name in ("impatient", "hog")
            }

    def impatient(self) -> None:
        """On the current stream. It starts as soon as its predecessor allows, and allows its own successor to start at
        once, which may then run while the kernel two before it still runs."""
        self._launch("impatient", blocks=4, threads=32, programmatic=True, arguments=0)

    def hog(self, blocks: int, ns: int) -> None:
        """On the current stream: `blocks` CTAs that run for `ns` nanoseconds; two for each SM fill the device."""
        import ctypes

        self._launch("hog", blocks, HOG_THREADS, programmatic=False, arguments=((ns,), (ctypes.c_ulonglong,)))

    def _launch(self, name: str, blocks: int, threads: int, *, programmatic: bool, arguments: Any) -> None:
        from cuda.bindings import driver

        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.hStream = driver.CUstream(init_value=torch.cuda.current_stream(self.device).cuda_stream)
        if programmatic:
            attribute, value = driver.CUlaunchAttribute(), driver.CUlaunchAttributeValue()
            value.programmaticStreamSerializationAllowed = 1
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value = value
            config.attrs = [attribute]
            config.numAttrs = 1
        ask(driver.cuLaunchKernelEx(config, self.functions[name], arguments, 0))


@functools.cache
def kernels(device: torch.device) -> Kernels:
    return Kernels(device)


@functools.cache
def _compiled(capability: tuple[int, int]) -> bytes:
    from cuda.bindings import nvrtc

    program = ask(nvrtc.nvrtcCreateProgram(SOURCE, b"kernels.cu", 0, [], []))
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}".encode()]
    (code,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(code) != 0:
        log = b" " * ask(nvrtc.nvrtcGetProgramLogSize(program))
        ask(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"NVRTC: {log.decode()}")
    binary: bytes = b" " * ask(nvrtc.nvrtcGetCUBINSize(program))
    ask(nvrtc.nvrtcGetCUBIN(program, binary))
    return binary
