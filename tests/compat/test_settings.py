"""The environment's words, and words without sense."""

from __future__ import annotations

import pytest

from mnnvl_ar.compat.settings import Settings


def test_defaults() -> None:
    assert Settings.read({}) == Settings(
        ("mnnvl", "trtllm"), True, 600.0, "", 10.0, 200.0, 20.0, "flashinfer", "", "auto"
    )


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"MNNVL_AR_BACKENDS": "trtllm"}, Settings(("trtllm",))),
        ({"MNNVL_AR_BACKENDS": " trtllm , mnnvl,"}, Settings(("trtllm", "mnnvl"))),
        ({"MNNVL_AR_BACKENDS": ""}, Settings(())),
        ({"MNNVL_AR_FALLBACK": "0"}, Settings(fallback=False)),
        ({"MNNVL_AR_TIMEOUT": "1.5"}, Settings(timeout=1.5)),
        ({"MNNVL_AR_ON_FAULT": "log"}, Settings(on_fault="log")),
        ({"MNNVL_AR_ON_FAULT": "exit", "MNNVL_AR_HOLD": "3"}, Settings(on_fault="exit", hold=3.0)),
        ({"MNNVL_AR_STARTUP_DEADLINE": "900"}, Settings(startup_deadline=900.0)),
        ({"MNNVL_AR_DEADLINE": "0.5"}, Settings(deadline=0.5)),
        ({"MNNVL_AR_THROUGH": "ops"}, Settings(through="ops")),
        ({"MNNVL_AR_CALLS": "/a/folder"}, Settings(calls="/a/folder")),
        ({"MNNVL_AR_PDL": "early"}, Settings(pdl="early")),
    ],
)
def test_words(environment: dict[str, str], wanted: Settings) -> None:
    assert Settings.read(environment) == wanted


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BACKENDS", "nccl"),
        ("FALLBACK", "no"),
        ("FALLBACK", ""),
        ("TIMEOUT", "0"),
        ("TIMEOUT", "soon"),
        ("TIMEOUT", "nan"),
        ("ON_FAULT", "raise"),
        ("HOLD", "0"),
        ("HOLD", "long"),
        ("STARTUP_DEADLINE", "-1"),
        ("STARTUP_DEADLINE", "inf"),
        ("DEADLINE", "none"),
        ("THROUGH", "op"),
        ("THROUGH", ""),
        ("PDL", "on"),
        ("PDL", ""),
    ],
)
def test_words_without_sense(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"MNNVL_AR_{name}: "):
        Settings.read({f"MNNVL_AR_{name}": value})


def test_whose_backend_it_is() -> None:
    assert [Settings().ours(each) for each in ("mnnvl", "trtllm", "auto", "mnnvl-cutedsl")] == [
        "mnnvl",
        "trtllm",
        "mnnvl",
        "",
    ]
    assert [Settings(("trtllm",)).ours(each) for each in ("mnnvl", "trtllm", "auto")] == ["", "trtllm", "trtllm"]
    assert Settings(()).ours("auto") == ""
