"""The launcher of ranks: what it says of ranks that fail, and that none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.ranks import ROOT, TEST_LIBRARY
from mnnvl_ar import ranks
from mnnvl_ar.ranks import Outcome, Rank, RankPool, RanksFailed

LONG = 600.0
LIMIT = 120.0  # seconds, which a busy machine may take to start ranks


@pytest.fixture
def pool() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.discard()


def script(file: Path, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    file.write_text(textwrap.dedent(text))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(file), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT)


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: list[int]) -> None:
    until = time.monotonic() + LIMIT
    while any(is_there(pid) for pid in pids):
        assert time.monotonic() < until, pids
        time.sleep(0.02)


# What ranks do in these tests; rank 1 does something odd.


def number(rank: Rank, *arguments: Any) -> tuple[Any, ...]:
    return rank.rank, *arguments


def add(rank: Rank, after: float = 0.0) -> float:
    import torch
    import torch.distributed as dist

    time.sleep(after)
    total = torch.tensor(rank.rank + 1.0)
    dist.all_reduce(total, group=rank.join(LIMIT))
    return total.item()


def fall(rank: Rank) -> int:
    if rank.rank == 1:
        raise LookupError("rank 1 fell")
    return rank.rank


def fall_when_there(rank: Rank, files: list[Path]) -> None:
    while not files[rank.rank].exists():
        time.sleep(0.01)
    raise LookupError(f"rank {rank.rank} fell")


def fall_while_waited_for(rank: Rank) -> None:
    if rank.rank == 1:
        raise LookupError("rank 1 fell")
    time.sleep(LONG)


def die(rank: Rank, how: int) -> int:
    if rank.rank == 1:
        os.kill(os.getpid(), how)
        time.sleep(LONG)
    return rank.rank


def leave(rank: Rank) -> None:
    os._exit(7)


def hang(rank: Rank) -> int:
    if rank.rank == 1:
        time.sleep(LONG)
    return rank.rank


def return_a_function(rank: Rank) -> Any:
    return (lambda: 0) if rank.rank == 1 else 0


def tell(rank: Rank, times: int, pause: float) -> None:
    for time_ in range(times):
        rank.tell((rank.rank, time_))
        time.sleep(pause)


def variable(rank: Rank, name: str) -> str | None:
    return os.environ.get(name)


def test_the_first_call_of_the_docstring(tmp_path: Path) -> None:
    text = "".join(line for line in ranks.__doc__.splitlines(True) if line.startswith("    ") or not line.strip())
    done = script(tmp_path / "first.py", text)
    assert (done.returncode, done.stdout) == (0, "[3.0, 3.0]\n"), done.stderr


def test_a_group_stays_for_the_next_run(pool: RankPool) -> None:
    assert pool.run(add) == pool.run(add) == [3.0, 3.0]
    assert pool.run(number, 5) == [(0, 5), (1, 5)]
    assert pool.close() == [0, 0]


def test_a_rank_that_raises(pool: RankPool) -> None:
    pids = pool.pids
    with pytest.raises(RanksFailed, match="fall failed on 1 ranks") as failed:
        pool.run(fall)
    assert failed.value.problems.keys() == {1}
    assert "in fall\n" in failed.value.problems[1]
    assert failed.value.problems[1].endswith("LookupError: rank 1 fell\n")
    gone(pids)
    assert pool.run(number) == [(0,), (1,)], "and there are new ranks to be had"


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_the_first_to_fail_is_named_first(pool: RankPool, tmp_path: Path, order: list[int]) -> None:
    files = [tmp_path / str(rank) for rank in range(2)]
    running = pool.start(fall_when_there, files)
    files[order[0]].touch()
    assert running.wait(LIMIT) == []
    assert list(running.ended) == order[:1]
    files[order[1]].touch()
    with pytest.raises(RanksFailed) as failed:
        running.results(LIMIT, grace=LIMIT)
    assert list(failed.value.problems) == order


def test_others_get_a_little_time_once_one_has_failed(pool: RankPool) -> None:
    pool.run(number)
    began = time.monotonic()
    outcomes = pool.start(fall_while_waited_for).outcomes(LONG, grace=1.0)
    assert time.monotonic() - began < LIMIT
    assert outcomes[0] == Outcome(False, "still running 1 s after another rank's error")
    assert outcomes[1].value.endswith("LookupError: rank 1 fell\n")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_rank_that_dies(pool: RankPool, how: int) -> None:
    outcomes = pool.start(die, int(how)).outcomes(LIMIT)
    assert outcomes == [Outcome(True, 0), Outcome(False, f"process ended with exit code {-how}")]
    assert pool.close() == [0, -how], "the others end by themselves"


def test_a_rank_that_leaves(pool: RankPool) -> None:
    outcomes = pool.start(leave).outcomes(LIMIT)
    assert outcomes == [Outcome(False, "process ended with exit code 7")] * 2


@pytest.mark.parametrize("how", [None, signal.SIGSTOP])
def test_a_rank_that_hangs_past_the_limit_is_killed(pool: RankPool, how: int | None) -> None:
    pool.run(number)  # its processes are ready
    pids = pool.pids
    running = pool.start(hang) if how is None else pool.start(die, int(how))
    outcomes = running.outcomes(3.0)
    assert outcomes == [Outcome(True, 0), Outcome(False, "still running after 3 s")]
    gone(pids[1:])
    assert is_there(pids[0])
    assert pool.close() == [0, -signal.SIGKILL]


def test_each_message_begins_the_time_limit_anew(pool: RankPool) -> None:
    heard: list[tuple[int, Any]] = []
    pool.run(number)
    times, pause, limit = 12, 0.5, 4.0
    began = time.monotonic()
    pool.start(tell, times, pause).results(limit, heard=lambda rank, message: heard.append((rank, message)))
    assert time.monotonic() - began > limit
    for rank in (0, 1):
        assert [message for who, message in heard if who == rank] == [(rank, number) for number in range(times)]


def test_what_cannot_be_sent_back_is_its_ranks_failure(pool: RankPool) -> None:
    with pytest.raises(RanksFailed) as failed:
        pool.run(return_a_function)
    assert failed.value.problems.keys() == {1}
    assert "pickle" in failed.value.problems[1]


def test_a_run_that_is_given_up_has_no_part_in_the_next(pool: RankPool) -> None:
    pids = pool.pids
    pool.start(hang)
    assert pool.run(number, "new") == [(0, "new"), (1, "new")]
    gone(pids)


def test_an_interrupted_wait_ends_the_ranks(pool: RankPool) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    pids = pool.pids
    with pytest.raises(KeyboardInterrupt):
        pool.start(tell, 1, LONG).results(LIMIT, heard=interrupt)
    gone(pids)


def test_an_exception_ends_the_ranks_at_once() -> None:
    pids: list[int] = []

    def fail() -> None:
        with RankPool(2) as pool:
            pids.extend(pool.pids)
            pool.start(hang)
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    gone(pids)


ORPHANS = """
    import os, sys, time
    from mnnvl_ar.ranks import RankPool

    def work(rank):
        if sys.argv[1] == "busy":
            rank.tell(os.getpid())
            while True:
                time.sleep(0.01)

    if __name__ == "__main__":
        pool = RankPool(2)
        print(*pool.pids, flush=True)
        if sys.argv[1] == "busy":
            running, told = pool.start(work), []
            while len(told) < 2:
                told += running.wait(60)
        else:
            pool.run(work)
        print("ready", flush=True)
        time.sleep(600) if sys.argv[2] == "killed" else sys.exit(3)
