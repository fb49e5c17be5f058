"""What a call finds that comes to addresses whose memory has been given back. Control: without what stands in there,
the process ends."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from common.cases import asleep
from common.ranks import TEST_LIBRARY, RankPool, RanksFailed
from mnnvl_ar._library import ops
from mnnvl_ar.handle import Layout, create
from mnnvl_ar.memory import Request, SymmetricMemory, allocate
from mnnvl_ar.tuning import Table

needs_test_build = pytest.mark.skipif(not TEST_LIBRARY.exists(), reason="needs the test build: make test-build")


@needs_test_build
@pytest.mark.parametrize("how", asleep.WAYS)
def test_a_call_ends_with_nan_and_a_name(how: str) -> None:
    with RankPool(2, library=TEST_LIBRARY) as pool:
        pool.run(asleep.check_late_call, how, True)


@needs_test_build
@pytest.mark.parametrize("how", ["sleep", "close"])
def test_so_it_does_after_another_fault_that_was_told(how: str) -> None:
    with RankPool(2, library=TEST_LIBRARY) as pool:
        pool.run(asleep.check_late_call, how, True, True)


@needs_test_build
@pytest.mark.parametrize("how", ["sleep", "close"])
def test_control_without_it_the_process_ends(how: str) -> None:
    pool = RankPool(2, library=TEST_LIBRARY)
    with pytest.raises(RanksFailed, match="exit code -11"):
        pool.run(asleep.check_late_call, how, False)
    pool.discard()


def made(deadline: float) -> tuple[SymmetricMemory, Layout, int]:
    """Memory of a group of one, and a handle that does not know what becomes of it, as a graph does not."""
    group = dist.ProcessGroup(dist.HashStore(), 0, 1)
    layout, cpu = Layout(1 << 20), torch.device("cpu")
    memory = allocate(group, Request(layout.nbytes, layout.fills, layout.probe_offset, cpu))
    return memory, layout, create(memory.pointers, 0, cpu, 1 << 20, Table(), deadline=deadline)


def test_the_call_itself_says_so() -> None:
    memory, layout, handle = made(deadline=60.0)
    x, out = torch.ones(3, 64), torch.zeros(3, 64)
    assert torch.equal(ops.all_reduce(x, handle), x)
    memory.stand_in = lambda: layout.asleep
    memory.drop()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"all_reduce\(\[3, 64\], float32, ..._shot\) ran, as part of a CUDA"):
            ops.all_reduce_out(x, out, handle)
    assert bool(out.isnan().all())
    ops._workspace_close(handle, True)
    memory.close()


def test_control_without_the_mark_a_call_is_none_the_wiser() -> None:
    memory, layout, handle = made(deadline=1.0)
    memory.stand_in = lambda: layout.asleep[:-1]
    memory.drop()
    ops.all_reduce(torch.ones(3, 64), handle)
    ops._workspace_close(handle, True)
    memory.close()
