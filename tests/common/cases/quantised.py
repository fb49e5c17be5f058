"""Ops with quantised outputs: every bit against the reference of norm as stored, on any ranks, in both strategies.

A kind of output is a `Kind`: its op, its outputs, and what they should hold. Every function is run by all ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config

from common.cases.calls import ALIASING, Call, Prepared, wanted
from common.cases.outputs import UNWRITTEN, Output, check_functional_form, check_out_form
from common.cases.rules import DEADLINES, launch_that_breaks

SHAPES = ((1, 64), (3, 264), (7, 2880), (40, 4096), (300, 264), (2, 8192))
SCALES = (0.37, 0.25, 3e-3, -2.0, 0.0, 1e-40, float("inf"), float("nan"))


@dataclasses.dataclass(frozen=True)
class Kind:
    """An op. `outputs(call)` are (name, shape, dtype) of what is not like x; `of_norm(norm, scale)` what they should
    hold; `takes_scale`: whether the op is given one."""

    op: str
    outputs: Callable[[Call], list[tuple[str, tuple[int, ...], torch.dtype]]]
    of_norm: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]
    takes_scale: bool = False


def _codes(call: Call) -> tuple[str, tuple[int, ...], torch.dtype]:
    return "quant_out", call.shape, torch.float8_e4m3fn


def _static(norm: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
    from mnnvl_ar import reference

    return (reference.static_fp8(norm, scale),)


def _per_token(norm: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, ...]:
    from mnnvl_ar import reference

    return reference.per_token_fp8(norm)


KINDS = {
    "static_fp8": Kind("all_reduce_rms_norm_static_fp8", lambda call: [_codes(call)], _static, takes_scale=True),
    "per_token_fp8": Kind(
        "all_reduce_rms_norm_per_token_fp8",
        lambda call: [_codes(call), ("scale_out", (call.tokens, 1), torch.float32)],
        _per_token,
    ),
}


class Quantised:
    """A call of an op's `_out` form, its outputs between guards. `with_norm`: whether norm is stored too."""

    def __init__(self, rank: Any, kind: str, call: Call, scale: float = SCALES[0], with_norm: bool = True) -> None:
        self.rank, self.call, self.kind, self.with_norm = rank, call, KINDS[kind], with_norm
        self.prepared = Prepared(rank, dataclasses.replace(call, out=call.out or "E"))
        self.scale = torch.tensor([scale], device=rank.device)
        self.outputs = {name: Output(shape, dtype, rank.device) for name, shape, dtype in self.kind.outputs(call)}
        self.norm = self.prepared.norm_out if with_norm else None
        self.fresh: tuple[torch.Tensor, ...] = ()

    @property
    def _given(self) -> tuple[Any, ...]:
        p = self.prepared
        scale = (self.scale,) if self.kind.takes_scale else ()
        return (p.x, p.residual, p.weight, self.call.eps, *scale)

    @property
    def _choice(self) -> dict[str, Any]:
        return {"weight_bias": self.call.weight_bias, "strategy": self.call.strategy, "pdl": self.call.pdl}

    def launch(self, handle: int) -> None:
        out = getattr(torch.ops.mnnvl_ar, f"{self.kind.op}_out")
        quant = [output.tensor for output in self.outputs.values()]
        out(*self._given, *quant, self.norm, self.prepared.residual_out, handle, **self._choice)

    def launch_fresh(self, handle: int) -> None:
        """The functional form. The inputs are as they were."""
        op = getattr(torch.ops.mnnvl_ar, self.kind.op)
        self.fresh = op(*self._given, handle, with_norm=self.with_norm, **self._choice)

    def _wanted(self) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor]:
        norm, residual_out = wanted(self.prepared.call, self.rank.world_size)
        return norm, self.kind.of_norm(norm, self.scale.cpu()), residual_out

    def wrong(self) -> list[str]:
        from mnnvl_ar.reference import same_bits

        norm, quant, residual_out = self._wanted()
        pairs = [("residual_out", self.prepared.residual_out, residual_out)]
        pairs += [(name, got.tensor, want) for (name, got), want in zip(self.outputs.items(), quant, strict=True)]
        pairs += [("norm_out", self.norm, norm)] if self.norm is not None else []
        says = f"{self.kind.op} of {self.call}, scale {self.scale.item()}, rank {self.rank.rank}"
        found = [f"{says}: {name} differs" for name, got, want in pairs if not same_bits(got, want)]
        found += [f"{says}: {name} is overrun" for name, output in self.outputs.items() if output.is_overrun()]
        if self.norm is None and self.call.out == "" and not self.prepared.norm_out.eq(3.0).all():
            found.append(f"{says}: a norm that was not wanted was written")
        return found

    def wrong_when_fresh(self) -> list[str]:
        from mnnvl_ar.reference import same_bits

        norm, quant, residual_out = self._wanted()
        pairs = zip(self.fresh, (*quant, norm if self.with_norm else norm.new_empty(0), residual_out), strict=True)
        return [
            f"{self.call}: fresh output {i} differs" for i, (got, want) in enumerate(pairs) if not same_bits(got, want)
        ]

    def is_poisoned(self) -> bool:
        """Every output is NaN, or has a scale that is, and nothing beside it is written."""
        codes = all(bool(o.tensor.float().isnan().all()) and not o.is_overrun() for o in self.outputs.values())
        norm = self.norm is None or bool(self.norm.isnan().all())
        return codes and norm and bool(self.prepared.residual_out.isnan().all())


