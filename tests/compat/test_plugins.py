"""The servers' entry points: nothing where they are not wanted, and where they are, one line in the server's log."""

from __future__ import annotations

import inspect
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

import mnnvl_ar_plugins
from common.ranks import ROOT
from compat.stand_in import FUNCTIONS, standing_in
from compat.wheels import executed, text_of
from mnnvl_ar.compat import policy, servers
from mnnvl_ar.compat.workspace import FusionWorkspace
from mnnvl_ar.doctor import show
from mnnvl_ar.memory import MULTICAST_SWITCHES


def entry_points(group: str) -> dict[str, str]:
    """Of pyproject.toml. (Python 3.10 has no tomllib.)"""
    part = (ROOT / "pyproject.toml").read_text().split(f'[project.entry-points."{group}"]\n', 1)[1].split("\n[", 1)[0]
    return dict(re.findall(r'^(\w+) = "(.*)"$', part, re.MULTILINE))


@pytest.fixture(autouse=True)
def _logger_as_it_was() -> Iterator[None]:
    log = logging.getLogger("mnnvl_ar")
    parent = log.parent
    yield
    log.parent = parent


@pytest.mark.parametrize("server", servers.GROUPS)
def test_entry_points_lead_to_functions(server: str) -> None:
    ((name, value),) = entry_points(servers.GROUPS[server]).items()
    assert name == servers.NAME
    assert value == f"mnnvl_ar_plugins:{server}"
    assert callable(getattr(mnnvl_ar_plugins, server))


@pytest.mark.parametrize("switch", [None, "0", ""])
def test_inactive_it_imports_nothing(switch: str | None) -> None:
    script = (
        "import sys; before = set(sys.modules); import mnnvl_ar_plugins as plugins; plugins.vllm(); plugins.sglang();"
        "print(*sorted(name.split('.')[0] for name in set(sys.modules) - before))"
    )
    assert imported(script, {} if switch is None else {"MNNVL_AR": switch}) == ["mnnvl_ar_plugins"]


def test_a_switch_without_sense_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("MNNVL_AR", "true")
    mnnvl_ar_plugins.vllm()
    assert "MNNVL_AR: is 'true', wanted 1 or 0: mnnvl_ar is not active" in caplog.text


def test_control_active_it_does_import() -> None:
    script = (
        "import sys, mnnvl_ar_plugins\n"
        "mnnvl_ar_plugins.vllm()\n"
        "print(*sorted({'torch', 'mnnvl_ar'} & set(sys.modules)))"
    )
    assert imported(script, {"MNNVL_AR": "1"}) == ["mnnvl_ar", "torch"]


def imported(script: str, environment: dict[str, str]) -> list[str]:
    switches = {name: "" for name in os.environ if name in ("MNNVL_AR", "MNNVL_AR_FALLBACK")}
    quiet = dict.fromkeys(
        ("NCCL_NVLS_ENABLE", "MNNVL_AR_DISABLE_MULTICAST", "TORCH_SYMM_MEM_DISABLE_MULTICAST", "NVSHMEM_DISABLE_NVLS"),
        "",
    )
    env = {**os.environ, **switches, **quiet, "PYTHONPATH": str(ROOT), **environment}
    got = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=120, check=True
    )
    return got.stdout.split()


@pytest.fixture
def lines() -> Iterator[dict[str, list[str]]]:
    """What arrives at handlers of a logger, by its name, as a server sets them up; "" is the root."""
    told: dict[str, list[str]] = {}
    undo: list[Callable[[], object]] = []
    for name in ("vllm", ""):
        log, handler, found = logging.getLogger(name), logging.Handler(), told.setdefault(name, [])
        handler.emit = lambda record, found=found: found.append(record.getMessage())  # type: ignore[misc]
        undo += [lambda log=log, level=log.level: log.setLevel(level), lambda log=log, h=handler: log.removeHandler(h)]
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    vllm = logging.getLogger("vllm")
    vllm.propagate, before = False, vllm.propagate  # as vLLM sets it up
    yield told
    vllm.propagate = before
    for each in undo:
        each()


