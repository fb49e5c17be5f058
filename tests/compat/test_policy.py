"""The policy in a server: whole processes with vLLM's plugin, over the host transport; and when a server serves."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

from common.ranks import ROOT, Rank, rank_pool
from compat.front import create, installed
from compat.wheels import text_of
from mnnvl_ar.compat import policy
from mnnvl_ar.compat.settings import Settings
from mnnvl_ar.errors import PeerTimeout, WorkspaceBroken

DEADLINE = 1.5


class Server:
    """Ranks as processes, and what they left behind."""

    def __init__(self, folder: Path, size: int, environment: dict[str, str]) -> None:
        self.folder = folder
        env = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "MNNVL_AR": "1",
            "MNNVL_AR_DEADLINE": str(DEADLINE),
            **environment,
        }
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "compat.served", str(rank), str(size), str(folder)],
                env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=(folder / f"{rank}.err").open("w"),
            )
            for rank in range(size)
        ]  # fmt: skip

    def calls(self, rank: int) -> list[str]:
        """Numbers of the calls that returned, and "raised"."""
        file = self.folder / f"{rank}.calls"
        return file.read_text().split("\n")[:-1] if file.exists() else []

    def errors(self, rank: int) -> str:
        return (self.folder / f"{rank}.err").read_text()

    def wait_for_calls(self, number: int, patience: float = 90.0) -> None:
        end = time.monotonic() + patience
        while any(len(self.calls(rank)) < number for rank in range(len(self.ranks))):
            assert time.monotonic() < end, [self.errors(rank) for rank in range(len(self.ranks))]
            time.sleep(0.05)

    def ended(self, rank: int, patience: float) -> int | None:
        """Its status; None if it is alive after that time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.ranks[rank].wait(patience)
        return None

    def close(self) -> None:
        for each in self.ranks:
            each.kill()
            each.wait()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Any]:
    started: list[Server] = []

    def start(size: int, **environment: str) -> Server:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        started.append(Server(folder, size, environment))
        return started[-1]

    yield start
    for each in started:
        each.close()


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_stops_ends_all(serve: Any, how: signal.Signals) -> None:
    """Within the deadline and a second; of two times the sooner, as any machine may stand still once."""
    took = seconds_to_end(serve(3, SERVES="1"), how)
    if took >= DEADLINE + 1.0:
        took = seconds_to_end(serve(3, SERVES="1"), how)
    assert took < DEADLINE + 1.0


def seconds_to_end(server: Server, how: signal.Signals) -> float:
    server.wait_for_calls(20)
    began = time.monotonic()
    server.ranks[1].send_signal(how)
    for rank in (0, 2):
        assert server.ended(rank, 30.0) == policy.STATUS, server.errors(rank)
    took = time.monotonic() - began
    last = int(server.calls(1)[-1]) + 1  # of those it took part in: it may have sent its rows before it stopped
    for rank in (0, 2):
        assert int(server.calls(rank)[-1]) <= last  # neither returned nor raised after that
        assert f"mnnvl_ar ends rank {rank} with status {policy.STATUS}: rank 1 is at fault. " in server.errors(rank)
    return took


def test_control_a_fault_that_is_logged_leaves_the_process(serve: Any) -> None:
    server = serve(2, SERVES="1", MNNVL_AR_ON_FAULT="log")
    server.wait_for_calls(20)
    server.ranks[1].send_signal(signal.SIGSTOP)
    assert server.ended(0, DEADLINE + 2.0) is None
    assert server.calls(0)[-1] == "raised"
    assert "for rank 1 in" in server.errors(0)
    (server.folder / "over").touch()
    assert server.ended(0, 30.0) == 0


def test_a_rank_that_makes_no_calls_ends_too(serve: Any) -> None:
    """It is the one that the other waits for, and hears of it from the other's marks alone."""
    server = serve(2, SERVES="1", NAP="1000")
    server.wait_for_calls(4)
    assert server.ended(0, 30.0) == policy.STATUS
    assert server.ended(1, 30.0) == policy.STATUS
    assert [server.calls(rank)[-1] for rank in (0, 1)] == ["4", "4"]
    for rank in (0, 1):
        assert f"ends rank {rank} with status {policy.STATUS}: rank 1 is at fault" in server.errors(rank)


@pytest.mark.parametrize("serves", ["0", "1"])
def test_the_deadline_is_long_until_the_server_serves(serve: Any, serves: str) -> None:
    server = serve(2, SERVES=serves, NAP=str(2 * DEADLINE), LAST="8")
    if serves == "1":
        assert [server.ended(rank, 90.0) for rank in (0, 1)] == [policy.STATUS] * 2
        return
    server.wait_for_calls(8)
    (server.folder / "over").touch()
    assert [server.ended(rank, 30.0) for rank in (0, 1)] == [0, 0]
    assert [server.calls(rank)[-1] for rank in (0, 1)] == ["8", "8"]


# ---- by itself


