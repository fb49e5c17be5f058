"""Everything that an op refuses: what is raised, and that the next good call on all ranks gives the right bits."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from common.cases.calls import Call, check_calls

TOKENS, HIDDEN = 4, 64


def refusals(rank: Any, handle: int, closed: int) -> dict[str, tuple[Callable[[], Any], str]]:
    """By name: a call that must be refused, and a pattern of the message: argument, got, wanted."""
    from mnnvl_ar import ops

    def rows(*shape: int, dtype: torch.dtype = torch.bfloat16, device: Any = rank.device) -> torch.Tensor:
        return torch.ones(shape or (TOKENS, HIDDEN), dtype=dtype, device=device)

    def misaligned(*shape: int) -> torch.Tensor:
        flat = rows(torch.Size(shape).numel() + 8)
        return flat[1 : 1 + torch.Size(shape).numel()].view(shape)

    def reduce(x: torch.Tensor, workspace: int = handle, **choice: int) -> Callable[[], Any]:
        return lambda: ops.all_reduce(x, workspace, **choice)

    def reduce_out(x: torch.Tensor, out: torch.Tensor) -> Callable[[], Any]:
        return lambda: ops.all_reduce_out(x, out, handle)

    def norm(
        x: torch.Tensor | None = None, residual: torch.Tensor | None = None, weight: torch.Tensor | None = None
    ) -> Callable[[], Any]:
        x, residual, weight = (
            rows() if x is None else x,
            rows() if residual is None else residual,
            rows(HIDDEN) if weight is None else weight,
        )
        return lambda: ops.all_reduce_rms_norm(x, residual, weight, 1e-6, handle)

    def norm_out(
        norm_out: torch.Tensor,
        residual_out: torch.Tensor,
        x: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
    ) -> Callable[[], Any]:
        x, residual, weight = (
            rows() if x is None else x,
            rows() if residual is None else residual,
            rows(HIDDEN) if weight is None else weight,
        )
        return lambda: ops.all_reduce_rms_norm_out(x, residual, weight, 1e-6, norm_out, residual_out, handle)

    other, large = rows(), rows(2 * TOKENS, HIDDEN)
    half = torch.float16
    found = {
        "dtype": (reduce(rows(dtype=torch.float64)), r"x: is float64, wanted bfloat16, float16 or float32"),
        "integer dtype": (reduce(rows(dtype=torch.int32)), r"x: is .*, wanted bfloat16, float16 or float32"),
        "mixed residual": (norm(residual=rows(dtype=half)), r"residual: is float16, wanted bfloat16 like x"),
        "mixed weight": (
            norm(weight=rows(HIDDEN, dtype=half)),
            r"weight: is float16, wanted bfloat16 like x, or float32",
        ),
        "mixed out": (reduce_out(rows(), rows(dtype=half)), r"out: is float16, wanted bfloat16 like x"),
        "mixed norm_out": (norm_out(rows(dtype=half), other), r"norm_out: is float16, wanted bfloat16"),
        "strided x": (reduce(rows(HIDDEN, TOKENS * 8).t()), r"x: is not contiguous, wanted a contiguous tensor"),
        "strided residual": (norm(residual=rows(HIDDEN, TOKENS).t()), r"residual: is not contiguous, wanted"),
        "strided weight": (norm(weight=rows(2 * HIDDEN)[::2]), r"weight: is not contiguous, wanted"),
        "strided out": (reduce_out(rows(), rows(TOKENS, 2 * HIDDEN)[:, ::2]), r"out: is not contiguous, wanted"),
        "misaligned x": (reduce(misaligned(TOKENS, HIDDEN)), r"x: starts 2 bytes past a 16-byte boundary, wanted"),
        "misaligned residual": (norm(residual=misaligned(TOKENS, HIDDEN)), r"residual: starts 2 bytes past .* wanted"),
        "misaligned weight": (
            norm(weight=misaligned(HIDDEN)),
            r"weight: starts 2 bytes past a 16-byte boundary, wanted",
        ),
        "misaligned out": (reduce_out(rows(), misaligned(TOKENS, HIDDEN)), r"out: starts 2 bytes past .* wanted"),
        "scalar": (norm(rows()[0, 0]), r"x: has no dimensions, wanted \[\.\.\., hidden\]"),
        "row bytes": (
            norm(rows(TOKENS, 12)),
            r"x: rows of 12 elements are 24 bytes, wanted a multiple of 16 bytes up to 32768",
        ),
        "row too long": (norm(rows(1, 16392)), r"x: rows of 16392 elements are 32784 bytes, wanted .* up to 32768"),
        "empty row": (norm(rows(TOKENS, 0)), r"x: rows of 0 elements are 0 bytes, wanted a multiple of 16"),
        "no whole vectors": (reduce(rows(3, 12)), r"x: has shape \[3, 12\], 72 bytes, wanted a multiple of 16 bytes"),
        "residual shape": (
            norm(residual=rows(TOKENS + 1, HIDDEN)),
            r"residual: has shape \[5, 64\], wanted \[4, 64\] like x",
        ),
        "residual transposed": (
            norm(residual=rows(HIDDEN, TOKENS)),
            r"residual: has shape \[64, 4\], wanted \[4, 64\]",
        ),
        "weight shape": (norm(weight=rows(HIDDEN + 8)), r"weight: has shape \[72\], wanted \[64\]"),
        "weight dimensions": (norm(weight=rows(1, HIDDEN)), r"weight: has shape \[1, 64\], wanted \[64\]"),
        "out shape": (
            reduce_out(rows(), rows(TOKENS - 1, HIDDEN)),
            r"out: has shape \[3, 64\], wanted \[4, 64\] like x",
        ),
        "norm_out shape": (norm_out(rows(2, HIDDEN), other), r"norm_out: has shape \[2, 64\], wanted \[4, 64\]"),
        "outputs alike": (norm_out(other, other), r"norm_out: overlaps residual_out, wanted memory of its own"),
        "outputs overlap": (
            norm_out(large[:TOKENS], large[1 : TOKENS + 1]),
            r"norm_out: overlaps residual_out, wanted memory of its own",
        ),
        "out overlaps x": (
            reduce_out(large[:TOKENS], large[1 : TOKENS + 1]),
            r"out: overlaps x, wanted the same memory from its start on, or other memory",
        ),
        "norm_out overlaps x": (norm_out(large[1 : TOKENS + 1], other, x=large[:TOKENS]), r"norm_out: overlaps x"),
        "residual_out overlaps residual": (
            norm_out(other, large[1 : TOKENS + 1], residual=large[:TOKENS]),
            r"residual_out: overlaps residual",
        ),
        "norm_out overlaps weight": (norm_out(large[:TOKENS], other, weight=large[1]), r"norm_out: overlaps weight"),
        "residual_out is weight": (
            norm_out(rows(1, HIDDEN), large[:1], weight=large[0], x=rows(1, HIDDEN), residual=rows(1, HIDDEN)),
            r"residual_out: overlaps weight, wanted memory of its own",
        ),
        "no room for a row": (
            reduce(rows(1, 16384), strategy=1),  # by one-shot, a rank alone needs none
            r"x: a row of 32768 bytes needs a slot of .*the workspace has .*wanted",
        ),
        "all of x but a piece": (
            reduce_out(large[:TOKENS], large[TOKENS // 2 : TOKENS // 2 + TOKENS]),
            r"out: overlaps x, wanted the same memory from its start on, or other memory",
        ),
        "unknown strategy": (reduce(rows(), strategy=2), r"strategy: is 2, wanted"),
        "pdl": (reduce(rows(), pdl=3), r"pdl: is 3, wanted"),
        "unknown handle": (reduce(rows(), 1_000_000), r"workspace: handle 1000000 is unknown in this process.*wanted"),
        "no handle": (reduce(rows(), 0), r"workspace: handle 0 is unknown"),
        "negative handle": (reduce(rows(), -1), r"workspace: handle -1 is unknown"),
        "closed handle": (reduce(rows(), closed), rf"workspace: handle {closed} is closed"),
    }
    here = re.escape(str(rank.device))
    found |= {
        "x on meta": (norm(rows(device="meta")), rf"residual: is on {here}, wanted meta like x"),
        "residual on meta": (norm(residual=rows(device="meta")), rf"residual: is on meta, wanted {here} like x"),
        "weight on meta": (norm(weight=rows(HIDDEN, device="meta")), rf"weight: is on meta, wanted {here} like x"),
        "out on meta": (reduce_out(rows(), rows(device="meta")), rf"out: is on meta, wanted {here} like x"),
        "norm_out on meta": (norm_out(rows(device="meta"), rows()), rf"norm_out: is on meta, wanted {here} like x"),
    }
    if rank.device.type == "cuda":
        found |= {
            "host x": (reduce(rows(device="cpu")), rf"x: is on cpu, wanted {here}, the device of workspace"),
            "host residual": (norm(residual=rows(device="cpu")), rf"residual: is on cpu, wanted {here} like x"),
            "host weight": (norm(weight=rows(HIDDEN, device="cpu")), rf"weight: is on cpu, wanted {here} like x"),
            "host out": (reduce_out(rows(), rows(device="cpu")), rf"out: is on cpu, wanted {here} like x"),
        }
        if torch.cuda.device_count() > 1:
            away = torch.device("cuda", (rank.device.index + 1) % torch.cuda.device_count())
            found["other GPU"] = (
                reduce(rows(device=away)),
                rf"x: is on {away}, wanted {here}, the device of workspace",
            )
    return found


def check_bad_input(rank: Any) -> list[str]:
    """Every refusal on all ranks, then on one rank only, each followed by a good call of all. Returns the names."""
    options = {"max_tokens": 64, "hidden": HIDDEN, "dtype": torch.bfloat16}
    workspace, spare = rank.workspace(**options), rank.new_workspace(**options)
    spare.close()
    for number, (name, (call, pattern)) in enumerate(refusals(rank, workspace.handle, spare.handle).items()):
        for ranks in (range(rank.world_size), [number % rank.world_size]):
            if rank.rank in ranks:
                expect(call, pattern, name)
        check_calls(rank, [Call(tokens=2, seed=number)], handle=workspace.handle)
    return list(refusals(rank, workspace.handle, spare.handle))


def expect(call: Callable[[], Any], pattern: str, name: str, kind: type[BaseException] = RuntimeError) -> None:
    """`call` raises `kind` with a message that `pattern` is found in."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert re.search(pattern, message, re.DOTALL), f"{name}: wanted a message like {pattern!r}, got {message}"


