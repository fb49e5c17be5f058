"""`allreduce_fusion` on the host transport: all aliasing of the servers, bit for bit, and input without sense."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from common.ranks import Rank, rank_pool
from compat.front import HIDDEN, TOKENS, create, installed, rows, works
from mnnvl_ar import ops, reference
from mnnvl_ar.compat import calls, creation
from mnnvl_ar.compat.patterns import REFUSED
from mnnvl_ar.errors import MnnvlArError, PeerTimeout, RanksDiffer
from mnnvl_ar.ops import Pdl, Strategy
from mnnvl_ar.tuning import Entry, Table

EPS = 1e-6
# As vLLM passes them; they change nothing here.
MEANINGLESS = {"use_oneshot": True, "fp32_acc": True, "layout_code": 0, "launch_with_pdl": True}


def aliasing(rank: Rank, dtype: torch.dtype) -> None:
    """Cases A to E of the servers: who is whose output, and what has to be left as it is."""
    weight = 1 + rows(9, 1, dtype=dtype)[0]
    with installed() as comm:
        workspace = create(comm, rank, dtype=dtype)
        for tokens, bias in ((1, 0.0), (5, 1.0), (TOKENS, 0.0)):
            xs = [rows(each, tokens, dtype=dtype) for each in range(rank.world_size)]
            residual = rows(77, tokens, dtype=dtype)
            zeros = torch.zeros_like(residual)

            def call(x: torch.Tensor, residual_in: torch.Tensor, bias: float = bias, **out: Any) -> torch.Tensor:
                given = {"rms_gamma": weight, "rms_eps": EPS, "weight_bias": bias, **MEANINGLESS, **out}
                got = comm.allreduce_fusion(input=x, workspace=workspace, pattern=1, residual_in=residual_in, **given)
                return got  # type: ignore[no-any-return]

            norm, total = reference.all_reduce_rms_norm(xs, residual, weight, EPS, bias)
            bare_norm, bare_total = reference.all_reduce_rms_norm(xs, zeros, weight, EPS, bias)

            x, r = xs[rank.rank].clone(), residual.clone()  # A: in place
            assert call(x, r, norm_out=x, residual_out=r) is x
            assert reference.same_bits(x, norm)
            assert reference.same_bits(r, total)

            x, fresh = xs[rank.rank].clone(), torch.empty_like(residual)  # B: no residual yet; C: one that is read only
            for given, wants in ((zeros.clone(), (bare_norm, bare_total)), (residual.clone(), (norm, total))):
                before, x = given.clone(), xs[rank.rank].clone()
                assert call(x, given, norm_out=fresh, residual_out=x) is fresh
                assert reference.same_bits(fresh, wants[0])
                assert reference.same_bits(x, wants[1])
                assert reference.same_bits(given, before)

            x, r, w = xs[rank.rank].clone(), residual.clone(), weight.clone()  # E: all fresh, inputs preserved
            out = [torch.empty_like(residual), torch.empty_like(residual)]
            assert call(x, r, norm_out=out[0], residual_out=out[1], trigger_completion_at_end=False) is out[0]
            assert reference.same_bits(out[0], norm)
            assert reference.same_bits(out[1], total)
            for now, before in ((x, xs[rank.rank]), (r, residual), (weight, w)):
                assert reference.same_bits(now, before)

            only = torch.empty_like(residual)  # what is left out is made
            assert reference.same_bits(call(x, r), norm)
            assert reference.same_bits(call(x, r, residual_out=only), norm)
            assert reference.same_bits(only, total)

            summed = reference.all_reduce(xs)
            given = {"input": x, "workspace": workspace, "pattern": comm.AllReduceFusionPattern.kAllReduce}
            assert reference.same_bits(comm.allreduce_fusion(**given), summed)
            assert comm.allreduce_fusion(**given, output=only) is only
            assert reference.same_bits(only, summed)
            assert comm.allreduce_fusion(x, workspace, 0, True, False, x) is x  # by position, in place
            assert reference.same_bits(x, summed)
        assert comm.calls == []
        workspace.destroy()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_aliasing(dtype: torch.dtype) -> None:
    rank_pool(2).run(aliasing, dtype)


def other_shapes(rank: Rank) -> None:
    """A promise in bytes: other hidden sizes, no tokens, another dtype, an outer batch; larger is refused."""
    with installed() as comm:
        workspace = create(comm, rank)  # 16 x 64 bf16: 2048 bytes
        for shape, dtype in (
            ((1, 1024), torch.bfloat16),
            ((128, 8), torch.bfloat16),
            ((8, 64), torch.float32),
            ((2, 8, 64), torch.bfloat16),
            ((0, 64), torch.bfloat16),
        ):
            xs = [torch.full(shape, 1.0 + each, dtype=dtype) for each in range(rank.world_size)]
            got = comm.allreduce_fusion(xs[rank.rank], workspace, 0)
            assert reference.same_bits(got, reference.all_reduce(xs))
            if len(shape) == 2:
                assert workspace.is_buffer_size_sufficient(rank.world_size, *shape, dtype)
        for tokens, hidden in ((17, 64), (1, 1032)):
            assert not workspace.is_buffer_size_sufficient(rank.world_size, tokens, hidden, torch.bfloat16)
            with pytest.raises(ValueError, match=r"input: has \d+ bytes, the workspace was made for 2048 at most"):
                comm.allreduce_fusion(torch.ones(tokens, hidden, dtype=torch.bfloat16), workspace, 0)
        assert not workspace.is_buffer_size_sufficient(rank.world_size, 4, 60, torch.bfloat16)  # rows of 120 bytes
        assert not workspace.is_buffer_size_sufficient(rank.world_size, 4, 64, torch.int32)
        assert not workspace.is_buffer_size_sufficient(rank.world_size + 1, 4, 64, torch.bfloat16)
        for choice in ({"use_oneshot": True}, {"strategy": "AUTO"}):
            assert workspace.is_buffer_size_sufficient(rank.world_size, 4, 64, torch.bfloat16, **choice)
        before = workspace.is_buffer_size_sufficient(rank.world_size, 4, 64, torch.bfloat16)
        workspace.destroy()
        assert workspace.is_buffer_size_sufficient(rank.world_size, 4, 64, torch.bfloat16) is before


def test_sizes_are_a_promise_in_bytes() -> None:
    rank_pool(2).run(other_shapes)


def bad_input(rank: Rank) -> list[str]:
    """Each is refused on all ranks, by name, and the workspace goes on."""
    x, r, w, out = rows(rank.rank), rows(5), rows(6)[0], torch.empty(4, HIDDEN, dtype=torch.bfloat16)
    norm = {"pattern": 1, "residual_in": r, "rms_gamma": w}
    told = []
    with installed() as comm:
        workspace = create(comm, rank)
        wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
            *((ValueError, rf"pattern: is {code} \(kMoE.*does not", {"pattern": code}) for code in REFUSED),
            (ValueError, "pattern: is 99, wanted one of 0, 1", {"pattern": 99}),
            (ValueError, "pattern: is 'norm', wanted", {"pattern": "norm"}),
            (ValueError, "residual_in: pattern 1 needs it", {"pattern": 1, "rms_gamma": w}),
            (ValueError, "rms_gamma: pattern 1 needs it", {"pattern": 1, "residual_in": r}),
            (ValueError, "output: pattern 1 does not write it", {**norm, "output": out}),
            (ValueError, "quant_out: pattern 1 does not", {**norm, "quant_out": out}),
            (ValueError, "scale_out: pattern 1 does not", {**norm, "scale_out": out}),
            (ValueError, "norm_out: pattern 0 does not", {"norm_out": out}),
            (ValueError, "residual_out: pattern 0 does not", {"residual_out": out}),
            (TypeError, "stream: mnnvl_ar's allreduce_fusion does not know", {"stream": 3}),
            (RuntimeError, "residual_in: has shape .2, 64., wanted .4, 64. like input", {**norm, "residual_in": r[:2]}),
            (RuntimeError, "residual_in: is float32, wanted", {**norm, "residual_in": r.float()}),
            (RuntimeError, "rms_gamma: has shape .3., wanted .64.", {**norm, "rms_gamma": w[:3]}),
            (RuntimeError, "argument 'rms_eps'", {**norm, "rms_eps": None}),
            (RuntimeError, "norm_out: is float32, wanted bfloat16 like input", {**norm, "norm_out": out.float()}),
            (RuntimeError, "norm_out: has shape", {**norm, "norm_out": out[:3]}),
            (RuntimeError, "norm_out: overlaps residual_out", {**norm, "norm_out": out, "residual_out": out}),
            (RuntimeError, "output: is float32, wanted bfloat16", {"output": out.float()}),
            (RuntimeError, "output: .*contiguous", {"output": torch.empty(HIDDEN, 4, dtype=x.dtype).t()}),
            (RuntimeError, "input: .*contiguous", {"input": torch.empty(HIDDEN, 4, dtype=x.dtype).t()}),
            (RuntimeError, "input: is float64, wanted", {"input": x[:1].double()}),
        ]
        with mock.patch.object(ops, "all_reduce", side_effect=ops.all_reduce) as launched:
            for kind, words, given in wrong:
                with pytest.raises(kind, match=words) as caught:
                    comm.allreduce_fusion(**{"input": x, "workspace": workspace, "pattern": 0, **given})
                told.append(str(caught.value))
            assert works(workspace, comm)
            assert launched.call_count == 3  # the two bad inputs of a call that is like a good one, and this one
        assert comm.allreduce_fusion(x, workspace, 0, newest=None) is not None  # of no consequence
        assert comm.calls == []
        workspace.destroy()
        with pytest.raises(MnnvlArError, match="workspace: was destroyed"):
            comm.allreduce_fusion(input=x, workspace=workspace, pattern=0)
        with pytest.raises(MnnvlArError, match="was destroyed"):
            workspace.checkpoint_prepare()
    return told


def test_bad_input_is_refused_by_name_on_all_ranks() -> None:
    told = rank_pool(2).run(bad_input)
    assert told[0] == told[1]


# A row is quickest early, more of them late: as tables of measurements have it.
MEASURED = Table(
    entries=tuple(
        Entry(rows(0, 1).nbytes, tokens, Strategy.ONE_SHOT, pdl=mode)
        for tokens, mode in ((1, Pdl.EARLY), (9, Pdl.LATE))
    )
)


def pdl(rank: Rank, tokens: int, **environment: str) -> list[int]:
    """How the op is launched: by default, then for launch_with_pdl and trigger_completion_at_end as they may be."""
    seen: list[int] = []

    def note(*arguments: Any, pdl: int = int(Pdl.AUTO), **named: Any) -> Any:
        seen.append(pdl)

    with installed(**environment) as comm, mock.patch("mnnvl_ar.workspace.table_for", return_value=MEASURED):
        workspace = create(comm, rank)
        with (
            mock.patch.object(calls.ops, "all_reduce_out", note),
            mock.patch.object(calls.ops, "all_reduce_rms_norm_out", note),
        ):
            x = rows(rank.rank, tokens)
            for given in ({}, *({"launch_with_pdl": on, "trigger_completion_at_end": at_end}
                                for on in (False, True) for at_end in (True, False))):  # fmt: skip
                comm.allreduce_fusion(input=x, workspace=workspace, pattern=0, output=x, **given)
                comm.allreduce_fusion(
                    input=x, workspace=workspace, pattern=1, residual_in=x, rms_gamma=x[0], norm_out=x, **given
                )
        workspace.destroy()
    assert seen[::2] == seen[1::2]
    return seen[::2]


@pytest.mark.parametrize(
    ("tokens", "mode", "at_end"),
    [
        (1, "", Pdl.LATE),  # measured to be quickest early, which is forbidden
        (5, "", Pdl.AUTO),
        (1, "early", Pdl.LATE),
        (5, "early", Pdl.LATE),
        (1, "late", Pdl.AUTO),
        (1, "off", Pdl.AUTO),
    ],
)
def test_what_pdl_and_the_trigger_mean(tokens: int, mode: str, at_end: Pdl) -> None:
    """As FlashInfer's defaults have it, neither. What a server says is a permission: what is not forbidden is left to
    the workspace."""
    environment = {"MNNVL_AR_PDL": mode} if mode else {}
    wanted = [Pdl.OFF, Pdl.OFF, Pdl.OFF, at_end, Pdl.AUTO]
    assert rank_pool(2).run(pdl, tokens, **environment)[0] == [int(each) for each in wanted]


def launched(rank: Rank) -> list[tuple[str, bool]]:
    """The PDL mode of the workspace that a server's environment gives, and whether its line says so."""
    found = []
    for mode in ("auto", "off", "late", "early"):
        with (
            installed(MNNVL_AR_PDL=mode) as comm,
            mock.patch.object(creation, "Workspace", wraps=creation.Workspace) as made,
            mock.patch.object(creation._log, "info") as line,
        ):
            create(comm, rank).destroy()
            found.append((made.call_args.kwargs["pdl"], f"; PDL {mode};" in line.call_args.args[1]))
    return found


def test_the_mode_that_the_environment_says() -> None:
    wanted = [("auto", False), ("off", True), ("late", True), ("early", True)]
    assert rank_pool(2).run(launched) == [wanted] * 2


def test_our_own_errors_come_as_they_are() -> None:
    """With what they hold, of whatever their constructors take."""
    differ = RanksDiffer(0, "weight", [1], [1, 2, 1], "all_reduce_rms_norm")
    late = PeerTimeout("rank 0 waited", 0, 1, 5, "a", "b", 2.0)
    assert [calls._in_their_words(error) for error in (differ, late)] == [differ, late]
    assert str(calls._in_their_words(RuntimeError("x: is 3, wanted 4"))) == "input: is 3, wanted 4"
