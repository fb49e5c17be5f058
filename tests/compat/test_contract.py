"""The front against the committed facts of every release: signatures, codes, and how the servers call it."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest

from compat.stand_in import COMMITTED, FUNCTIONS, ORIGINAL, VERSIONS, codes, function, parameters, standing_in
from mnnvl_ar.compat import flashinfer
from mnnvl_ar.compat.calls import fused
from mnnvl_ar.compat.creation import _Asked
from mnnvl_ar.compat.patterns import PATTERNS, REFUSED
from mnnvl_ar.compat.quantised import QUANTISED
from mnnvl_ar.compat.workspace import FusionWorkspace
from mnnvl_ar.errors import MnnvlArError

TAKES = {"create_allreduce_fusion_workspace": inspect.signature(_Asked), "allreduce_fusion": inspect.signature(fused)}
SITES = [(server, version) for server in ("vllm", "sglang") for version in COMMITTED[server]]


@pytest.mark.parametrize("version", VERSIONS)
def test_install_and_uninstall(version: str) -> None:
    with standing_in(version) as comm:
        before = {name: getattr(comm, name) for name in FUNCTIONS}
        signatures = {name: inspect.signature(each) for name, each in before.items()}
        said = flashinfer.install()
        assert f"FlashInfer {version}" in said
        ours = {name: getattr(comm, name) for name in FUNCTIONS}
        assert flashinfer.install() == said  # idempotent
        for name in FUNCTIONS:
            assert ours[name] is not before[name]
            assert getattr(comm, name) is getattr(comm.allreduce, name) is ours[name]
            assert inspect.signature(ours[name]) == signatures[name]  # what SGLang asks
            assert (ours[name].__name__, ours[name].__doc__) == (name, "FlashInfer.")
        assert issubclass(FusionWorkspace, comm.AllReduceFusionWorkspace)
        for _ in range(2):
            flashinfer.uninstall()
            for name in FUNCTIONS:
                assert getattr(comm, name) is getattr(comm.allreduce, name) is before[name]


def test_what_somebody_else_puts_around_ours_stays(caplog: pytest.LogCaptureFixture) -> None:
    with standing_in("0.7.4") as comm:
        before = comm.allreduce_fusion
        flashinfer.install()
        ours = comm.allreduce_fusion

        @functools.wraps(ours)
        def theirs(*args: Any, **kwargs: Any) -> Any:
            return ours(*args, **kwargs)

        comm.allreduce_fusion = theirs
        flashinfer.install()  # ours is in there
        assert comm.allreduce_fusion is theirs
        assert comm.allreduce.allreduce_fusion is ours
        flashinfer.uninstall()
        assert comm.allreduce_fusion is theirs
        assert comm.allreduce.allreduce_fusion is before
        assert "flashinfer.comm.allreduce_fusion is somebody's around ours, and both stay" in caplog.text
        flashinfer.install()
        assert comm.allreduce_fusion is theirs
        assert comm.allreduce.allreduce_fusion.__wrapped__ is before


def test_each_module_is_given_back_what_it_had() -> None:
    with standing_in("0.7.4") as comm:
        home = comm.allreduce.allreduce_fusion
        comm.allreduce_fusion = theirs = functools.wraps(home)(lambda *args, **kwargs: home(*args, **kwargs))
        flashinfer.install()
        assert comm.allreduce_fusion.__wrapped__ is theirs
        flashinfer.uninstall()
        assert comm.allreduce_fusion is theirs
        assert comm.allreduce.allreduce_fusion is home


@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[-1]])
def test_what_is_not_ours_goes_on_as_it_came(version: str) -> None:
    with standing_in(version) as comm:
        flashinfer.install()
        theirs = object()
        assert comm.allreduce_fusion("x", theirs, 7, output="y") == ORIGINAL
        assert comm.allreduce_fusion(input="x", workspace=theirs, pattern=1) == ORIGINAL
        assert comm.create_allreduce_fusion_workspace("mnnvl-cutedsl", 4, rank=1) == ORIGINAL
        assert comm.create_allreduce_fusion_workspace(backend="mnnvl-cutedsl") == ORIGINAL
        first, second, third, fourth = (given for _, given in comm.calls)
        assert (first["workspace"], first["pattern"], first["output"]) == (theirs, 7, "y")
        assert (second["pattern"], second["rms_eps"]) == (1, 1e-6)
        assert (third["backend"], third["world_size"], third["rank"]) == ("mnnvl-cutedsl", 4, 1)
        assert fourth["world_size"] is None


@pytest.mark.parametrize("version", VERSIONS)
def test_we_take_what_each_release_takes(version: str) -> None:
    """By keyword and by position; names by keyword alone are told apart when they are given."""
    for name in FUNCTIONS:
        takes = [each.partition("=")[0] for each in parameters(version, name)]
        positional = takes[: takes.index("*")] if "*" in takes else takes
        bound = TAKES[name].bind(*positional)
        assert {**bound.arguments} == {each: each for each in positional}


@pytest.mark.parametrize(("server", "version"), SITES)
def test_we_take_what_the_servers_give(server: str, version: str) -> None:
    found = 0
    for fact, given in COMMITTED[server][version].items():
        for name, pattern in (("create_allreduce_fusion_workspace", "create(_allreduce_fusion)?_workspace"),
                              ("allreduce_fusion", "allreduce_fusion")):  # fmt: skip
            if re.match(rf"call (\w+\.)*_?{pattern} ", fact):
                keywords = {each.rstrip("?"): None for each in given}
                bound = TAKES[name].bind(**{"input": 0, "workspace": 0, "pattern": 0, **keywords}
                                         if name == "allreduce_fusion" else keywords)  # fmt: skip
                assert "newer" not in bound.arguments, f"{fact}: {bound.arguments['newer']}"
                found += 1
            if re.match(r"call \S*workspace\.is_buffer_size_sufficient ", fact):
                inspect.signature(FusionWorkspace.is_buffer_size_sufficient).bind(
                    0, **{each.rstrip("?"): None for each in given}
                )
    assert found >= 2


def test_every_code_is_known() -> None:
    newest = codes(VERSIONS[-1])
    known = {pattern.name: code for code, pattern in PATTERNS.items()} | {name: code for code, name in REFUSED.items()}
    assert known == newest
    assert {each.epilogue for each in PATTERNS.values()} == {"sum", "norm", *QUANTISED}


def test_a_table_of_patterns_pairs_each_epilogue_with_and_without_the_norm() -> None:
    quantised = [pattern for pattern in PATTERNS.values() if pattern.epilogue not in ("sum", "norm")]
    for pattern in quantised:
        assert ("NormOut" in pattern.name) == pattern.norm
        assert [each.norm for each in quantised if each.epilogue == pattern.epilogue] == [False, True]


# ---- controls: what is not as it should be is refused, and nothing is touched


def without(name: str) -> Callable[[Any], None]:
    return lambda comm: delattr(comm, name)


def other_parameters(name: str, change: Callable[[list[str]], list[str]]) -> Callable[[Any], None]:
    def apply(comm: Any) -> None:
        setattr(comm, name, function(name, change(parameters("0.6.14", name)), comm.calls))

    return apply


def other_code(enum: str, name: str, value: int) -> Callable[[Any], None]:
    return lambda comm: setattr(comm, enum, type(enum, (), {**vars(getattr(comm, enum)), name: value}))


def swapped(takes: list[str]) -> list[str]:
    return [takes[1], takes[0], *takes[2:]]


WRONG: dict[str, tuple[Callable[[Any], None], str]] = {
    "no function": (without("allreduce_fusion"), "there is no allreduce_fusion"),
    "no codes": (without("AllReduceFusionPattern"), "AllReduceFusionPattern.kAllReduce is None, wanted 0"),
    "no layouts": (without("QuantizationSFLayout"), "QuantizationSFLayout.LINEAR is None, wanted 2"),
    "no class": (without("AllReduceFusionWorkspace"), "AllReduceFusionWorkspace is no abstract class"),
    "code": (other_code("AllReduceFusionPattern", "kARResidualRMSNorm", 7), "kARResidualRMSNorm is 7, wanted 1"),
    "late code": (
        other_code("AllReduceFusionPattern", "kARResidualRMSNormMXFP8Quant", 15),
        "kARResidualRMSNormMXFP8Quant is 15, wanted 13",
    ),
    "order": (other_parameters("allreduce_fusion", swapped), "allreduce_fusion has a parameter workspace"),
    "new": (
        other_parameters("allreduce_fusion", lambda takes: [takes[0], "stream", *takes[1:]]),
        "allreduce_fusion has a parameter stream where it is not known",
    ),
    "too few": (
        other_parameters("create_allreduce_fusion_workspace", lambda takes: takes[:7]),
        "create_allreduce_fusion_workspace has no parameter comm_backend",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_another_flashinfer_is_refused_by_name(case: str) -> None:
    change, words = WRONG[case]
    with standing_in("0.6.14") as comm:
        change(comm)
        before = dict(vars(comm))
        with pytest.raises(MnnvlArError, match=re.escape(words)) as caught:
            flashinfer.install()
        assert "FlashInfer 0.6.14 is left as it is" in str(caught.value)
        assert dict(vars(comm)) == before


@pytest.mark.parametrize("part", ["module", "function"])
def test_no_function_alone_is_replaced(part: str) -> None:
    """Where FlashInfer's functions are not where it makes them."""
    with standing_in("0.6.14") as comm:
        home = comm.allreduce
        if part == "module":
            del sys.modules[home.__name__], comm.allreduce
        else:
            del home.allreduce_fusion
        before, there = dict(vars(comm)), dict(vars(home))
        with pytest.raises(MnnvlArError, match=r"there is no flashinfer\.comm\.allreduce"):
            flashinfer.install()
        flashinfer.uninstall()
        assert (dict(vars(comm)), dict(vars(home))) == (before, there)
        assert not issubclass(FusionWorkspace, comm.AllReduceFusionWorkspace)


def test_without_flashinfer() -> None:
    flashinfer.uninstall()
    with pytest.raises(ImportError):
        flashinfer.install()