def check_bad_workspaces(rank: Any) -> None:
    """What cannot become a workspace says so on all ranks, and one that can be made afterwards works."""
    from mnnvl_ar import BringUpError

    options = {"max_tokens": 8, "hidden": 64, "dtype": torch.bfloat16}
    for wrong, pattern, kind in (
        ({"dtype": torch.float64}, r"dtype: is torch.float64, wanted one of", ValueError),
        ({"dtype": torch.int8}, r"dtype: is torch.int8, wanted one of", ValueError),
        ({"max_tokens": 0}, r"max_tokens: is 0, wanted a whole number from 1 to 2147483647", ValueError),
        ({"max_tokens": 2**32 + 1}, r"max_tokens: is 4294967297, wanted a whole number", ValueError),
        ({"max_tokens": 2.5}, r"max_tokens: is 2.5, wanted a whole number", ValueError),
        ({"max_bytes": 0}, r"max_bytes: is 0, wanted a whole number of bytes, or None for no bound", ValueError),
        ({"max_bytes": -5}, r"max_bytes: is -5, wanted a whole number of bytes, or None", ValueError),
        ({"max_bytes": float("nan")}, r"max_bytes: is nan, wanted a whole number of bytes, or None", ValueError),
        ({"max_bytes": "64 MiB"}, r"max_bytes: is '64 MiB', wanted a whole number of bytes", ValueError),
        ({"max_bytes": 16384}, r"max_bytes: is 16384, wanted at least 1\d{4} for a row of 128 bytes of", RuntimeError),
        ({"hidden": 64.0}, r"hidden: is 64.0, wanted a whole number", ValueError),
        ({"hidden": 12}, r"hidden: rows of 24 bytes, wanted a multiple of 16 bytes up to 32768", RuntimeError),
        ({"hidden": 32768}, r"hidden: rows of 65536 bytes, wanted a multiple of 16 bytes up to 32768", RuntimeError),
        ({"hidden": 0}, r"hidden: is 0, wanted a whole number", ValueError),
        ({"deadline": 0}, r"deadline: is 0, wanted more than 0 seconds, or None", ValueError),
        ({"deadline": -1.0}, r"deadline: is -1.0, wanted more than 0 seconds", ValueError),
        ({"deadline": float("nan")}, r"deadline: is nan, wanted more than 0 seconds", ValueError),
        ({"deadline": 1e12}, r"deadline: is 1000000000000.0, wanted", ValueError),
        ({"hold": -1}, r"hold: is -1, wanted more than 0 seconds, and finite", ValueError),
        ({"timeout": 0}, r"timeout: is 0, wanted more than 0 seconds", ValueError),
        ({"timeout": float("inf")}, r"timeout: is inf, wanted more than 0 seconds, and finite", ValueError),
        ({"max_ctas": 1.5}, r"max_ctas: is 1.5, wanted a whole number", ValueError),
        ({"max_ctas": -1}, r"max_ctas: is -1, wanted a whole number from 1", ValueError),
        ({"strategy": "ring"}, r"strategy: is 'ring', wanted one of auto, one_shot, two_shot", ValueError),
        ({"pdl": "always"}, r"pdl: is 'always', wanted one of auto, off, late, early", ValueError),
        ({"device": "cuda:99"}, r"rank 0 at step 'prepare': .*device: is cuda:99, wanted one of the \d+", BringUpError),
        ({"device": "meta"}, r"device: is meta, wanted a CUDA device or cpu", ValueError),
        ({"device": "foo"}, r"device: is 'foo', wanted a CUDA device or cpu", ValueError),
        ({"device": 3.5}, r"device: is 3.5, wanted a CUDA device or cpu", ValueError),
        ({"transport": "foo"}, r"transport: got 'foo' for device c\w+, wanted one of auto", ValueError),
        ({"group": None}, r"group: is None, wanted a process group", ValueError),
        ({"group": "x"}, r"group: is 'x', wanted a process group", ValueError),
    ):
        expect(lambda wrong=wrong: rank.new_workspace(**{**options, **wrong}), pattern, str(wrong), kind)
    with rank.new_workspace(**options) as workspace:
        check_calls(rank, [Call(tokens=2)], handle=workspace.handle)
        rank.barrier()
