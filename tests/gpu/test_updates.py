"""cudaGraphExecUpdate: an executable graph takes the parameters of another one. Right bits, or an error; never a hang.

The driver may leave a kernel's cluster size as it was (docs/decisions/0019-launch-shape-check.md), so calls of two
sizes whose launch shapes differ in it cannot be exchanged. Each case has a process of its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from common.ranks import RankPool

HIDDEN = 4096


@pytest.mark.parametrize("strategy", [0, 1], ids=["one_shot", "two_shot"])
@pytest.mark.parametrize(
    ("tokens", "max_ctas", "same_cluster"),
    [((4, 8), None, True), ((32, 64), 192, False)],
    ids=["same-cluster", "other-cluster"],
)
def test_update(strategy: int, tokens: tuple[int, int], max_ctas: int | None, same_cluster: bool) -> None:
    with RankPool(1, "cuda") as pool:
        (said,) = pool.run(check_updates, strategy, tokens, max_ctas, timeout=40)
    if same_cluster:
        assert said == "right"
    else:
        assert said == "right" or "another shape" in said, said


@pytest.mark.parametrize("modes", [("off", "early"), ("early", "off"), ("off", "late")], ids="-to-".join)
def test_update_of_the_pdl_mode(modes: tuple[str, str]) -> None:
    with RankPool(1, "cuda") as pool:
        (said,) = pool.run(check_updates_of_the_mode, modes, timeout=40)
    if said != "right":
        pytest.skip(said)


def check_updates_of_the_mode(rank: Any, modes: tuple[str, str]) -> str:
    """What a call is told of its edge must be the edge that it has: behind a plain one it loads x before it waits. So x
    is written by what stands before the call, and holds something else until then."""
    from cuda.bindings import runtime

    from mnnvl_ar import Pdl, ops
    from tools.driver import ask

    tokens = 512
    workspace = rank.new_workspace(max_tokens=tokens, hidden=HIDDEN, dtype=torch.bfloat16, deadline=5.0)
    draw = torch.Generator(device=rank.device).manual_seed(3)
    source = torch.randn(tokens, HIDDEN, generator=draw, device=rank.device).to(torch.bfloat16)
    x, outs = torch.empty_like(source), [torch.empty_like(source) for _ in range(3)]
    stale = torch.full_like(source, 7.0)

    def capture(mode: str) -> tuple[Any, Any]:
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            for out in outs:
                x.copy_(stale)
                x.copy_(source)
                ops.all_reduce_out(x, out, workspace.handle, pdl=int(Pdl[mode.upper()]))
        return graph, runtime.cudaGraph_t(init_value=graph.raw_cuda_graph())

    graphs = [capture(mode) for mode in modes]
    executable = ask(runtime.cudaGraphInstantiate(graphs[0][1], 0))
    stream = runtime.cudaStream_t(init_value=torch.cuda.current_stream().cuda_stream)
    for which in (0, 1, 1, 0, 1):
        code, _ = runtime.cudaGraphExecUpdate(executable, graphs[which][1])
        if int(code) != 0:
            return "another topology, says CUDA"
        for _ in range(20):
            for out in outs:
                out.zero_()
            ask(runtime.cudaGraphLaunch(executable, stream))
            for out in outs:
                assert torch.equal(out, source), f"{modes[which]}: wrong bits, and no error"
        workspace.check()
    return "right"


def check_updates(rank: Any, strategy: int, tokens: tuple[int, int], max_ctas: int | None) -> str:
    """ "right", or what the library or CUDA says. Bits that are wrong without a word fail."""
    from cuda.bindings import runtime

    from mnnvl_ar import MnnvlArError, ops, reference
    from tools.driver import ask

    workspace = rank.new_workspace(max_tokens=512, hidden=HIDDEN, dtype=torch.bfloat16, max_ctas=max_ctas, deadline=5.0)
    draw = torch.Generator(device=rank.device).manual_seed(3)
    weight = torch.ones(HIDDEN, dtype=torch.bfloat16, device=rank.device)

    def capture(count: int) -> tuple[Any, ...]:
        x, residual = (
            torch.randn(count, HIDDEN, generator=draw, device=rank.device).to(torch.bfloat16) for _ in range(2)
        )
        norm, z = torch.empty_like(x), torch.empty_like(x)
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            for _ in range(3):
                ops.all_reduce_rms_norm_out(x, residual, weight, 1e-6, norm, z, workspace.handle, strategy=strategy)
        raw = runtime.cudaGraph_t(init_value=graph.raw_cuda_graph())
        want = reference.all_reduce_rms_norm([x.cpu()], residual.cpu(), weight.cpu(), 1e-6)
        return (graph, x, residual), raw, (norm, z), want

    buckets = [capture(count) for count in tokens]
    executable = ask(runtime.cudaGraphInstantiate(buckets[0][1], 0))
    stream = runtime.cudaStream_t(init_value=torch.cuda.current_stream().cuda_stream)
    for which in (1, 0, 0, 1, 0):
        _, raw, outputs, want = buckets[which]
        code, _ = runtime.cudaGraphExecUpdate(executable, raw)
        if int(code) != 0:
            return "another shape, says CUDA"
        for out in outputs:
            out.zero_()
        code, *_ = runtime.cudaGraphLaunch(executable, stream)
        if int(code) != 0 or int(runtime.cudaStreamSynchronize(stream)[0]) != 0:
            return "another shape, says CUDA at the launch"  # this process is of no more use then
        try:
            workspace.check()
        except MnnvlArError as error:
            assert all(bool(out.isnan().all()) for out in outputs), "outputs of a call that failed must be NaN"
            return str(error)
        for got, wanted in zip(outputs, want, strict=True):
            assert torch.equal(got.cpu(), wanted), f"bucket {which}: wrong bits, and no error"
    return "right"
