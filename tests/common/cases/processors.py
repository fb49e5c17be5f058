"""Contexts: calls where a stream has fewer SMs than the device, and threads that are in another context, or in none."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from common.cases.calls import Call, Prepared
from common.streams import stream_aside

LEAST = 16  # SMs that are asked for; the driver gives as many or some more
CALLS = [Call(tokens=t, hidden=4096, strategy=s, out="E", seed=t) for t in (1, 33, 512) for s in (0, 1)]
SIZES = {"max_tokens": 512, "hidden": 4096, "dtype": torch.bfloat16, "deadline": 5.0}


class Green:
    """A green context of a rank's GPU, and a stream of it."""

    def __init__(self, rank: Any) -> None:
        from cuda.bindings import driver as cuda

        self._cuda = cuda
        index = rank.device.index
        torch.zeros(1, device=rank.device)
        device = self._ask(cuda.cuDeviceGet(index))
        kind = cuda.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        whole = self._ask(cuda.cuDeviceGetDevResource(device, kind))
        groups, *_ = self._ask(cuda.cuDevSmResourceSplitByCount(1, whole, 0, LEAST))
        self.processors, self.of_device = int(groups[0].sm.smCount), int(whole.sm.smCount)
        describing = self._ask(cuda.cuDevResourceGenerateDesc([groups[0]], 1))
        flags = cuda.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM.value
        self._context = self._ask(cuda.cuGreenCtxCreate(describing, device, flags))
        flags = cuda.CUstream_flags.CU_STREAM_NON_BLOCKING.value
        made = self._ask(cuda.cuGreenCtxStreamCreate(self._context, flags, 0))
        self.stream = torch.cuda.ExternalStream(int(made), device=rank.device)

    def _ask(self, answer: tuple[Any, ...]) -> Any:
        status, *results = answer
        assert status == self._cuda.CUresult.CUDA_SUCCESS, status
        return results[0] if len(results) == 1 else results

    def is_current(self) -> bool:
        context = self._ask(self._cuda.cuCtxFromGreenCtx(self._context))
        return int(self._ask(self._cuda.cuCtxGetCurrent())) == int(context)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        context = self._ask(self._cuda.cuCtxFromGreenCtx(self._context))
        self._ask(self._cuda.cuCtxPushCurrent(context))
        try:
            yield
        finally:
            self._ask(self._cuda.cuCtxPopCurrent())


def check_on(rank: Any, workspace: Any, stream: Any) -> None:
    """Calls on that stream, every bit."""
    for call in CALLS:
        prepared = Prepared(rank, call)
        rank.barrier()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            prepared.launch(workspace.handle)
        stream.synchronize()
        assert prepared.wrong() == []


def check_refused(rank: Any) -> None:
    """Made for the whole device, called where there is less: refused before anything is launched. Elsewhere it is right
    as ever. The control: a workspace that counts on nothing takes the call."""
    green, workspace = Green(rank), rank.new_workspace(**SIZES)
    assert workspace._memory.processors == green.of_device
    assert "SMs" not in workspace.transport_reason
    prepared = Prepared(rank, CALLS[0])
    less = f"the current stream is of a green context that has {green.processors};"
    says = f"counts on {green.of_device} SMs, and {less}"
    with torch.cuda.stream(green.stream), pytest.raises(RuntimeError, match=says):
        prepared.launch(workspace.handle)
    workspace.check()
    check_on(rank, workspace, stream_aside(rank.device))
    torch.ops.mnnvl_ar._workspace_processors(workspace.handle, 0)
    rank.barrier()
    with torch.cuda.stream(green.stream):
        prepared.launch(workspace.handle)
    green.stream.synchronize()
    assert prepared.wrong() == []
    rank.barrier()
    workspace.close()


def check_made_there(rank: Any) -> None:
    """Made in the green context of one rank: all go by what it has, there and elsewhere, and every bit is right."""
    green, last = Green(rank), rank.rank == rank.world_size - 1
    with green.current() if last else contextlib.nullcontext():
        workspace = rank.new_workspace(**SIZES)
    assert workspace._memory.processors == green.processors
    assert f"; {green.processors} of {green.of_device} SMs" in workspace.transport_reason
    check_on(rank, workspace, green.stream)
    check_on(rank, workspace, stream_aside(rank.device))
    rank.barrier()
    workspace.close()


def check_the_context_stays(rank: Any) -> None:
    """Making a workspace, its calls and its end leave the thread in the context that it was in: a second workspace
    counts what the first one did."""
    green = Green(rank)
    with green.current():
        first = rank.new_workspace(**SIZES)
        check_on(rank, first, green.stream)
        first.check()
        second = rank.new_workspace(**SIZES)
        assert second._memory.processors == first._memory.processors == green.processors
        rank.barrier()
        first.close()
        assert green.is_current()
        second.close()


def check_a_thread_without_a_device(rank: Any, index: int) -> str:
    """A thread that never chose a device calls a workspace of that GPU, the same call twice: no context stays with the
    thread, and none comes to be on the first GPU where that is another one. The control there: what setting the device
    back does. Returns why it could not be tried, or nothing."""
    from cuda.bindings import driver as cuda
    from cuda.bindings import runtime

    import mnnvl_ar

    def is_active() -> bool:
        status, _, active = cuda.cuDevicePrimaryCtxGetState(0)
        assert status == cuda.CUresult.CUDA_SUCCESS, status
        return bool(active)

    there = torch.device("cuda", index)
    x = torch.ones(2, 4096, dtype=torch.bfloat16, device=there)
    if index != 0 and is_active():
        return "PyTorch has made a context on the first GPU"
    workspace = mnnvl_ar.Workspace(rank.group, **SIZES, device=there)
    outs = [torch.zeros_like(x) for _ in range(2)]
    torch.cuda.synchronize(there)
    found: list[Any] = []

    def call() -> None:
        for out in outs:
            mnnvl_ar.ops.all_reduce_out(x, out, workspace.handle)
            found.append(int(cuda.cuCtxGetCurrent()[1]))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    torch.cuda.synchronize(there)
    assert all(torch.equal(out, x) for out in outs)
    assert found == [0, 0]
    workspace.close()
    if index != 0:
        assert not is_active()
        runtime.cudaSetDevice(0)
        assert is_active()
    return ""
