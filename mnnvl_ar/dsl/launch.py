"""Launches the twin on a library's workspace, through cuda.bindings: no DSL is needed where a kernel has been built.

Contract
  * The checks are the library's own (torch.ops.mnnvl_ar._norm_call), and so is the place of the call: its number, its
    pieces, what it signs. Then what the twin does not have is refused, before anything is launched.
  * The grid is never larger than what the device holds at once (rule R5), nor than the workspace's bound.
  * A kernel is compiled or read at its first call on a device, or by `load`; under capture it has to be there already.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any

import torch

from mnnvl_ar._library import named, ops
from mnnvl_ar.dsl import build, constants, cubins
from mnnvl_ar.errors import MnnvlArError

# What one_shot() takes, in its order.
ADDRESSES = (
    "x",
    "residual",
    "norm_out",
    "residual_out",
    "weight",
    "block",
    "record",
    "orders",
    "slot_bytes",
    *(f"peer_{i}" for i in range(1, 8)),
)
NUMBERS = (
    "rank",
    "tokens",
    "vectors",
    "first_token",
    "call_tokens",
    "description",
    "eps",
    "weight_bias",
    "weight_is_fp32",
    "number",
    "trigger_early",
)
TYPES = (*[ctypes.c_uint64] * len(ADDRESSES), *[ctypes.c_uint32] * len(NUMBERS))
PIECE = ("tokens", "first_token", "call_tokens", "description", "number", "trigger_early", "programmatic")

_one_at_a_time = threading.Lock()


class TwinUnavailable(MnnvlArError):
    """The twin has no kernel for this; the text says for what it has some."""


def all_reduce_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    workspace: int,
    *,
    weight_bias: float = 0.0,
    strategy: int = -1,
    pdl: int = -1,
    tag: int = 0,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    epilogue: str = "",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`mnnvl_ar.all_reduce_rms_norm` by the twin: the same arguments, checks and bits, eager and captured.

    x:        [..., hidden] of bf16 on a GPU of compute capability 9.0 or 10.0; hidden a multiple of 8 up to 8192
    out:      (norm_out, residual_out), as `mnnvl_ar.all_reduce_rms_norm_out` takes them; without, two new tensors
    epilogue: "module:function", another one than the norm's own (docs/twin.md). To peers the call is the same, so ranks
              with different ones are not told: give each a `tag`
    The workspace has 2, 4 or 8 ranks and unicast transport, and the call goes by one-shot, by `strategy` or by what the
    workspace chooses. Peers may call the twin or the library.

    Errors: those of the library, and `TwinUnavailable`, which says what there is; before anything is launched.
    Source: csrc/kernels/one_shot.cuh; docs/protocol.md and docs/numerics.md.
    """
    options = {"weight_bias": weight_bias, "strategy": strategy, "pdl": pdl, "tag": tag}
    call = named(ops._norm_call, x, residual, weight, eps, *(out or (None, None)), workspace, **options)
    blocks, figures = call["blocks"], call["pieces"]
    pieces = [dict(zip(PIECE, figures[i : i + len(PIECE)], strict=True)) for i in range(0, len(figures), len(PIECE))]
    _refuse_what_is_missing(x, call, pieces)
    norm_out, residual_out = out or (torch.empty_like(x), torch.empty_like(x))
    if not pieces:
        return norm_out, residual_out
    kernel = _kernel(x.device.index, len(blocks), epilogue)
    hidden = x.shape[-1]
    given = {
        "weight": weight.data_ptr(),
        "block": blocks[-1],
        **{f"peer_{i + 1}": block for i, block in enumerate(blocks[:-1])},
        **{name: call[name] for name in ("record", "orders", "slot_bytes")},
        **{name: call[name] for name in ("rank", "eps", "weight_bias", "weight_is_fp32")},
        "vectors": hidden // 8,
    }
    rows = {"x": x, "residual": residual, "norm_out": norm_out, "residual_out": residual_out}
    stream = torch.cuda.current_stream(x.device).cuda_stream
    most, sharers, processors = call["max_ctas"] or constants.MAX_GRID, call["sharers"], call["processors"]
    for piece in pieces:
        begin = piece["first_token"] * hidden * x.element_size()
        given |= {name: tensor.data_ptr() + begin for name, tensor in rows.items()} | piece
        ctas = min(piece["tokens"], kernel.room(hidden // 8, sharers, processors, most))
        kernel.launch(given, ctas, bool(piece["programmatic"]), stream)
    return norm_out, residual_out


def load(device: torch.device | str | int, world_size: int, epilogue: str = "") -> None:
    """Reads the kernel for a device and a world size, or compiles it, ahead of its first call: a capture could not."""
    index = torch.device(device).index if not isinstance(device, int) else device
    _kernel(torch.cuda.current_device() if index is None else index, world_size, epilogue)


def _refuse_what_is_missing(x: torch.Tensor, call: dict[str, Any], pieces: list[dict[str, int]]) -> None:
    """`TwinUnavailable`, naming what was asked for and what there is."""
    ranks, hidden = len(call["blocks"]), x.shape[-1]
    if x.dtype != torch.bfloat16:
        raise TwinUnavailable(f"x: is {x.dtype}, the twin has torch.bfloat16 alone")
    if hidden > constants.MOST_HIDDEN:
        raise TwinUnavailable(f"x: rows of {hidden} elements, the twin has rows of up to {constants.MOST_HIDDEN}")
    if ranks not in constants.WORLD_SIZES:
        sizes = ", ".join(map(str, constants.WORLD_SIZES))
        raise TwinUnavailable(f"workspace: has {ranks} ranks, the twin has kernels for {sizes}")
    if call["multicast"]:
        raise TwinUnavailable("workspace: uses multicast, the twin has unicast alone; make it with transport='unicast'")
    if any(piece["description"] >> constants.STRATEGY_AT & 1 for piece in pieces):
        raise TwinUnavailable(
            "strategy: this call goes by two-shot, the twin has one-shot alone: strategy=0 on all ranks"
        )
    if x.device.type != "cuda":
        raise TwinUnavailable(f"x: is on {x.device}, the twin runs on GPUs alone: {_architectures()}")
    _architecture(x.device.index)


def _architectures() -> str:
    listed = (f"{name} for compute capability {major}.{minor}" for (major, minor), name in _ARCHITECTURES)
    return ", ".join(listed)


_ARCHITECTURES = tuple(constants.ARCHITECTURES.items())


@functools.cache
def _architecture(device: int) -> str:
    capability = torch.cuda.get_device_capability(device)
    found = constants.ARCHITECTURES.get(capability)
    if found is None:
        major, minor = capability
        raise TwinUnavailable(f"x: is on a GPU of compute capability {major}.{minor}, the twin has {_architectures()}")
    return found


def _kernel(device: int, ranks: int, epilogue: str) -> Kernel:
    with _one_at_a_time:
        return _load(device, ranks, epilogue)


@functools.cache
def _load(device: int, ranks: int, epilogue: str) -> Kernel:
    architecture = _architecture(device)
    if torch.cuda.is_current_stream_capturing():
        raise TwinUnavailable("the twin's kernel is not loaded, and this stream captures: mnnvl_ar.dsl.load() first")
    built = cubins.find(ranks, architecture, epilogue, cubins.FOLDER)
    if built is None:
        try:
            built = build.compile_kernel(ranks, architecture, epilogue)
        except build.DslMissing as why:
            name, folder = cubins.file_name(ranks, architecture, epilogue), cubins.FOLDER
            there = ", ".join(sorted(cubins.listed(folder))) or "none"
            raise TwinUnavailable(
                f"no {name} of these sources in {folder} (there: {there}), and none can be compiled here: {why}. "
                "Build it elsewhere: python -m mnnvl_ar.dsl.build"
            ) from None
    return Kernel(built, device)


class Kernel:
    """One kernel on one device."""

    def __init__(self, built: cubins.Built, device: int) -> None:
        from cuda.bindings import driver

        self._cuda: Any = driver
        self._call("cuInit", 0)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._call("cuDeviceGet", device))
        properties = torch.cuda.get_device_properties(device)
        self._processors = int(properties.multi_processor_count)
        self._rooms: dict[int, int] = {}  # CTAs that a processor holds at once, by threads of a CTA
        with _Current(self):
            self._module = self._call("cuModuleLoadData", built.cubin)
            self._function = self._call("cuModuleGetFunction", self._module, built.kernel.encode())
            # Asking loads it, which a capture could not.
            most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK
            threads = self._call("cuFuncGetAttribute", most, self._function)
        if threads < constants.MOST_THREADS:
            raise TwinUnavailable(f"the twin's kernel runs with {threads} threads, wanted {constants.MOST_THREADS}")

    def room(self, vectors: int, sharers: int, processors: int, most: int) -> int:
        """CTAs of a call with such rows, at most: this workspace's share of what the device holds at once, or so many
        processors of it (0: all)."""
        threads = constants.threads_for(vectors)
        if threads not in self._rooms:
            with _Current(self):
                resident = self._call("cuOccupancyMaxActiveBlocksPerMultiprocessor", self._function, threads, 0)
            self._rooms[threads] = resident
        there = min(processors, self._processors) if processors else self._processors
        return max(1, min(self._rooms[threads] * there // max(1, sharers), most, constants.MAX_GRID))

    def launch(self, given: dict[str, int], ctas: int, programmatic: bool, stream: int) -> None:
        """`given`: what one_shot() takes, by name; peers that are not there are 0."""
        cuda = self._cuda
        cluster, early = cuda.CUlaunchAttribute(), cuda.CUlaunchAttribute()
        cluster.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        cluster.value.clusterDim.x = cluster.value.clusterDim.y = cluster.value.clusterDim.z = 1
        early.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        config = cuda.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = ctas, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = constants.threads_for(given["vectors"]), 1, 1
        config.sharedMemBytes = 0
        config.hStream = stream
        config.attrs = [cluster, early] if programmatic else [cluster]
        config.numAttrs = len(config.attrs)
        values = tuple(given.get(name, 0) for name in (*ADDRESSES, *NUMBERS))
        with _Current(self):
            self._call("cuLaunchKernelEx", config, self._function, (values, TYPES), 0)

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *results = getattr(self._cuda, name)(*arguments)
        if error != self._cuda.CUresult.CUDA_SUCCESS:
            raise MnnvlArError(f"mnnvl_ar.dsl: {name}: {error.name}")
        return results[0] if results else None


class _Current:
    """The device's primary context, the one PyTorch uses, current in this thread."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def __enter__(self) -> None:
        self._kernel._call("cuCtxPushCurrent", self._kernel._context)

    def __exit__(self, *_: object) -> None:
        self._kernel._call("cuCtxPopCurrent")