def test_vllm(lines: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNNVL_AR", "1")
    with standing_in("0.6.14") as comm:
        before = {name: getattr(comm, name) for name in FUNCTIONS}
        for _ in range(2):  # vLLM loads plugins at three places of a process
            mnnvl_ar_plugins.vllm()
        for name in FUNCTIONS:
            assert inspect.unwrap(getattr(comm, name)) is before[name]
            assert getattr(comm, name).__wrapped__ is before[name]
    assert lines[""] == []
    assert len(lines["vllm"]) == 2
    assert "FlashInfer 0.6.14, backends mnnvl, trtllm; where a workspace cannot be made" in lines["vllm"][0]
    assert lines["vllm"][0].endswith(f"; a fault ends the process with status {policy.STATUS}")


class HookType:
    AROUND = "around"


class HookRegistry:
    """As much of SGLang's as we use, in our words. `test_sglangs_own_registry` uses theirs."""

    hooks: list[tuple[str, Any, Any]] = []  # noqa: RUF012

    @classmethod
    def register(cls, target: str, hook: Any, hook_type: Any) -> None:
        cls.hooks.append((target, hook, hook_type))


def sglang_with(registry: ModuleType) -> Any:
    names = ["sglang", "sglang.srt", "sglang.srt.plugins"]
    modules: dict[str, Any] = {name: ModuleType(name) for name in names}
    for each in modules.values():
        each.__path__ = []
    return mock.patch.dict(sys.modules, {**modules, "sglang.srt.plugins.hook_registry": registry})


def test_sglang(lines: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNNVL_AR", "1")
    registry = ModuleType("hook_registry")
    vars(registry).update(HookRegistry=HookRegistry, HookType=HookType)
    HookRegistry.hooks.clear()
    with standing_in("0.7.2") as comm, sglang_with(registry):
        before = dict(vars(comm))
        mnnvl_ar_plugins.sglang()
        assert dict(vars(comm)) == before  # the registry's to do
    assert [(target, kind) for target, _, kind in HookRegistry.hooks] == [
        (f"flashinfer.comm.{name}", HookType.AROUND) for name in FUNCTIONS
    ]
    assert lines["vllm"] == []
    assert len(lines[""]) == 1


@pytest.mark.parametrize("version", ["0.5.11", "0.5.23"])
def test_sglangs_own_registry(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs, as it is in the wheel: a binding made at import before the plugins were loaded is ours afterwards."""
    registry = executed(text_of("sglang", version, "sglang/srt/plugins/hook_registry.py"), "hook_registry")
    monkeypatch.setenv("MNNVL_AR", "1")
    early = ModuleType("early")
    with standing_in("0.7.2") as comm, sglang_with(registry), mock.patch.dict(sys.modules, {"early": early}):
        originals = {name: getattr(comm, name) for name in FUNCTIONS}
        vars(early)["_create"] = originals[FUNCTIONS[0]]
        mnnvl_ar_plugins.sglang()
        registry.HookRegistry.apply_hooks()
        assert early._create is comm.create_allreduce_fusion_workspace
        for name, original in originals.items():
            ours = getattr(comm, name)
            assert ours is not original
            assert inspect.signature(ours) == inspect.signature(original)
        theirs = object()
        assert comm.allreduce_fusion("x", theirs, 1) == early._create(backend="mnnvl-cutedsl")  # to the originals
        assert [name for name, _ in comm.calls] == [*reversed(FUNCTIONS)]
        with pytest.raises(ValueError, match="neither it nor comm_backend"):  # ours
            early._create(backend="trtllm")


def test_reading_a_wheel_leaves_setup_py_runnable() -> None:
    """In this process: tests/unit/test_setup.py may come later in it."""
    from setuptools import Distribution

    text_of("sglang", "0.5.23", "sglang/srt/plugins/hook_registry.py")
    assert Distribution().get_command_obj("build") is not None  # of another Distribution's class: TypeError


@pytest.mark.parametrize(
    ("environment", "ends"),
    [({}, False), ({"MNNVL_AR_FALLBACK": "0"}, True), ({"MNNVL_AR_DISABLE_MULTICAST": "1"}, True)],
)
def test_a_flashinfer_that_is_not_known(
    environment: dict[str, str], ends: bool, lines: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is left alone; the process ends where FlashInfer's own would be no choice."""
    monkeypatch.setattr(servers, "multicast_refusal", lambda: "".join(environment.keys() - {"MNNVL_AR_FALLBACK"}))
    for name, value in {"MNNVL_AR": "1", **environment}.items():
        monkeypatch.setenv(name, value)
    with standing_in("0.6.14") as comm:
        del comm.allreduce_fusion
        before = dict(vars(comm))
        if ends:
            with pytest.raises(SystemExit, match=r"cannot be active .*there is no allreduce_fusion.*no choice"):
                mnnvl_ar_plugins.vllm()
        else:
            mnnvl_ar_plugins.vllm()
            assert "mnnvl_ar is not active: FlashInfer 0.6.14 is left as it is" in lines["vllm"][0]
        assert dict(vars(comm)) == before


UNLIKE = "flashinfer-cubin version (0.6.13) does not match\nflashinfer version (0.6.14)"  # one of its own errors


@pytest.fixture
def broken_flashinfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose import raises what is no ImportError."""
    (tmp_path / "flashinfer").mkdir()
    (tmp_path / "flashinfer" / "__init__.py").write_text(f"raise RuntimeError({UNLIKE!r})\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("MNNVL_AR", "1")


@pytest.mark.usefixtures("broken_flashinfer")
@pytest.mark.parametrize("server", servers.GROUPS)
@pytest.mark.parametrize("no_choice", [None, "MNNVL_AR_FALLBACK=0", "NCCL_NVLS_ENABLE=0"])
def test_a_flashinfer_whose_import_raises(
    server: str, no_choice: str | None, lines: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang goes on after any exception of a plugin: what is not SystemExit is no refusal."""
    nvls = str(no_choice).startswith("NCCL")
    monkeypatch.setattr(servers, "multicast_refusal", lambda: no_choice if nvls else "")
    monkeypatch.setenv("MNNVL_AR_FALLBACK", "0" if no_choice and not nvls else "1")
    if no_choice:
        with pytest.raises(SystemExit, match=f"cannot be active .RuntimeError: flashinfer-cubin.*{no_choice}$"):
            getattr(mnnvl_ar_plugins, server)()
    else:
        getattr(mnnvl_ar_plugins, server)()
        (line,) = lines["vllm" if server == "vllm" else ""]
        assert line == f"mnnvl_ar is not active: RuntimeError: {' '.join(UNLIKE.split())}"
    assert policy._server == ""


LOADER = """
import mnnvl_ar_plugins
for plugin in (mnnvl_ar_plugins.sglang, mnnvl_ar_plugins.vllm, mnnvl_ar_plugins.vllm_platform):
    try:
        plugin()
    except Exception:  # as SGLang does, and vLLM for platforms
        print("goes on")
    except SystemExit as error:
        print(error)
"""


@pytest.mark.parametrize("breaks", ["library", "torch"])
def test_a_library_that_does_not_load_ends_the_process(breaks: str, tmp_path: Path) -> None:
    environment = {"MNNVL_AR": "1", "MNNVL_AR_THROUGH": "ops", "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    if breaks == "library":
        (tmp_path / "_C.so").write_text("no library")
        environment["MNNVL_AR_LIBRARY"] = str(tmp_path / "_C.so")
        words = "ImportError: mnnvl_ar: .*_C.so does not load under torch .*"
    else:
        (tmp_path / "torch.py").write_text("raise RuntimeError('libcudart\\nis of another CUDA')")
        words = "RuntimeError: libcudart is of another CUDA"
    got = subprocess.run(
        [sys.executable, "-c", LOADER], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )
    told = got.stdout.splitlines()
    assert len(told) == 3, got.stderr  # one line each
    for line in told:
        assert re.fullmatch(f"mnnvl_ar cannot be loaded, and MNNVL_AR=1 asks for it: {words}", line)


@pytest.mark.parametrize("name", MULTICAST_SWITCHES)
@pytest.mark.parametrize("server", servers.GROUPS)
def test_one_switch_of_multicast_has_all_of_them_set(
    server: str, name: str, lines: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's symmetric memory, which is behind FlashInfer's trtllm, knows its own alone."""
    for other in MULTICAST_SWITCHES:
        monkeypatch.setenv(other, MULTICAST_SWITCHES[other] if other == name else "")
    monkeypatch.setenv("MNNVL_AR", "1")
    registry = ModuleType("hook_registry")
    vars(registry).update(HookRegistry=HookRegistry, HookType=HookType)
    with standing_in("0.6.14"), sglang_with(registry):
        getattr(mnnvl_ar_plugins, server)()
    assert {each: os.environ[each] for each in MULTICAST_SWITCHES} == MULTICAST_SWITCHES
    first = lines["vllm" if server == "vllm" else ""][0]
    assert first == (
        f"mnnvl_ar: multicast is switched off by {name}={MULTICAST_SWITCHES[name]}, and so from now on by every other "
        "switch too"
    )


def test_control_where_multicast_is_allowed_no_switch_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MULTICAST_SWITCHES:
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("MNNVL_AR", "1")
    with standing_in("0.6.14"):
        mnnvl_ar_plugins.vllm()
    assert {os.environ[name] for name in MULTICAST_SWITCHES} == {""}


@pytest.mark.parametrize("server", servers.GROUPS)
def test_settings_without_sense_end_the_process(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang goes on after an exception of a plugin, with FlashInfer's own functions."""
    monkeypatch.setenv("MNNVL_AR", "1")
    monkeypatch.setenv("MNNVL_AR_FALLBACK", "never")
    with standing_in("0.6.14"), pytest.raises(SystemExit, match="mnnvl_ar: MNNVL_AR_FALLBACK: is 'never'"):
        getattr(mnnvl_ar_plugins, server)()


# ---- doctor


def examined(server: str) -> dict[str, Any]:
    return next(each for each in servers.examine() if each["server"] == server)


class Entry:
    def __init__(self, name: str) -> None:
        self.name = name


@pytest.fixture
def vllm_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"vllm": "0.26.0", "mnnvl-ar": "0.1.0"}

    def version(name: str) -> str:
        if name not in known:
            raise metadata.PackageNotFoundError(name)
        return known[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [Entry("other"), Entry("mnnvl_ar")])
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


@pytest.mark.usefixtures("vllm_is_installed")
def test_doctor_says_what_would_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNNVL_AR", "1")
    with standing_in("0.6.14") as comm:
        before = {name: getattr(comm, name) for name in FUNCTIONS}
        found = examined("vllm")
        assert {name: getattr(comm, name) for name in FUNCTIONS} == before
        assert not issubclass(FusionWorkspace, comm.AllReduceFusionWorkspace)
    assert (found["version"], found["active"], found["why_not"]) == ("0.26.0", True, "")
    assert show._server(found) == (
        "vLLM 0.26.0: active, mnnvl_ar 0.1.0 stands in for create_allreduce_fusion_workspace and allreduce_fusion of "
        "FlashInfer 0.6.14."
    )
    assert show._server(examined("sglang")) == "SGLang: not active, not installed."


@pytest.mark.usefixtures("vllm_is_installed")
def test_doctor_says_why_it_would_not_be_active(monkeypatch: pytest.MonkeyPatch) -> None:
    def why() -> str:
        found = examined("vllm")
        assert not found["active"]
        return str(found["why_not"])

    with standing_in("0.6.14") as comm:
        assert why() == "MNNVL_AR=1 is not set"
        monkeypatch.setenv("MNNVL_AR", "1")
        assert examined("vllm")["active"]
        monkeypatch.setenv("MNNVL_AR_FALLBACK", "maybe")
        assert why().startswith("MNNVL_AR_FALLBACK: is 'maybe'")
        monkeypatch.delenv("MNNVL_AR_FALLBACK")
        monkeypatch.setenv("VLLM_PLUGINS", "other")
        assert why() == "VLLM_PLUGINS=other leaves mnnvl_ar out"
        monkeypatch.setenv("VLLM_PLUGINS", "other,mnnvl_ar")
        assert examined("vllm")["active"]
        del comm.allreduce_fusion
        assert "there is no allreduce_fusion" in why()
    assert "flashinfer" in why()
    monkeypatch.setattr(servers.flashinfer, "checked", mock.Mock(side_effect=RuntimeError("of another CUDA")))
    assert why() == "RuntimeError: of another CUDA"
    monkeypatch.setattr(metadata, "entry_points", lambda group: [Entry("other")])
    assert why().startswith("no entry point in vllm.general_plugins")
