"""Ops with quantised outputs by every launch: grids, forms, PDL modes, graphs. The bits depend on none of that.

Every function is run by all ranks. What an op computes is in tests/common/cases/quantised.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import pytest
import torch

from common.cases.calls import Call
from common.cases.forms import MADE_FOR, SMALL, TOKENS, WIDE, WIDE_BYTES, WIDE_TOKENS
from common.cases.graph_nodes import captured, kernels_of
from common.cases.outputs import UNWRITTEN, check_out_form
from common.cases.quantised import KINDS, SCALES, Quantised, variants
from common.cases.rules import DEADLINES

FUSED = "all_reduce_rms_norm"


def check_grids(rank: Any, kind: str) -> None:
    """However many CTAs there are, and hold a row, in both strategies and every PDL mode."""
    turn = variants(kind)
    for max_ctas in (1, 8, 32):
        workspace = rank.new_workspace(
            max_tokens=64, hidden=8192, max_ctas=min(max_ctas, 64 // rank.world_size), deadline=5.0
        )
        calls = [
            Quantised(
                rank,
                kind,
                Call(FUSED, tokens, hidden, dtype, strategy=strategy, pdl=pdl, seed=tokens),
                with_norm=pdl % 2 == 0,
                options=next(turn),
            )
            for tokens, hidden, dtype in ((1, 8192, "bf16"), (17, 2880, "fp16"))
            for strategy in (0, 1)
            for pdl in (0, 1, 2)
        ]
        check_out_form(rank, workspace.handle, calls)
        workspace.close()


def check_forms(rank: Any, kind: str) -> None:
    """Of two virtual ranks: each form of a kernel (csrc/launch/form.h) is launched, by the names of the kernels."""
    calls = [(SMALL, Call(FUSED, tokens, 64, strategy=strategy)) for tokens in TOKENS for strategy in (0, 1)]
    calls += [(WIDE, Call(FUSED, tokens, WIDE_BYTES // 2, strategy=0)) for tokens in WIDE_TOKENS]
    turn, names, graphs = variants(kind), set[str](), []  # graphs: kept, as in forms.check_every_kernel
    for number, (options, call) in enumerate(calls):
        workspace = rank.workspace(**MADE_FOR, **options)
        prepared = Quantised(rank, kind, call, with_norm=number % 2 == 0, options=next(turn))
        graphs.append(
            captured(
                rank,
                lambda made=prepared, handle=workspace.handle: made.launch(handle),
                lambda graph: names.update(kernel.name for kernel in kernels_of(graph)),
            )
        )
        graphs[-1].replay()
        rank.synchronize()
        wrong = prepared.wrong()
        assert not wrong, "\n".join(wrong[:8])
        rank.barrier()
    assert len(names) == 7, sorted(names)


def check_arguments(rank: Any, kind: str) -> None:
    """Every scale, a weight in fp32 and a bias, each by itself, in fp16 and in both strategies."""
    workspace = rank.new_workspace(max_tokens=12, hidden=384, deadline=DEADLINES[rank.device.type])
    turn, scales = variants(kind), SCALES if KINDS[kind].scale else SCALES[:1]
    changes: list[tuple[dict[str, Any], float]] = [({"seed": i}, scale) for i, scale in enumerate(scales)]
    changes += [({"fp32_weight": True}, SCALES[0]), ({"weight_bias": 1.0}, SCALES[0])]
    calls = [
        Quantised(
            rank,
            kind,
            dataclasses.replace(Call(FUSED, 12, 264, "fp16", strategy=strategy), **change),
            scale,
            with_norm=strategy == 0,
            options=next(turn),
        )
        for strategy in (0, 1)
        for change, scale in changes
    ]
    check_out_form(rank, workspace.handle, calls)
    workspace.close()


def check_graphs(rank: Any, kind: str) -> None:
    """Captured calls of every kind of option, replayed in any order among eager ones; outputs are wiped in between."""
    workspace, turn = rank.new_workspace(max_tokens=40, hidden=4096, deadline=5.0), variants(kind)
    calls = [
        Quantised(
            rank,
            kind,
            Call(FUSED, tokens, hidden, dtype, strategy=strategy, pdl=pdl, seed=10 * tokens + pdl),
            options=next(turn),
        )
        for tokens, hidden, dtype in ((1, 4096, "bf16"), (33, 2880, "fp16"))
        for strategy in (0, 1)
        for pdl in (0, 2)
    ]
    check_out_form(rank, workspace.handle, calls)
    graphs = [
        (rank.capture(lambda chosen=chosen: [call.launch(workspace.handle) for call in chosen]), chosen)
        for chosen in (calls[:1], calls[1:4], calls[3:7], calls)
    ]
    draw = random.Random(7)
    for _ in range(12):
        for call in calls:
            wipe(call)
        rank.barrier()
        made = set[int]()
        for _ in range(8):
            if draw.random() < 0.6:
                graph, chosen = draw.choice(graphs)
                graph.replay()
            else:
                chosen = [draw.choice(calls)]
                chosen[0].launch(workspace.handle)
            made |= {calls.index(call) for call in chosen}
        rank.barrier()
        wrong = [line for n in sorted(made) for line in calls[n].wrong()]
        assert not wrong, "\n".join(wrong[:8])
        unmade = [n for n in range(len(calls)) if n not in made]
        assert all(calls[n].wrong() for n in unmade), "the control: what no call has written since is seen"
    workspace.close()


def wipe(call: Quantised) -> None:
    """As before its first launch."""
    for output in call.outputs.values():
        output.memory.fill_(UNWRITTEN)
    for each in (call.norm, call.prepared.residual_out):
        if each is not None:
            each.fill_(3.0)


def check_refused(rank: Any, kind: str) -> None:
    """Of a world of one: a captured call is launched with one cluster more, and with one less, than it was planned for.
    It says so, and leaves NaN in every output and in all that pads one; nothing else is written."""
    for strategy, change, options in itertools.product((0, 1), (1, -1), KINDS[kind].options[:2]):
        workspace = rank.new_workspace(max_tokens=64, hidden=4096, dtype=torch.bfloat16, deadline=5.0)
        call = Quantised(rank, kind, Call(FUSED, 5, 2880, strategy=strategy), options=options)
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            call.launch(workspace.handle)
        (kernel,) = kernels_of(graph)
        assert kernel.about.gridDimY > 1, "a cluster less is to be one"
        kernel.widen(change)
        graph.instantiate()
        graph.replay()
        rank.synchronize()
        assert call.is_poisoned(), (strategy, change, options, call.outputs, call.norm)
        with pytest.raises(RuntimeError, match="was launched in another shape than it was planned in"):
            workspace.check()
        workspace.close()
