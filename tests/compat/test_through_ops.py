"""MNNVL_AR_THROUGH=ops: who is active, who is left alone, and what it costs where it is not asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

import mnnvl_ar_plugins
from common.ranks import ROOT
from mnnvl_ar.compat import policy, servers
from mnnvl_ar.memory import MULTICAST_SWITCHES


@pytest.fixture
def platforms(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`vllm.platforms` with CUDA there, and the process's environment as it was afterwards."""
    module: Any = ModuleType("vllm.platforms")
    module.cuda_platform_plugin = lambda: servers.CUDA
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", module)
    monkeypatch.setenv("MNNVL_AR", "1")
    monkeypatch.setenv("MNNVL_AR_THROUGH", "ops")
    for name in servers.ENVIRONMENT:
        monkeypatch.setenv(name, "mnnvl")
    return module


def platform_named(name: str) -> Any:
    module, _, kind = name.rpartition(".")
    return type(kind, (), {"__module__": module})()


def test_vllm_is_given_our_platform(platforms: Any) -> None:
    assert mnnvl_ar_plugins.vllm_platform() == servers.PLATFORM
    assert {name: os.environ[name] for name in servers.ENVIRONMENT} == servers.ENVIRONMENT


@pytest.mark.parametrize("theirs", [None, "vllm.platforms.cuda.OtherPlatform"])
def test_where_there_is_no_cuda_as_we_know_it(
    platforms: Any, theirs: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    platforms.cuda_platform_plugin = lambda: theirs
    monkeypatch.setattr(servers, "multicast_refusal", lambda: "")
    assert mnnvl_ar_plugins.vllm_platform() is None
    assert os.environ["VLLM_ALLREDUCE_USE_FLASHINFER"] == "mnnvl"
    assert [record.getMessage() for record in caplog.records] == (
        [] if theirs is None else [f"mnnvl_ar is not active: vLLM's CUDA platform is {theirs}, wanted {servers.CUDA}"]
    )


def test_vllm_that_cannot_say_its_platform(
    platforms: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM goes on without a word after an exception here."""
    platforms.cuda_platform_plugin = mock.Mock(side_effect=RuntimeError("no NVML"))
    monkeypatch.setattr(servers, "multicast_refusal", lambda: "")
    assert mnnvl_ar_plugins.vllm_platform() is None
    assert caplog.messages == ["mnnvl_ar is not active: RuntimeError: no NVML"]
    monkeypatch.setenv("MNNVL_AR_FALLBACK", "0")
    with pytest.raises(SystemExit, match="RuntimeError: no NVML"):
        mnnvl_ar_plugins.vllm_platform()


def test_one_switch_of_multicast_has_all_of_them_set(platforms: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With our platform FlashInfer's trtllm is there for models that call it, and none of us stands around it."""
    for name in MULTICAST_SWITCHES:
        monkeypatch.setenv(name, "")
    assert mnnvl_ar_plugins.vllm_platform() == servers.PLATFORM
    assert {os.environ[name] for name in MULTICAST_SWITCHES} == {""}
    monkeypatch.setenv("NVSHMEM_DISABLE_NVLS", "1")
    assert mnnvl_ar_plugins.vllm_platform() == servers.PLATFORM
    assert {name: os.environ[name] for name in MULTICAST_SWITCHES} == MULTICAST_SWITCHES


@pytest.mark.parametrize(("name", "value"), [("MNNVL_AR", "0"), ("MNNVL_AR_THROUGH", "flashinfer")])
def test_a_platform_that_is_not_asked_for(
    platforms: Any, name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    platforms.cuda_platform_plugin = mock.Mock(side_effect=AssertionError("asked"))
    assert mnnvl_ar_plugins.vllm_platform() is None


def test_the_general_plugin_says_whether_the_platform_is_ours(
    platforms: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(servers, "multicast_refusal", lambda: "")
    monkeypatch.setattr(servers._log, "parent", servers._log.parent)
    platforms.current_platform = platform_named(servers.CUDA)
    mnnvl_ar_plugins.vllm()
    assert policy._server == ""
    platforms.current_platform = platform_named(servers.PLATFORM)
    mnnvl_ar_plugins.vllm()
    assert policy._server == "vllm"
    refused, active = (record.getMessage() for record in caplog.records)
    assert (
        "vLLM's platform is vllm.platforms.cuda.CudaPlatform, wanted mnnvl_ar.compat.vllm_platform.Platform" in refused
    )
    assert "is called as torch.ops.mnnvl_ar in vLLM's graphs, by its platform; where a workspace cannot" in active
    assert "all ranks go to the server's own all-reduce; a fault ends the process with status 87" in active
    assert "flashinfer" not in sys.modules


def test_without_fallback_another_platform_ends_the_process(platforms: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNNVL_AR_FALLBACK", "0")
    platforms.current_platform = platform_named(servers.CUDA)
    with pytest.raises(SystemExit, match="MNNVL_AR_FALLBACK=0"):
        mnnvl_ar_plugins.vllm()


def test_what_is_not_active_imports_nothing() -> None:
    script = "import mnnvl_ar_plugins as p, sys; assert p.vllm_platform() is None; print('torch' in sys.modules)"
    for settings in ({"MNNVL_AR_THROUGH": "ops"}, {"MNNVL_AR": "1"}):
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MNNVL_AR")}
        got = subprocess.run(
            [sys.executable, "-c", script],
            env={**kept, **settings},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert got.stdout == "False\n", got.stderr


class Entry:
    name = "mnnvl_ar"


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNNVL_AR", "1")
    monkeypatch.setenv("MNNVL_AR_THROUGH", "ops")
    monkeypatch.setattr(metadata, "version", lambda name: "0.33.0")
    groups = [servers.GROUPS["vllm"], servers.GROUPS["sglang"]]
    monkeypatch.setattr(metadata, "entry_points", lambda group: [Entry()] if group in groups else [])
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    vllm, sglang = servers.examine()
    assert (vllm["active"], sglang["active"]) == (False, True)
    assert vllm["why_not"].startswith("no entry point in vllm.platform_plugins")
    assert "torch.ops.mnnvl_ar in SGLang's graphs" in sglang["replaces"]
    groups.append(servers.PLATFORMS)
    assert servers.examine()[0]["active"]
