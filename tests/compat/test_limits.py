"""A call waits no longer than a server's own limit for a step allows, and says what was made of it."""

from __future__ import annotations

import contextlib
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from common.ranks import Rank, rank_pool
from compat.front import create, installed
from mnnvl_ar.compat import limits, policy
from mnnvl_ar.compat.settings import Settings


def vllm(seconds: Any = 300) -> dict[str, ModuleType]:
    module: Any = ModuleType("vllm.envs")
    module.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS = seconds
    return {module.__name__: module}


def sglang(seconds: Any = 300, *, new: bool = True) -> dict[str, ModuleType]:
    """Newer releases have a configuration by parts, and no longer answer the older question."""
    context, arguments = ModuleType("sglang.srt.runtime_context"), ModuleType("sglang.srt.server_args")
    context.get_device = lambda: SimpleNamespace(watchdog_timeout=seconds)  # type: ignore[attr-defined]
    older = mock.Mock(side_effect=RuntimeError("gone")) if new else lambda: SimpleNamespace(watchdog_timeout=seconds)
    arguments.get_global_server_args = older  # type: ignore[attr-defined]
    return {each.__name__: each for each in ((context, arguments) if new else (arguments,))}


@pytest.mark.parametrize(
    ("server", "modules", "wanted"),
    [
        ("vllm", vllm(120), ("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", 120.0)),
        ("sglang", sglang(90), ("--watchdog-timeout", 90.0)),
        ("sglang", sglang(90, new=False), ("--watchdog-timeout", 90.0)),
        ("sglang", sglang(None), None),
        ("vllm", {}, None),
        ("", vllm(), None),
    ],
)
def test_the_limit_of_a_step(server: str, modules: dict[str, ModuleType], wanted: Any) -> None:
    with mock.patch.dict(sys.modules, modules):
        assert limits.of_a_step(server) == wanted


@pytest.mark.parametrize(
    ("limit", "deadline", "served"),
    [(300, 20.0, 20.0), (300, 150.0, 150.0), (300, 250.0, 150.0), (10, 20.0, 5.0), (None, 250.0, 250.0)],
)
def test_half_of_it_at_most(limit: Any, deadline: float, served: float) -> None:
    policy.activate("vllm")
    with mock.patch.dict(sys.modules, vllm(limit) if limit else {}):
        settings = Settings(deadline=deadline)
        assert policy.deadline_served(settings) == served
        assert policy.deadline(settings) == settings.startup_deadline  # no step has a limit yet
        policy._told = True  # nobody will say when there are any
        assert policy.deadline(settings) == (min(200.0, limit / 2) if limit else 200.0)
        policy.serving()
        assert policy.deadline(settings) == served


def test_control_without_a_server_nothing_is_cut() -> None:
    with mock.patch.dict(sys.modules, vllm(10)):
        assert policy.deadline_served(Settings(deadline=250.0)) == 250.0


def made(rank: Rank, limit: int) -> tuple[Any, list[str]]:
    """The deadline of a workspace once the server serves, and what was said."""
    said: list[str] = []
    environment = {"MNNVL_AR_DEADLINE": "50", "MNNVL_AR_STARTUP_DEADLINE": "500"}
    policy.activate("vllm")
    worker = SimpleNamespace(Worker=type("Worker", (), {"compile_or_warm_up_model": lambda self: None}))
    modules = {**vllm(limit), policy.MOMENTS["vllm"][0]: worker}
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.dict(sys.modules, modules),
        mock.patch.object(policy, "_serving", False),
        mock.patch.object(policy, "_lines_told", set()),
        mock.patch.object(policy._log, "warning", lambda text, *given: said.append(text % given)),
        contextlib.ExitStack() as stack,
    ):
        stack.callback(policy.activate, "")
        comm = stack.enter_context(installed())
        first, second = create(comm, rank), create(comm, rank, max_token_num=2)
        before = first._shared.workspace.deadline
        worker.Worker().compile_or_warm_up_model()
        after = first._shared.workspace.deadline
        first.destroy()
        second.destroy()
        return (before, after), said


def test_a_workspace_obeys_and_a_line_says_so() -> None:
    for deadlines, said in rank_pool(2).run(made, 60):
        assert deadlines == (500.0, 30.0)
        assert len(said) == 2
        assert "MNNVL_AR_DEADLINE is 50 s; calls will wait 30 s, half of vllm's own limit" in said[0]
        assert "until the server serves calls wait 500 s, longer than vllm's own limit" in said[1]
    for deadlines, said in rank_pool(2).run(made, 600):
        assert (deadlines, said) == ((500.0, 50.0), [])