def check_outputs(rank: Any, kind: str) -> None:
    """Right bits of every output, in both strategies, with and without norm, of every dtype, and of many sizes."""
    workspace = rank.new_workspace(max_tokens=300, hidden=4096, deadline=DEADLINES[rank.device.type])
    calls = [
        Quantised(
            rank, kind, Call("all_reduce_rms_norm", tokens, hidden, dtype, strategy=strategy, seed=seed), with_norm=n
        )
        for seed, (tokens, hidden) in enumerate(SHAPES)
        for dtype in ("bf16", "fp16")
        for strategy in (0, 1)
        for n in (False, True)
    ]
    check_out_form(rank, workspace.handle, calls)
    check_functional_form(rank, workspace.handle, [*calls[:4], *calls[-2:]])
    workspace.close()


def check_arguments(rank: Any, kind: str) -> None:
    """Every scale, weight, bias, and aliasing of the outputs that are like x, and leading dimensions."""
    workspace = rank.new_workspace(max_tokens=12, hidden=264, deadline=DEADLINES[rank.device.type])
    base = Call("all_reduce_rms_norm", 12, 264, "bf16", strategy=0)
    calls = [Quantised(rank, kind, dataclasses.replace(base, seed=i), scale) for i, scale in enumerate(SCALES)]
    calls += [Quantised(rank, kind, dataclasses.replace(base, out=out)) for out in ALIASING]
    calls.append(Quantised(rank, kind, dataclasses.replace(base, fp32_weight=True, weight_bias=1.0)))
    calls.append(Quantised(rank, kind, dataclasses.replace(base, lead=(3, 4))))
    calls.append(Quantised(rank, kind, dataclasses.replace(base, tokens=0)))
    calls.append(Quantised(rank, kind, base))
    calls[-1].scale = calls[-1].scale.squeeze()  # no dimensions
    check_out_form(rank, workspace.handle, calls)
    workspace.close()


def check_pieces(rank: Any, kind: str) -> None:
    """A call larger than a slot: outputs that are not like x go on where the piece before ended."""
    rows, vectors = 5, 33
    workspace = rank.new_workspace(
        max_tokens=40,
        hidden=264,
        dtype=torch.bfloat16,
        max_bytes=16384 + 3 * rows * (rank.world_size + vectors) * 2 * 16,
    )
    for strategy in (0, 1):
        choice = torch.ops.mnnvl_ar._workspace_choice(workspace.handle, 40, 528, strategy)
        assert choice[5] > 1, "pieces"
        check_out_form(
            rank, workspace.handle, [Quantised(rank, kind, Call("all_reduce_rms_norm", 40, 264, strategy=strategy))]
        )
    workspace.close()