"""


@pytest.mark.parametrize("ranks_are", ["busy", "idle"])
@pytest.mark.parametrize("end", ["killed", "over"])
def test_no_rank_outlives_its_parent(ranks_are: str, end: str, tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(textwrap.dedent(ORPHANS))
    command = [sys.executable, str(tmp_path / "parent.py"), ranks_are, end]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert parent.stdout.readline() == "ready\n"
        if end == "killed":
            parent.kill()
        assert parent.wait(LIMIT) == (-signal.SIGKILL if end == "killed" else 3)
        assert len(pids) == 2
        gone(pids)


def test_the_environment_is_this_processes_and_the_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNNVL_AR_OF_THE_PARENT", "a")
    monkeypatch.delenv("HOME")
    with RankPool(2, env={"MNNVL_AR_OF_THE_POOL": "b"}) as pool:
        assert pool.run(variable, "MNNVL_AR_OF_THE_PARENT") == ["a", "a"]
        assert pool.run(variable, "MNNVL_AR_OF_THE_POOL") == ["b", "b"]
        assert pool.run(variable, "HOME") == [None, None]
    assert "MNNVL_AR_OF_THE_POOL" not in os.environ


LIBRARIES = """
    import sys
    from mnnvl_ar import _library  # into the ranks as well, before they know what to run
    from mnnvl_ar.ranks import RankPool

    def loaded(rank):
        return _library.PATH.name

    if __name__ == "__main__":
        with RankPool(1) as one, RankPool(1, env={"MNNVL_AR_LIBRARY": sys.argv[1]}) as other:
            print(*one.run(loaded), *other.run(loaded), *one.run(loaded))
