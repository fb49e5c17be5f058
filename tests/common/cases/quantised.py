"""Ops with quantised outputs: every bit against the reference of norm as stored, on any ranks, in both strategies.

A kind of output is a `Kind`: its op, its outputs, and what they should hold. Every function is run by all ranks.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config

from common.cases.calls import ALIASING, Call, Prepared, wanted
from common.cases.outputs import UNWRITTEN, Output, check_functional_form, check_out_form
from common.cases.rules import DEADLINES, launch_that_breaks

# A row, few, many that fill no tile of 128 nor four; hidden sizes are taken up to a kind's next block.
SHAPES = ((1, 64), (3, 264), (7, 2880), (40, 4096), (300, 264), (2, 8192))
SCALES = (0.37, 0.25, 3e-3, -2.0, 0.0, 1e-40, float("inf"), float("nan"))

Options = dict[str, int]


@dataclasses.dataclass(frozen=True)
class Kind:
    """An op.

    scale: what the op calls a scale that it is given, "" for none
    block: elements that share a scale, of which hidden is a multiple
    options: of the op, each of which gives other outputs
    outputs(tokens, hidden, options): what is not like x, by name, as meta tensors
    of_norm(norm, scale, options): what they should hold
    """

    op: str
    outputs: Callable[[int, int, Options], dict[str, torch.Tensor]]
    of_norm: Callable[[torch.Tensor, torch.Tensor, Options], tuple[torch.Tensor, ...]]
    scale: str = ""
    block: int = 8
    options: tuple[Options, ...] = ({},)

    def hidden(self, least: int) -> int:
        return -(-least // self.block) * self.block


def _codes(tokens: int, hidden: int) -> torch.Tensor:
    return torch.empty(tokens, hidden, dtype=torch.float8_e4m3fn, device="meta")


def _static(norm: torch.Tensor, scale: torch.Tensor, _: Options) -> tuple[torch.Tensor, ...]:
    from mnnvl_ar import reference

    return (reference.static_fp8(norm, scale),)


def _per_token_outputs(tokens: int, hidden: int, _: Options) -> dict[str, torch.Tensor]:
    from mnnvl_ar import scales

    return {"quant_out": _codes(tokens, hidden), "scale_out": scales.per_token_fp8(tokens, device="meta")}


def _per_token(norm: torch.Tensor, _: torch.Tensor, __: Options) -> tuple[torch.Tensor, ...]:
    from mnnvl_ar import reference

    return reference.per_token_fp8(norm)


def _group_outputs(tokens: int, hidden: int, options: Options) -> dict[str, torch.Tensor]:
    from mnnvl_ar import scales

    made = scales.per_token_group_fp8(tokens, hidden, **options, device="meta")
    return {"quant_out": _codes(tokens, hidden), "scale_out": made}


def _group(norm: torch.Tensor, _: torch.Tensor, options: Options) -> tuple[torch.Tensor, ...]:
    from mnnvl_ar import reference

    scales, layout = options.get("scales", 0), options.get("layout", -1)
    if scales == 2:
        return reference.per_token_group_fp8(norm, "ue8m0", "tma_aligned")
    names = ("row_major", "column_major", "tma_aligned")
    return reference.per_token_group_fp8(norm, ("fp32", "power_of_two")[scales], names[max(0, layout)])


def _mxfp8_outputs(tokens: int, hidden: int, options: Options) -> dict[str, torch.Tensor]:
    from mnnvl_ar import scales

    made = scales.mxfp8(tokens, hidden, **options, device="meta")
    return {"quant_out": _codes(tokens, hidden), "scale_out": made}


def _layout(options: Options) -> str:
    return "linear" if options.get("layout") == 2 else "swizzled"


def _mxfp8(norm: torch.Tensor, _: torch.Tensor, options: Options) -> tuple[torch.Tensor, ...]:
    from mnnvl_ar import reference

    return reference.mxfp8(norm, _layout(options))


def _nvfp4_outputs(tokens: int, hidden: int, options: Options) -> dict[str, torch.Tensor]:
    from mnnvl_ar import scales

    codes = torch.empty(tokens, hidden // 2, dtype=torch.uint8, device="meta")
    return {"quant_out": codes, "scale_out": scales.nvfp4(tokens, hidden, **options, device="meta")}


def _nvfp4(norm: torch.Tensor, scale: torch.Tensor, options: Options) -> tuple[torch.Tensor, ...]:
    from mnnvl_ar import reference

    return reference.nvfp4(norm, scale, _layout(options))


KINDS = {
    "static_fp8": Kind(
        "all_reduce_rms_norm_static_fp8", lambda t, h, _: {"quant_out": _codes(t, h)}, _static, scale="scale"
    ),
    "per_token_fp8": Kind("all_reduce_rms_norm_per_token_fp8", _per_token_outputs, _per_token),
    "per_token_group_fp8": Kind(
        "all_reduce_rms_norm_per_token_group_fp8",
        _group_outputs,
        _group,
        block=128,
        options=(
            {},
            {"scales": 2},
            *({"scales": scales, "layout": layout} for layout in (2, 1, 0) for scales in (1, 0)),
            {"scales": 2, "layout": 2},
        ),
    ),
    "mxfp8": Kind(
        "all_reduce_rms_norm_mxfp8", _mxfp8_outputs, _mxfp8, block=32, options=({}, {"layout": 2}, {"layout": 0})
    ),
    "nvfp4": Kind(
        "all_reduce_rms_norm_nvfp4",
        _nvfp4_outputs,
        _nvfp4,
        scale="global_scale",
        block=16,
        options=({}, {"layout": 2}, {"layout": 0}),
    ),
}


class Quantised:
    """A call of an op's `_out` form, its outputs between guards. `with_norm`: whether norm is stored too."""

    def __init__(
        self,
        rank: Any,
        kind: str,
        call: Call,
        scale: float = SCALES[0],
        with_norm: bool = True,
        options: Options | None = None,
    ) -> None:
        self.rank, self.kind, self.with_norm = rank, KINDS[kind], with_norm
        self.call = dataclasses.replace(call, hidden=self.kind.hidden(call.hidden))
        self.options = self.kind.options[0] if options is None else options
        self.prepared = Prepared(rank, dataclasses.replace(self.call, out=call.out or "E"))
        self.scale = torch.tensor([scale], device=rank.device)
        made = self.kind.outputs(call.tokens, self.call.hidden, self.options)
        lead = self.call.shape[:-1]
        self.outputs = {  # codes have the leading dimensions of x
            name: Output((*lead, each.shape[-1]), each.dtype, rank.device)
            if name == "quant_out"
            else Output(each.shape, each.dtype, rank.device, None if each.is_contiguous() else each.stride())
            for name, each in made.items()
        }
        self.norm = self.prepared.norm_out if with_norm else None
        self.fresh: tuple[torch.Tensor, ...] = ()

    @property
    def _given(self) -> tuple[Any, ...]:
        p = self.prepared
        scale = (self.scale,) if self.kind.scale else ()
        return (p.x, p.residual, p.weight, self.call.eps, *scale)

    @property
    def _choice(self) -> dict[str, Any]:
        return {
            "weight_bias": self.call.weight_bias,
            "strategy": self.call.strategy,
            "pdl": self.call.pdl,
            "tag": self.call.tag,
        }

    def launch(self, handle: int) -> None:
        out = getattr(torch.ops.mnnvl_ar, f"{self.kind.op}_out")
        quant = [output.tensor for output in self.outputs.values()]
        known = {argument.name for argument in out.default._schema.arguments}
        options = {name: value for name, value in self.options.items() if name in known}  # or strides say it
        out(*self._given, *quant, self.norm, self.prepared.residual_out, handle, **options, **self._choice)

    def launch_fresh(self, handle: int) -> None:
        """The functional form. The inputs are as they were."""
        op = getattr(torch.ops.mnnvl_ar, self.kind.op)
        self.fresh = op(*self._given, handle, with_norm=self.with_norm, **self.options, **self._choice)

    def _wanted(self) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor]:
        norm, residual_out = wanted(self.prepared.call, self.rank.world_size)
        return norm, self._of(norm), residual_out

    def _of(self, norm: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.kind.of_norm(norm, self.scale.cpu(), self.options)

    def _wrong_quant(self, quant: tuple[torch.Tensor, ...]) -> list[str]:
        """With all that pads them, and all beside them."""
        from mnnvl_ar.reference import same_bits

        found = [
            f"{name} differs"
            for (name, got), want in zip(self.outputs.items(), quant, strict=True)
            if not same_bits(got.tensor, want) or not same_bits(got.flat, spanned(want))
        ]
        return found + [f"{name} is overrun" for name, output in self.outputs.items() if output.is_overrun()]

    def wrong(self) -> list[str]:
        from mnnvl_ar.reference import same_bits

        norm, quant, residual_out = self._wanted()
        pairs = [("residual_out", self.prepared.residual_out, residual_out)]
        pairs += [("norm_out", self.norm, norm)] if self.norm is not None else []
        found = [f"{name} differs" for name, got, want in pairs if not same_bits(got, want)]
        found += self._wrong_quant(quant)
        if self.norm is None and self.call.out == "" and not self.prepared.norm_out.eq(3.0).all():
            found.append("a norm that was not wanted was written")
        says = f"{self.kind.op} {self.options} of {self.call}, scale {self.scale.item()}, rank {self.rank.rank}"
        return [f"{says}: {line}" for line in found]

    def wrong_when_fresh(self) -> list[str]:
        from mnnvl_ar.reference import same_bits

        norm, quant, residual_out = self._wanted()
        want = (*quant, norm if self.with_norm else norm.new_empty(0), residual_out)
        return [
            f"{self.call}: fresh output {i} differs"
            for i, (got, each) in enumerate(zip(self.fresh, want, strict=True))
            if got.stride() != each.stride() or not same_bits(got, each)
        ]

    def is_poisoned(self) -> bool:
        """Every output is what a norm of NaN alone gives, and nothing beside it is written."""
        lost = not self._wrong_quant(self._of(torch.full(self.call.shape, float("nan")).to(self.prepared.x.dtype)))
        norm = self.norm is None or bool(self.norm.isnan().all())
        return lost and norm and bool(self.prepared.residual_out.isnan().all())


def spanned(tensor: torch.Tensor) -> torch.Tensor:
    """All elements from the first to the last of a tensor that fills its storage, those between its own included."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())


def variants(kind: str) -> Iterator[Options]:
    """The kind's options in turn, without end."""
    return itertools.cycle(KINDS[kind].options)


def check_outputs(rank: Any, kind: str) -> None:
    """Right bits of every output, in both strategies, with and without norm, of every dtype, layout, and many sizes."""
    workspace = rank.new_workspace(max_tokens=300, hidden=4096, deadline=DEADLINES[rank.device.type])
    turn = variants(kind)
    calls = [
        Quantised(
            rank,
            kind,
            Call("all_reduce_rms_norm", tokens, hidden, dtype, strategy=strategy, seed=seed),
            with_norm=n,
            options=next(turn),
        )
        for seed, (tokens, hidden) in enumerate(SHAPES)
        for dtype in ("bf16", "fp16")
        for strategy in (0, 1)
        for n in (False, True)
    ]
    check_out_form(rank, workspace.handle, calls)
    check_functional_form(rank, workspace.handle, [*calls[:9], *calls[-2:]])
    workspace.close()


def check_arguments(rank: Any, kind: str) -> None:
    """Every scale, weight, bias, and aliasing of the outputs that are like x, and leading dimensions."""
    workspace = rank.new_workspace(max_tokens=12, hidden=384, deadline=DEADLINES[rank.device.type])
    base, turn = Call("all_reduce_rms_norm", 12, 264, "bf16", strategy=0), variants(kind)
    others: list[tuple[dict[str, Any], float]] = [({"seed": i}, scale) for i, scale in enumerate(SCALES)]
    others += [({"out": out}, SCALES[0]) for out in ALIASING]
    others += [
        (changes, SCALES[0])
        for changes in (
            {"fp32_weight": True, "weight_bias": 1.0},
            {"lead": (3, 4)},
            *({"tokens": 0} for _ in KINDS[kind].options),
            {},
        )
    ]
    calls = [
        Quantised(rank, kind, dataclasses.replace(base, **changes), scale, options=next(turn))
        for changes, scale in others
    ]
    calls[-1].scale = calls[-1].scale.squeeze()  # no dimensions
    check_out_form(rank, workspace.handle, calls)
    workspace.close()


def check_pieces(rank: Any, kind: str) -> None:
    """A call larger than a slot: outputs that are not like x go on where the piece before ended."""
    tokens, rows, hidden = 38, 5, KINDS[kind].hidden(264)
    workspace = rank.new_workspace(
        max_tokens=tokens,
        hidden=hidden,
        dtype=torch.bfloat16,
        max_bytes=16384 + 3 * rows * (rank.world_size + hidden // 8) * 2 * 16,
    )
    for strategy in (0, 1):
        choice = torch.ops.mnnvl_ar._workspace_choice(workspace.handle, tokens, hidden * 2, strategy)
        assert choice[6] > 1, "pieces"
        call = Call("all_reduce_rms_norm", tokens, hidden, strategy=strategy)
        calls = [Quantised(rank, kind, call, options=options) for options in KINDS[kind].options]
        check_out_form(rank, workspace.handle, calls)
    workspace.close()


def check_refusals(rank: Any, kind: str) -> None:
    """What is wrong with a tensor is refused, naming it, before anything is launched."""
    hidden = KINDS[kind].hidden(264)
    workspace = rank.new_workspace(max_tokens=8, hidden=hidden, deadline=DEADLINES[rank.device.type])
    call = Call("all_reduce_rms_norm", 4, hidden, "bf16", strategy=0)
    made = KINDS[kind].outputs(4, hidden, KINDS[kind].options[0])
    quant = made["quant_out"]
    width, name = quant.shape[-1], str(quant.dtype).removeprefix("torch.")
    other = torch.int8 if quant.dtype == torch.uint8 else torch.uint8
    step = 8 if name == "float8_e4m3fn" else 4
    on = {"device": rank.device}
    flat = torch.zeros(4 * hidden * 2 + 4096, dtype=torch.uint8, **on)

    def codes(first: int) -> torch.Tensor:
        return flat[first : first + 4 * width].view(quant.dtype).view(4, width)

    halves = flat[: 4 * hidden * 2].view(torch.bfloat16).view(4, hidden)
    bad: dict[str, dict[str, Any]] = {
        f"quant_out: is {str(other)[6:]}, wanted {name}": {"quant_out": codes(0).view(other)},
        rf"quant_out: has shape \[{width}, 4\], wanted \[4, {width}\]": {"quant_out": codes(0).view(width, 4)},
        "quant_out: is not contiguous": {"quant_out": codes(0).view(width, 4).t()},
        f"quant_out: starts {step // 2} bytes past a {step}-byte boundary": {"quant_out": codes(step // 2)},
        "quant_out: overlaps x": {"quant_out": codes(0), "x": halves},
        "quant_out: overlaps residual": {"quant_out": codes(8), "residual": halves},
        "quant_out: overlaps norm_out": {"quant_out": codes(0), "norm_out": halves},
        "quant_out: overlaps residual_out": {"quant_out": codes(1056), "residual_out": halves},
        "norm_out: overlaps residual_out": {"norm_out": halves, "residual_out": halves},
        "x: is float32, wanted bfloat16 or float16": {"x": torch.zeros(4, hidden, **on)},
    }
    if scale := KINDS[kind].scale:
        bad |= {
            f"quant_out: overlaps {scale}": {"quant_out": codes(0), "scale": flat[16:20].view(torch.float32)},
            f"{scale}: is float64, wanted float32": {"scale": torch.ones(1, dtype=torch.float64, **on)},
            rf"{scale}: has shape \[2\], wanted \[1\]": {"scale": torch.ones(2, **on)},
        }
        if rank.device.type == "cuda":
            bad[f"{scale}: is on cpu, wanted cuda"] = {"scale": torch.ones(1)}
    if "scale_out" in made:
        right = made["scale_out"]
        size, first = right.numel() * right.element_size(), 32 - 32 % right.element_size()
        is_overlap = flat[first : first + size].view(right.dtype).view(right.shape)
        bad |= {
            f"scale_out: is float64, wanted {str(right.dtype)[6:]}": {
                "scale_out": torch.ones(right.shape, dtype=torch.float64, **on)
            },
            "scale_out: overlaps quant_out": {"quant_out": codes(0), "scale_out": is_overlap},
        }
    bad |= {says: {"scale_out": make(rank.device)} for says, make in BAD_SCALES.get(kind, {}).items()}
    if KINDS[kind].block > 8:
        short = torch.zeros(4, 264 if KINDS[kind].block > 16 else 72, dtype=torch.bfloat16, **on)
        says = f"x: rows of {short.shape[1]} elements, wanted a multiple of {KINDS[kind].block}"
        bad[says] = {"x": short}
    bad |= {says: {"options": options} for says, options in BAD_OPTIONS.get(kind, {}).items()}
    for says, changes in bad.items():
        made_call = Quantised(rank, kind, call)
        for name, tensor in changes.items():
            if name in made_call.outputs:
                made_call.outputs[name].tensor = tensor
            elif name == "norm_out":
                made_call.norm = tensor
            elif name in ("scale", "options"):
                setattr(made_call, name, tensor)
            else:
                setattr(made_call.prepared, name, tensor)
        for launch in (made_call.launch, *([made_call.launch_fresh] if "options" in changes else [])):
            with pytest.raises(RuntimeError, match=says):
                launch(workspace.handle)
    check_out_form(rank, workspace.handle, [Quantised(rank, kind, call)])  # nothing has been broken
    workspace.close()


# scale_out of four rows of 264 elements, up to the kind's next block, by what is said of it.
BAD_SCALES: dict[str, dict[str, Callable[[Any], torch.Tensor]]] = {
    "per_token_fp8": {r"scale_out: has shape \[4\], wanted \[4, 1\]": lambda on: torch.ones(4, device=on)},
    "per_token_group_fp8": {
        r"scale_out: has shape \[3, 4\], wanted \[4, 3\]": lambda on: torch.ones(3, 4, device=on),
        r"scale_out: has strides \[6, 2\], wanted \[1, 4\], or .* row-major": lambda on: torch.ones(4, 6, device=on)[
            :, ::2
        ],
    },
    "mxfp8": {
        "scale_out: has 36 elements, wanted 1536": lambda on: torch.ones(36, dtype=torch.uint8, device=on),
    },
    "nvfp4": {
        "scale_out: has 68 elements, wanted 2560": lambda on: torch.ones(68, device=on).to(torch.float8_e4m3fn),
        "scale_out: is not contiguous": lambda on: torch.ones(20, 128, device=on).to(torch.float8_e4m3fn).t(),
    },
}
BAD_OPTIONS: dict[str, dict[str, Options]] = {
    "per_token_group_fp8": {"scales: is 3, wanted 0": {"scales": 3}},
    "mxfp8": {"layout: is 1, wanted 0": {"layout": 1}},
    "nvfp4": {"layout: is 1, wanted 0": {"layout": 1}},
}


def check_poison(rank: Any, kind: str) -> None:
    """A call whose peers never come leaves NaN in every output, and nothing else."""
    hidden = KINDS[kind].hidden(264)
    for strategy in (0, 1):
        for options in KINDS[kind].options[:2]:
            workspace = rank.new_workspace(max_tokens=8, hidden=hidden, deadline=0.5)
            rank.barrier()
            if rank.rank == 0:
                base = Call("all_reduce_rms_norm", 5, hidden, "bf16", strategy=strategy)
                call = Quantised(rank, kind, base, options=options)
                launch_that_breaks(rank, call, workspace.handle)
                assert call.is_poisoned(), (strategy, call.outputs, call.norm)
                with pytest.raises(RuntimeError, match=f"in {KINDS[kind].op}"):
                    workspace.check()
            rank.barrier()
            workspace.close()


def check_a_wrong_output_is_seen(rank: Any, kind: str) -> None:
    """The control: an output nobody wrote, one with other bits, in what pads it too, and one with a byte too many."""
    hidden = KINDS[kind].hidden(264)
    workspace = rank.new_workspace(max_tokens=40, hidden=hidden, deadline=DEADLINES[rank.device.type])
    base = Call("all_reduce_rms_norm", 39, hidden, "bf16", strategy=0)
    calls = [Quantised(rank, kind, base, options=options) for options in KINDS[kind].options[:3]]
    assert all(call.wrong() for call in calls)
    check_out_form(rank, workspace.handle, calls)
    for call in calls:
        for name, output in call.outputs.items():
            size = output.flat.element_size()
            signs = output.flat.view(torch.uint8)[size - 1 :: size]
            for flipped in (signs, signs[-1:], signs[output.flat.numel() // 2 :][:1]):
                flipped ^= 0x80
                assert f"{name} differs" in call.wrong()[0]
                flipped ^= 0x80
            assert not call.wrong()
            output.memory[-1] = 0
            assert f"{name} is overrun" in call.wrong()[-1]
            output.memory[-1] = UNWRITTEN
    rank.barrier()
    workspace.close()


def _compiler_inputs(rank: Any, kind: str, tokens: int) -> tuple[torch.Tensor, ...]:
    """(x, residual, weight), and a scale where the op takes one: finite, as opcheck does not take NaN for NaN."""
    generator = torch.Generator().manual_seed(tokens + 100 * rank.rank)
    hidden = KINDS[kind].hidden(64)
    x = torch.randn(tokens, hidden, generator=generator).bfloat16().to(rank.device)
    scale = (torch.tensor([0.37]).to(rank.device),) if KINDS[kind].scale else ()
    return x, torch.ones_like(x), torch.linspace(0.5, 1.5, hidden, device=rank.device), *scale


def check_ops(rank: Any, kind: str) -> None:
    """opcheck of both forms, with norm and without, by a world size of 1; and what the fake says."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    op, handle = KINDS[kind].op, rank.workspace().handle
    functional, out = (getattr(torch.ops.mnnvl_ar, name).default for name in (op, f"{op}_out"))
    x, residual, weight, *scale = _compiler_inputs(rank, kind, 3)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    given = (x, residual, weight, 1e-6, *scale)
    for with_norm, options in zip((False, True, False, True), variants(kind), strict=False):
        made = KINDS[kind].outputs(3, x.shape[1], options).values()
        quant = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=rank.device) for t in made]
        for each in quant:
            spanned(each).zero_()
        choice = {"with_norm": with_norm, **options}
        torch.library.opcheck(functional, (*given, handle), {**choice, "strategy": 1}, test_utils=tests)
        norm = torch.zeros_like(x) if with_norm else None
        after = torch.zeros_like(x)
        known = {argument.name for argument in out._schema.arguments}
        of_out = {name: value for name, value in options.items() if name in known}
        # test_schema compares arguments by allclose, which PyTorch has not for FP8.
        torch.library.opcheck(out, (*given, *quant, norm, after, handle), of_out, test_utils=tests[1:])
        got = functional(*given, handle, **choice)
        with FakeTensorMode() as mode:
            faked = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in given]
            fakes = functional(*faked, handle, **choice)
        assert [(t.shape, t.dtype, t.stride()) for t in fakes] == [(t.shape, t.dtype, t.stride()) for t in got]


def check_compiles(rank: Any, kind: str, backend: str) -> None:
    """Both forms compile as one graph, and give the bits that they give uncompiled: whole tensors, padding too."""
    from mnnvl_ar import reference

    handle, op = rank.workspace().handle, KINDS[kind].op
    functional, out = getattr(torch.ops.mnnvl_ar, op), getattr(torch.ops.mnnvl_ar, f"{op}_out")
    known = {argument.name for argument in out.default._schema.arguments}
    torch._inductor.config.force_disable_caches = True
    torch._inductor.config.compile_threads = 1
    for options in KINDS[kind].options[:2]:
        torch._dynamo.reset()
        of_out = {name: value for name, value in options.items() if name in known}

        def layer(
            x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *scale: torch.Tensor,
            options: Options = options, of_out: Options = of_out,
        ) -> Any:  # fmt: skip
            given = (weight, 1e-6, *scale)
            *quant, norm, residual = functional(x * 1, residual, *given, handle, with_norm=True, **options)
            again = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in quant]
            out(norm, residual, *given, *again, None, residual, handle, **of_out)  # residual in place
            return (*quant, norm.clone(), *again, residual)

        compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
        given = _compiler_inputs(rank, kind, 5)
        rank.barrier()
        want = layer(*given)
        rank.barrier()
        got = compiled(*given)
        rank.barrier()
        assert len(got) == len(want) == 2 * len(KINDS[kind].outputs(5, given[0].shape[1], options)) + 2
        for g, w in zip(got, want, strict=True):
            assert g.stride() == w.stride(), (backend, options)
            assert reference.same_bits(g, w), (backend, options)
        for i in (1, 4) if len(want) == 6 else ():  # scales, of either form
            assert reference.same_bits(spanned(got[i]).cpu(), spanned(want[i]).cpu()), "what pads a scale"
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
