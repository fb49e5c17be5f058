"""Small kernels of the tests' own: one that lets its successor start at once and never waits, and one that holds SMs.

Compiled on the spot by NVRTC and launched through the driver, since programmatic launches are not to be had from
PyTorch. Make a `Kernels` before anything is captured.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

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
        """On the current stream. It starts when its predecessor lets it, and lets its successor start, which then runs
        while its predecessor's predecessor may still run."""
        self._launch("impatient", blocks=4, threads=32, programmatic=True, arguments=0)

    def hog(self, blocks: int, ns: int) -> None:
        """On the current stream: CTAs that stay for `ns`; two for each SM fill the device."""
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


def ask(answer: Any) -> Any:
    """What a call of cuda.bindings returned, or an error."""
    code, *values = answer
    if int(code) != 0:
        raise RuntimeError(f"CUDA: {code!r}")
    return values[0] if len(values) == 1 else values or None


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