"""


@pytest.mark.skipif(not TEST_LIBRARY.exists(), reason="needs the test build: make test-build")
def test_each_pool_may_load_another_library(tmp_path: Path) -> None:
    done = script(tmp_path / "libraries.py", LIBRARIES, str(TEST_LIBRARY))
    assert done.stdout.split() == ["_C.so", TEST_LIBRARY.name, "_C.so"], done.stderr


def test_a_library_that_is_not_there_is_the_ranks_end() -> None:
    with RankPool(2, env={"MNNVL_AR_LIBRARY": "/nowhere/_C.so"}) as pool:
        assert pool.start(number).outcomes(LIMIT) == [Outcome(False, "process ended with exit code 1")] * 2


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler])
def test_handlers_of_signals_are_left_as_they_were(handler: Callable[..., Any], pool: RankPool) -> None:
    before = signal.signal(signal.SIGTERM, handler)
    try:
        pool.run(number)
        assert signal.getsignal(signal.SIGTERM) is handler
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ctrl_c_is_not_for_ranks(pool: RankPool) -> None:
    pool.run(number)  # as a program that had a fork server before this test began may lend it to these ranks
    running = pool.start(add, after=1.0)
    for rank in range(2):
        pool.kill(rank, signal.SIGINT)
    assert running.results(LIMIT) == [3.0, 3.0]


CTRL_C = """
    import multiprocessing, signal, sys, threading

    from mnnvl_ar.ranks import RankPool

    def linger(rank):
        rank.tell("here")
        threading.Event().wait(0.5)
        return rank.rank

    if __name__ == "__main__":
        if "before" in sys.argv:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["torch", "torch.distributed"])
            first = context.Process(target=int)
            first.start()
            first.join()
        with RankPool(2) as pool:
            if "before" in sys.argv:
                pool.run(linger)
            running = pool.start(linger)
            for rank in range(2):
                pool.kill(rank, signal.SIGINT)
            print(*running.results(60))
"""


@pytest.mark.parametrize("server", ["before", "ours"])
def test_ctrl_c_is_not_for_ranks_whoever_started_the_fork_server(tmp_path: Path, server: str) -> None:
    """With a server of ours not even while they start."""
    done = script(tmp_path / "ctrl_c.py", CTRL_C, server)
    assert (done.stdout, done.stderr) == ("0 1\n", "")