def deadlines(rank: Rank) -> list[float | None]:
    """Of workspaces that are there when the server begins to serve, asleep then, closed then, and made later."""
    with (
        installed(MNNVL_AR_STARTUP_DEADLINE="50", MNNVL_AR_DEADLINE="5") as comm,
        mock.patch.object(policy, "_serving", False),
    ):
        first = create(comm, rank)
        found = [first._shared.workspace.deadline]
        first.destroy()
        second = create(comm, rank)
        second.checkpoint_prepare()
        policy.serving()
        found.append(second._shared.workspace.deadline)
        second.checkpoint_restore(rank.group)
        found.append(second._shared.workspace.deadline)
        second.destroy()
        third = create(comm, rank)
        found.append(third._shared.workspace.deadline)
        third.destroy()
        return found


def test_serving_is_for_all_workspaces() -> None:
    assert rank_pool(2).run(deadlines) == [[50.0, 50.0, 5.0, 5.0]] * 2


@pytest.mark.parametrize(
    ("server", "said", "ends"),
    [("", "", False), ("", "exit", True), ("vllm", "", True), ("vllm", "log", False), ("sglang", "exit", True)],
)
def test_who_ends(server: str, said: str, ends: bool) -> None:
    policy.activate(server)
    assert (policy.handler(Settings(on_fault=said)) is policy.end) is ends


def test_last_words_are_one_line() -> None:
    line = policy.last_words(PeerTimeout("waited\n\n1 s", rank=2, peer=0))
    assert line == f"mnnvl_ar ends rank 2 with status {policy.STATUS}: rank 0 is at fault. waited 1 s"
    assert "could not be made out here. text" in policy.last_words(WorkspaceBroken("text", rank=2))


def test_a_log_that_blocks_keeps_no_process() -> None:
    script = (
        "import logging, time; from mnnvl_ar.compat import policy; from mnnvl_ar.errors import WorkspaceBroken\n"
        "handler = logging.Handler(); handler.emit = lambda record: time.sleep(1000)\n"
        "logging.getLogger('mnnvl_ar').addHandler(handler)\n"
        "policy.end(WorkspaceBroken('why', rank=0, peer=1))"
    )
    got = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert (got.returncode, "rank 1 is at fault. why" in got.stderr) == (policy.STATUS, True)


def servers_module(server: str, *, without: bool = False) -> Any:
    """What puts a stand-in for the server's module in place; its class, and the method's name."""
    module, name, method = policy.MOMENTS[server]
    owner = type(name, (), {} if without else {method: lambda self, *given: given})
    stand_in = ModuleType(module)
    setattr(stand_in, name, owner)
    return mock.patch.dict(sys.modules, {module: stand_in}), owner, method


@pytest.mark.parametrize("server", policy.MOMENTS)
def test_when_a_server_serves(server: str) -> None:
    modules, owner, method = servers_module(server)
    policy.activate(server)
    with modules:
        for _ in range(2):  # workspaces
            policy._learn_when()
    wrapped = getattr(owner, method)
    assert not hasattr(wrapped.__wrapped__, "__wrapped__")  # once
    assert not policy._serving
    assert getattr(owner(), method)("batch", "result") == ("batch", "result")
    assert policy._serving


@pytest.mark.parametrize("server", policy.MOMENTS)
def test_a_method_that_fails_serves_nothing(server: str) -> None:
    modules, owner, method = servers_module(server)
    policy.activate(server)

    def fails(_: object) -> None:
        raise RuntimeError("no memory")

    setattr(owner, method, fails)
    with modules:
        policy._learn_when()
    with pytest.raises(RuntimeError, match="no memory"):
        getattr(owner(), method)()
    assert not policy._serving


@pytest.mark.parametrize("server", policy.MOMENTS)
@pytest.mark.parametrize("missing", ["module", "method"])
def test_where_it_is_not_known_a_line_says_so(server: str, missing: str, caplog: pytest.LogCaptureFixture) -> None:
    policy.activate(server)
    with servers_module(server, without=True)[0] if missing == "method" else contextlib.nullcontext():
        for _ in range(2):
            policy._learn_when()
    (record,) = caplog.records
    assert f"{server} has no {'.'.join(policy.MOMENTS[server])} here" in record.getMessage()
    assert policy.deadline(Settings()) == Settings.startup_deadline


def test_without_a_server_nothing_is_looked_for(caplog: pytest.LogCaptureFixture) -> None:
    policy._learn_when()
    assert not caplog.records


@pytest.mark.parametrize(
    ("server", "version"),
    [
        *(("vllm", version) for version in ("0.20.2", "0.26.0", "0.33.0")),
        *(("sglang", version) for version in ("0.5.11", "0.5.17", "0.5.23")),
    ],
)
def test_the_wheels_have_the_method(server: str, version: str) -> None:
    """And the server calls it by its name on the object."""
    module, name, method = policy.MOMENTS[server]
    text = text_of(server, version, module.replace(".", "/") + ".py")
    part = text.split(f"\nclass {name}(", 1)[1].split("\nclass ", 1)[0]
    assert f"\n    def {method}(" in part
    if server == "sglang":
        assert f"self.{method}(" in part.split("def event_loop_overlap(", 1)[1]
    else:
        assert f'"{method}"' in text_of(server, version, "vllm/v1/executor/abstract.py")