def check_refusals(rank: Any, kind: str) -> None:
    """What is wrong with a tensor is refused, naming it, before anything is launched."""
    workspace = rank.new_workspace(max_tokens=8, hidden=264, deadline=DEADLINES[rank.device.type])
    call = Call("all_reduce_rms_norm", 4, 264, "bf16", strategy=0)
    on = {"device": rank.device}
    flat = torch.zeros(4 * 264 * 2 + 64, dtype=torch.uint8, **on)

    def codes(first: int) -> torch.Tensor:
        return flat[first : first + 4 * 264].view(torch.float8_e4m3fn).view(4, 264)

    halves = flat[: 4 * 264 * 2].view(torch.bfloat16).view(4, 264)
    bad: dict[str, dict[str, torch.Tensor]] = {
        "quant_out: is uint8, wanted float8_e4m3fn": {"quant_out": codes(0).view(torch.uint8)},
        r"quant_out: has shape \[264, 4\], wanted \[4, 264\]": {"quant_out": codes(0).view(264, 4)},
        "quant_out: is not contiguous": {"quant_out": codes(0).view(264, 4).t()},
        "quant_out: starts 4 bytes past a 8-byte boundary": {"quant_out": codes(4)},
        "quant_out: overlaps x": {"quant_out": codes(0), "x": halves},
        "quant_out: overlaps residual": {"quant_out": codes(8), "residual": halves},
        "quant_out: overlaps norm_out": {"quant_out": codes(0), "norm_out": halves},
        "quant_out: overlaps residual_out": {"quant_out": codes(1056), "residual_out": halves},
        "norm_out: overlaps residual_out": {"norm_out": halves, "residual_out": halves},
        "x: is float32, wanted bfloat16 or float16": {"x": torch.zeros(4, 264, **on)},
    }
    if KINDS[kind].takes_scale:
        bad |= {
            "quant_out: overlaps scale": {"quant_out": codes(0), "scale": flat[16:20].view(torch.float32)},
            "scale: is float64, wanted float32": {"scale": torch.ones(1, dtype=torch.float64, **on)},
            r"scale: has shape \[2\], wanted \[1\]": {"scale": torch.ones(2, **on)},
        }
    if kind == "per_token_fp8":
        bad |= {
            "scale_out: is float64, wanted float32": {"scale_out": torch.ones(4, 1, dtype=torch.float64, **on)},
            r"scale_out: has shape \[4\], wanted \[4, 1\]": {"scale_out": torch.ones(4, **on)},
            "scale_out: overlaps quant_out": {
                "quant_out": codes(0),
                "scale_out": flat[16:32].view(torch.float32).view(4, 1),
            },
        }
    if rank.device.type == "cuda" and KINDS[kind].takes_scale:
        bad["scale: is on cpu, wanted cuda"] = {"scale": torch.ones(1)}
    for says, changes in bad.items():
        made = Quantised(rank, kind, call)
        for name, tensor in changes.items():
            if name in made.outputs:
                made.outputs[name].tensor = tensor
            elif name == "norm_out":
                made.norm = tensor
            elif name == "scale":
                made.scale = tensor
            else:
                setattr(made.prepared, name, tensor)
        with pytest.raises(RuntimeError, match=says):
            made.launch(workspace.handle)
    check_out_form(rank, workspace.handle, [Quantised(rank, kind, call)])  # nothing has been broken
    workspace.close()


def check_poison(rank: Any, kind: str) -> None:
    """A call whose peers never come leaves NaN in every output, and nothing else."""
    for strategy in (0, 1):
        workspace = rank.new_workspace(max_tokens=8, hidden=264, deadline=0.5)
        rank.barrier()
        if rank.rank == 0:
            call = Quantised(rank, kind, Call("all_reduce_rms_norm", 5, 264, "bf16", strategy=strategy))
            launch_that_breaks(rank, call, workspace.handle)
            assert call.is_poisoned(), (strategy, call.outputs, call.norm)
            with pytest.raises(RuntimeError, match=f"in {KINDS[kind].op}"):
                workspace.check()
        rank.barrier()
        workspace.close()


