"""`python -m mnnvl_ar doctor` as a rank of a group: rank 0 reports in time, whatever becomes of the others.

Ranks meet over TCP, as torchrun has them do; there a lost name look-up costs 5 s, so deadlines have that much room.
"""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore, PrefixStore

from bench.launch import free_port
from common.ranks import PRELOADED
from mnnvl_ar.doctor import board

ROOT = Path(__file__).parents[2]
LIMIT = 24.0  # --timeout: ranks meet within a half, a call waits for a quarter
PROGRAM = """
import os, signal, sys, threading, time
import torch.distributed as dist
import mnnvl_ar
from mnnvl_ar.__main__ import main
from mnnvl_ar.doctor import board, machine, selftest
from mnnvl_ar.memory import hosts

calls, real = 0, mnnvl_ar.ops.all_reduce_out

def at_call_5(fault):
    def call(*arguments):
        global calls
        calls += 1
        if calls == 5:
            fault()
        return real(*arguments)
    mnnvl_ar.ops.all_reduce_out = call

def injected(*_):
    raise RuntimeError("injected")

def hang(*_):
    threading.Thread(target=time.sleep, args=(1000,), daemon=False).start()  # which a regular exit would wait for
    time.sleep(1000)

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

rank = int(os.environ["RANK"])
exec(os.environ["FAULT"])
sys.exit(main(["doctor", *sys.argv[1:]]))
"""
KILL = "if rank == 1: at_call_5(kill)"
KILL_EARLY = "if rank == 1: dist.init_process_group = kill"  # while the others wait for it in the store
RAISE = "if rank == 1: at_call_5(injected)"


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", **more}


def live(environ: dict[str, str], arguments: list[str], out: str, err: str) -> None:
    """A rank's life, in a process of its own that has PyTorch already: importing it takes longer than all else here."""
    for number, name in ((1, out), (2, err)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv[1:] = arguments
    exec(compile(PROGRAM, "PROGRAM", "exec"), {"__name__": "rank"})


class Ranks:
    """Runs ranks of the doctor with `fault` in them; those of `left_out` never come. Rank 0 hosts the store."""

    def __init__(
        self, size: int, *options: str, fault: str = "", limit: float = LIMIT, left_out: int = -1, **env: str
    ) -> None:
        place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "FAULT": fault}
        arguments = ["--seconds", "0.2", "--timeout", str(limit), *options]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        began, self.processes = time.monotonic(), {}
        with tempfile.TemporaryDirectory() as folder:
            out, err = ({rank: f"{folder}/{name}{rank}" for rank in range(size)} for name in ("out", "err"))
            for rank in range(size):
                if rank != left_out:
                    about = environment(**place, RANK=str(rank), LOCAL_RANK=str(rank), **env)
                    self.processes[rank] = context.Process(target=live, args=(about, arguments, out[rank], err[rank]))
                    self.processes[rank].start()
            for process in self.processes.values():
                process.join(limit + 40 - (time.monotonic() - began))
            self.seconds = time.monotonic() - began
            for process in self.processes.values():
                if process.is_alive():
                    process.kill()
                process.join()
            self.out, self.err = (
                {rank: Path(names[rank]).read_text() for rank in self.processes} for names in (out, err)
            )
        self.status = {rank: process.exitcode for rank, process in self.processes.items()}

    def found(self) -> dict[str, Any]:
        """Rank 0's report, with --json. Nothing else is on any rank's stdout."""
        assert not any(text for rank, text in self.out.items() if rank != 0)
        found = json.loads(self.out[0])
        assert isinstance(found, dict)
        return found


def test_all_is_well() -> None:
    ranks = Ranks(2, "--json")
    assert ranks.status == {0: 0, 1: 0}, ranks.err
    found = ranks.found()
    assert found["self_test"]["ranks"] == found["outlook"]["ranks"] == 2
    assert found["hosts"][0]["ranks"] == [0, 1]
    assert found["problems"] == []


