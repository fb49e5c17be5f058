"""How a workspace ends that nobody destroys: as garbage, at exit, in a forked child, after its group."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from common.ranks import ROOT

BEGIN = """
    import atexit, gc, os, sys, warnings
    import torch
    from compat.stand_in import standing_in
    from mnnvl_ar.compat import flashinfer
    from mnnvl_ar.workspace import Workspace

    class One:
        def Get_rank(self): return 0
        def Get_size(self): return 1
        def allgather(self, data): return [data]

    warnings.simplefilter("error")
    close = Workspace.close
    Workspace.close = lambda self: (print("closed", flush=True), close(self))[1]
    stack = standing_in("0.6.14")
    comm = stack.__enter__()
    flashinfer.install()
    def made(one=One()):
        return comm.create_allreduce_fusion_workspace("mnnvl", 1, 0, 16, 64, torch.float32, comm_backend=one)
    workspace = made()
    comm.allreduce_fusion(torch.ones(4, 64), workspace, 0)
"""
ENDS = {
    "garbage": ("del workspace; gc.collect(); print('after')", ["closed", "after"]),
    "a cycle": ("workspace.me = workspace; del workspace; gc.collect(); print('after')", ["closed", "after"]),
    "exit": ("print('after')", ["after", "closed"]),
    "exit, of two": ("other = made(); print('after')", ["after", "closed"]),
    "vLLM's atexit": ("atexit.register(workspace.destroy); print('after')", ["after", "closed"]),
    "destroyed, then exit": ("workspace.destroy(); print('after')", ["closed", "after"]),
    "an error": ("print('after'); raise SystemExit(0)", ["after", "closed"]),
}


def ran(end: str) -> list[str]:
    script = textwrap.dedent(BEGIN) + textwrap.dedent(end)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "CUDA_VISIBLE_DEVICES": ""}
    got = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=env, cwd=ROOT)
    assert (got.returncode, got.stderr) == (0, "")
    return got.stdout.split("\n")[:-1]


@pytest.mark.parametrize("end", ENDS)
def test_it_is_closed_once(end: str) -> None:
    what, wanted = ENDS[end]
    assert ran(what) == wanted


def test_a_forked_child_closes_nothing_of_its_parents() -> None:
    what = """
    pid = os.fork()
    if pid == 0:
        workspace.destroy()  # as an atexit function of the child would
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    comm.allreduce_fusion(torch.ones(4, 64), workspace, 0)
    print("after")
    """
    assert ran(what) == ["closed", "after", "closed"]  # the child's did nothing