def check_a_wrong_output_is_seen(rank: Any, kind: str) -> None:
    """The control: an output nobody wrote, one with other bits, one with a byte too many."""
    workspace = rank.new_workspace(max_tokens=40, hidden=264, deadline=DEADLINES[rank.device.type])
    call = Quantised(rank, kind, Call("all_reduce_rms_norm", 40, 264, "bf16", strategy=0))
    assert call.wrong()
    check_out_form(rank, workspace.handle, [call])
    for name, output in call.outputs.items():
        size = output.tensor.element_size()
        signs = output.tensor.view(torch.uint8).view(-1)[size - 1 :: size]
        signs ^= 0x80
        assert f"{name} differs" in call.wrong()[0]
        signs ^= 0x80
        assert not call.wrong()
        output.memory[-1] = 0
        assert f"{name} is overrun" in call.wrong()[-1]
        output.memory[-1] = UNWRITTEN
    rank.barrier()
    workspace.close()


def _compiler_inputs(rank: Any, tokens: int) -> tuple[torch.Tensor, ...]:
    """(x, residual, weight, scale): finite, as opcheck does not take NaN for equal to NaN."""
    generator = torch.Generator().manual_seed(tokens + 100 * rank.rank)
    x = torch.randn(tokens, 64, generator=generator).bfloat16().to(rank.device)
    return x, torch.ones_like(x), torch.linspace(0.5, 1.5, 64, device=rank.device), torch.tensor([0.37]).to(rank.device)


def check_ops(rank: Any, kind: str) -> None:
    """opcheck of both forms, with norm and without, by a world size of 1; and what the fake says."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    op, handle = KINDS[kind].op, rank.workspace().handle
    functional, out = (getattr(torch.ops.mnnvl_ar, name).default for name in (op, f"{op}_out"))
    x, residual, weight, scale = _compiler_inputs(rank, 3)
    made = KINDS[kind].outputs(Call(tokens=3, hidden=64))
    quant = [torch.zeros(shape, dtype=dtype, device=rank.device) for _, shape, dtype in made]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    given = (x, residual, weight, 1e-6, *([scale] if KINDS[kind].takes_scale else []))
    for with_norm in (False, True):
        torch.library.opcheck(functional, (*given, handle), {"with_norm": with_norm, "strategy": 1}, test_utils=tests)
        norm = torch.zeros_like(x) if with_norm else None
        after = torch.zeros_like(x)
        # test_schema compares arguments by allclose, which PyTorch has not for FP8.
        torch.library.opcheck(out, (*given, *quant, norm, after, handle), test_utils=tests[1:])
        got = functional(*given, handle, with_norm=with_norm)
        with FakeTensorMode() as mode:
            faked = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in given]
            fakes = functional(*faked, handle, with_norm=with_norm)
        assert [(t.shape, t.dtype, t.stride()) for t in fakes] == [(t.shape, t.dtype, t.stride()) for t in got]


def check_compiles(rank: Any, kind: str, backend: str) -> None:
    """Both forms compile as one graph, and give the bits that they give uncompiled."""
    from mnnvl_ar import reference

    torch._dynamo.reset()
    torch._inductor.config.force_disable_caches = True
    torch._inductor.config.compile_threads = 1
    handle, op = rank.workspace().handle, KINDS[kind].op
    functional, out = getattr(torch.ops.mnnvl_ar, op), getattr(torch.ops.mnnvl_ar, f"{op}_out")

    def layer(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *scale: torch.Tensor) -> Any:
        *quant, norm, residual = functional(x * 1, residual, weight, 1e-6, *scale, handle, with_norm=True)
        again = [torch.empty_like(each) for each in quant]
        out(norm, residual, weight, 1e-6, *scale, *again, None, residual, handle)  # residual in place
        return (*quant, norm.clone(), *again, residual)

    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    given = _compiler_inputs(rank, 5)[: None if KINDS[kind].takes_scale else -1]
    rank.barrier()
    want = layer(*given)
    rank.barrier()
    got = compiled(*given)
    rank.barrier()
    assert len(got) == len(want) == 2 * len(KINDS[kind].outputs(Call())) + 2
    for g, w in zip(got, want, strict=True):
        assert reference.same_bits(g, w), backend
    if backend == "inductor":
        from torch._inductor.lowering import FALLBACK_ALLOW_LIST

        assert {f"mnnvl_ar::{op}", f"mnnvl_ar::{op}_out"} <= set(FALLBACK_ALLOW_LIST)


CHECKS = {
    "outputs": check_outputs,
    "arguments": check_arguments,
    "pieces": check_pieces,
    "refusals": check_refusals,
    "poison": check_poison,
    "control": check_a_wrong_output_is_seen,
}