@pytest.mark.slow
def test_a_rank_is_killed_in_the_self_test() -> None:
    ranks = Ranks(3, "--json", fault=KILL)
    assert ranks.status == {0: 1, 1: -signal.SIGKILL, 2: 1}, ranks.err
    first, *others = ranks.found()["self_test"]["errors"]
    assert first.startswith("rank 1: said nothing more")
    assert any(line.startswith("rank 0: ") and "for rank 1 in" in line for line in others), others
    assert any(line.startswith("rank 2: ") for line in others), others
    assert not any("csrc/" in line for line in others), "an op's words, where the workspace has plainer ones"
    assert ranks.seconds < LIMIT + 20


@pytest.mark.slow
def test_a_rank_raises_in_the_self_test() -> None:
    ranks = Ranks(3, "--json", fault=RAISE)
    assert ranks.status == {0: 1, 1: 1, 2: 1}, ranks.err
    found = ranks.found()["self_test"]
    assert "rank 1: injected" in found["errors"]
    assert "injected" in found["by_rank"]["1"]["traceback"]
    assert any(line.startswith("rank 0: ") and "for rank 1" in line for line in found["errors"])


@pytest.mark.slow
def test_a_rank_never_comes() -> None:
    ranks = Ranks(3, left_out=1)
    assert ranks.status == {0: 1, 2: 1}, ranks.err
    assert f"PROBLEM: self-test, ranks 0 and 2: rank 1 did not come within {LIMIT / 2:.0f} s" in ranks.out[0]
    assert "(ranks 0 and 2): PyTorch" in ranks.out[0]
    assert "a group of 2 ranks (rank 1 did not come) would" in ranks.out[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_rendezvous_is_out_of_reach(rank: int) -> None:
    env = {"TORCHELASTIC_USE_AGENT_STORE": "True"}  # nobody is there to host it
    ranks = Ranks(2, "--json", limit=8.0, left_out=1 - rank, **env)
    assert ranks.status == {rank: 1}
    said = "cannot reach the store at MASTER_ADDR:MASTER_PORT 127.0.0.1:"
    if rank == 0:
        found = ranks.found()
        assert found["hosts"][0]["torch"]["version"]
        assert any(f"self-test, rank 0: {said}" in line for line in found["problems"])
    else:
        assert f"rank 0 was not told: rank 1: {said}" in ranks.err[1]


def test_without_an_address() -> None:
    ranks = Ranks(1, fault="os.environ['MASTER_ADDR'] = ''")
    assert ranks.status == {0: 1}
    assert "PROBLEM: self-test, rank 0: MASTER_ADDR is '' and MASTER_PORT is" in ranks.out[0]


@pytest.mark.parametrize("where", ["looking at its machine", "in the self-test"])
def test_rank_0_itself_hangs(where: str) -> None:
    """In a driver call, say, which cannot be ended from outside: it reports all the same, and its process ends."""
    name = "machine.examine" if where == "looking at its machine" else "selftest.measure"
    ranks = Ranks(1, "--json", fault=f"{name} = hang", limit=8.0)  # in which a busy machine looks at itself
    assert ranks.status == {0: 1}, ranks.err
    assert f"rank 0: still {where} after 8 s" in ranks.found()["self_test"]["errors"]
    assert ranks.seconds < 8 + 30


APART = "hosts.identity = lambda: f'host{rank}/boot{rank}/1'"
# Two GPUs, of which each rank's container shows it one, with multicast and without any IMEX channel.
ONE_GPU = """
gpu = {"index": 0, "name": "G", "uuid": f"{rank:032x}", "capability": "9.0", "memory": 1 << 30}
gpu |= {"multicast": True, "fabric_handles": True, "fd_handles": True}
machine._gpus = lambda: {"gpus": [gpu], "p2p": [[True]], "p2p_atomics": [[True]], "driver_api": 13000}
machine._imex = lambda: {"channels": [], "config": False}
machine.torch.version.cuda = "13.0"
machine.multicast_refusal = lambda: ""  # what is asked here is the outlook; the environment of tests forbids multicast
"""


def test_several_hosts_without_gpus() -> None:
    """Bring-up says so itself, on all ranks alike."""
    found = (ranks := Ranks(2, "--json", fault=APART)).found()
    assert ranks.status == {0: 1, 1: 1}, ranks.err
    assert [(host["host"], host["ranks"]) for host in found["hosts"]] == [("host0", [0]), ("host1", [1])]
    assert found["outlook"]["transport"] == "none"
    (error,) = found["self_test"]["errors"]
    assert error.startswith("ranks 0 and 1: ")
    assert "rank 1 is not on the host of rank 0" in error


@pytest.mark.parametrize("hosts", [1, 2])
def test_containers_with_a_gpu_each(hosts: int) -> None:
    ranks = Ranks(2, "--json", "--seconds", "0", fault=ONE_GPU + (APART if hosts == 2 else ""))
    found = ranks.found()
    seen = [[g["ranks"] for g in host["gpus"]] for host in found["hosts"]]
    assert seen == ([[[0], [1]]] if hosts == 1 else [[[0]], [[1]]]), (found["problems"], ranks.err)
    assert found["outlook"]["transport"].startswith("multicast")
    problems = " ".join(found["problems"])
    assert ranks.status == {0: hosts - 1, 1: 0}, ranks.err
    assert ("host0: no IMEX channel" in problems and "host1: no IMEX channel" in problems) == (hosts == 2)


@pytest.mark.slow
def test_a_rank_cannot_tell_its_result() -> None:
    fault = """
tell = board.Board.tell
board.Board.tell = lambda *what: hang() if what[1:3] == ("result", 1) else tell(*what)
"""
    ranks = Ranks(2, "--json", fault=fault, limit=16.0)
    assert ranks.status == {0: 1, 1: 1}, ranks.err
    (error,) = ranks.found()["self_test"]["errors"]
    assert error.startswith("rank 1: said nothing more")
    assert "rank 0 was not told: rank 1: still telling its result after 16 s" in ranks.err[1]


def test_wrong_bits() -> None:
    ranks = Ranks(2, "--json", fault="mnnvl_ar.reference.same_bits = lambda *_: False")
    assert ranks.status == {0: 1, 1: 1}, ranks.err
    assert ranks.found()["self_test"]["errors"] == ["ranks 0 and 1: 3 of 3 sums differ from the reference"]


@pytest.mark.parametrize("ended", ["by SIGTERM", "by time"])
def test_what_was_told_before_the_end_is_heard(ended: str) -> None:
    """Though it ends before the first look: a rank that came, and then was killed, is not one that never came."""
    told, heard = board.Board.__new__(board.Board), dict[int, str]()
    told.store = PrefixStore("doctor", HashStore())
    told.tell("machine", 1, "here")
    until = math.inf if ended == "by SIGTERM" else 0.0
    told.hear("machine", range(3), heard, until, lambda: ended == "by SIGTERM")
    assert heard == {1: "here"}


def torchrun(fault: str, tmp_path: Path) -> list[str]:
    """Three ranks; the errors of the self-test as rank 0 reports them."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "--master-addr", "127.0.0.1"]
    doctor = [str(program), "--json", "--seconds", "0.2", "--timeout", str(LIMIT)]
    got = subprocess.run(
        [*launcher, "--master-port", str(free_port()), *doctor],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=environment(FAULT=fault),
    )
    assert got.returncode == 1
    errors = json.loads(got.stdout)["self_test"]["errors"]
    assert isinstance(errors, list)
    return errors


@pytest.mark.slow
@pytest.mark.parametrize("fault", [KILL, KILL_EARLY])
def test_torchrun_loses_a_rank(fault: str, tmp_path: Path) -> None:
    """It ends the others by SIGTERM at once, so rank 0 has to report before it goes."""
    errors = torchrun(fault, tmp_path)
    assert errors[0].startswith("rank 1: said nothing more"), errors
    assert any(line.startswith(("rank 0: ended by SIGTERM", "ranks 0 and 2: ended")) for line in errors[1:]), errors


@pytest.mark.slow
def test_a_rank_of_torchrun_raises(tmp_path: Path) -> None:
    """It does not exit before rank 0 has reported, or torchrun would end rank 0 before that has anything to say."""
    errors = torchrun(RAISE, tmp_path)
    assert "rank 1: injected" in errors
    assert any(line.startswith("rank 0: ") and "for rank 1 in" in line for line in errors), errors
