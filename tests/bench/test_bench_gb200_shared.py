"""bench/gb200 where there are more ranks than GPUs: a rehearsal, in which calls go from process to process as on a
rack. On the host, what is planned; on a GPU, all of it, by unicast and by software multicast."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rehearsal import GPU, LIMIT, PATIENCE, environment, slurm, with_site
from test_bench_gb200 import is_whole, node

from bench import options, team, tune, worker
from bench.gb200 import __main__ as command
from bench.gb200 import machine, parts, place, ranks, record
from bench.launch import free_port
from common.ranks import TEST_LIBRARY
from mnnvl_ar.ranks import Rank, RankPool, RanksFailed

pytestmark = pytest.mark.timeout(LIMIT + PATIENCE)


def on_one_gpu(root: Path, out: Path, **variables: str) -> set[str]:
    """Two nodes of two ranks each by Slurm's file; all share one GPU, and send to each other as on a rack of GPUs. The
    transports of our rows."""
    ran = "check,bits,quantised,unicast"
    parted = ("--tp", "4", "--gpus-per-node", "1", "--parts", ran)
    told = {"CUDA_VISIBLE_DEVICES": "0", **variables}
    run = slurm(root, out, "two_nodes.sbatch", 2, 2, *parted, device=GPU, **told)
    is_whole(run, 4, "Slurm", ran, "yardstick/copy,yardstick/trivial")
    assert run.found is not None
    assert run.found["machine"].startswith("1 x ")
    assert run.found["machine"].endswith(" for 4 ranks")
    assert {row["mode"] for row in run.found["rows"] if row["part"] != "unicast"} == {"graph", "eager"}
    assert set(run.parts()) == set(ran.split(","))
    return {row["transport"] for row in run.found["rows"] if "transport" in row}


@pytest.mark.gpu(1)
def test_ranks_that_share_a_gpu(root: Path, tmp_path: Path):
    assert on_one_gpu(root, tmp_path / "out") == {"unicast"}


@pytest.mark.gpu(1)
@pytest.mark.skipif(not TEST_LIBRARY.exists(), reason="needs the test build: make test-build")
def test_ranks_that_share_a_gpu_by_software_multicast(root: Path, tmp_path: Path):
    told = {"PYTHONPATH": with_site("software"), "MNNVL_AR_LIBRARY": str(TEST_LIBRARY)}
    assert on_one_gpu(root, tmp_path / "out", **told) == {"software multicast"}


# ---- on the host


def test_ranks_that_share_gpus_only_rehearse():
    planned = parts.plan(4, tps=[4], on_gpu=True, multicast=False, only=[], shared=True)
    assert [part.name for part in planned] == ["check", "bits", "quantised", "tune", "unicast"]
    args = options.parser().parse_args(planned[-1].arguments[1:])
    assert (args.peers, args.hidden, args.device) == (["yardsticks"], [256], None)


@pytest.mark.parametrize(("gpus", "told", "shared", "world"), [(1, 4, True, 4), (4, None, False, 4), (4, 2, False, 2)])
def test_more_ranks_than_gpus_share_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, told: int | None, shared: bool, world: int
):
    planned: dict[str, Any] = {}
    monkeypatch.setattr(parts, "plan", lambda world, **named: planned.update(named, world=world) or [])
    status, _ = alone(tmp_path, monkeypatch, gpus, *([] if told is None else ["--ranks-per-node", str(told)]))
    assert (status, planned["shared"], planned["world"]) == (0, shared, world)


def test_ranks_that_share_gpus_have_no_multicast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    status, text = alone(tmp_path, monkeypatch, 1, "--ranks-per-node", "2", "--multicast")
    assert status == 1
    assert "--multicast, but 2 ranks would share 1 GPUs" in text


def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, *words: str) -> tuple[int, str]:
    """Status, and what went wrong, of a node that is the only one and says that it has so many GPUs."""
    monkeypatch.setattr(machine, "look", lambda *_: node(nodes=1, gpus=gpus, fabric=[], multicast_refusal=""))
    monkeypatch.setattr(command, "_deafen", lambda: None)
    args = command.parser().parse_args(["--out", str(tmp_path), *words])
    status = command.Node(args, place.Place(0, 1, "127.0.0.1", free_port(), "a test")).lead()
    return status, str(record.read(tmp_path / "results.json")["trouble"])


@pytest.mark.parametrize(("gpus", "wanted"), [(0, "0 1 2"), (1, "0 0 0"), (2, "0 1 0"), (4, "0 1 2")])
def test_ranks_take_the_gpus_of_their_node_in_turn(tmp_path: Path, gpus: int, wanted: str):
    program = "import os; print(os.environ['LOCAL_RANK'])"
    started = ranks.Ranks(["-c", program], 4, 3, 8, ("127.0.0.1", 1), tmp_path, {}, gpus)
    while started.running:
        time.sleep(0.05)
    assert " ".join(started.log(rank).read_text().strip() for rank in started.numbers) == wanted


def test_software_multicast_comes_under_workspaces() -> None:
    program = "from mnnvl_ar import workspace; print(workspace.create.__name__)"
    for told, name in (({"PYTHONPATH": with_site("software")}, "create_by_software"), ({}, "create")):
        found = subprocess.run([sys.executable, "-c", program], env=environment(**told), capture_output=True, text=True)
        assert found.stdout.strip() == name, found.stderr


def as_if_on(rank: Rank, gpus: list[str], size: int) -> tuple[str, str]:
    """The backend of a team's tensors, with "*" if it shares a GPU, and the machine's name, by ranks that say they have
    these GPUs."""
    rank.join()
    team.gpus_of_ranks = worker.gpus_of_ranks = lambda device: gpus  # type: ignore[assignment,attr-defined]
    torch.cuda.get_device_name = lambda device: "NVIDIA Some"  # type: ignore[assignment]
    device = torch.device("cuda", 0)
    made = team.make_team(size, device)
    backend = "none" if made is None else dist.get_backend(made.group) + "*" * made.shared
    return backend, worker.machine_name(device, rank.world_size)


def test_nccl_is_where_each_rank_has_a_gpu() -> None:
    with RankPool(3) as pool:
        assert pool.run(as_if_on, ["a", "b", "a"], 3) == [("gloo*", "2 x NVIDIA Some for 3 ranks")] * 3
        found = pool.run(as_if_on, ["a", "a", "b"], 2)
        assert [backend for backend, _ in found] == ["gloo*", "gloo*", "none"]
    with RankPool(2) as pool:
        if dist.is_nccl_available():
            assert pool.run(as_if_on, ["a", "b"], 2) == [("nccl", "2 x NVIDIA Some")] * 2
        else:  # it is asked for all the same
            with pytest.raises(RanksFailed, match=r"(?i)nccl"):
                pool.run(as_if_on, ["a", "b"], 2)


def test_no_table_of_the_librarys_by_ranks_that_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "join_world", lambda kind: (0, 2, torch.device("cuda", 0)))
    monkeypatch.setattr(team, "gpus_of_ranks", lambda device: ["a", "a"])
    with pytest.raises(SystemExit, match="share a GPU"):
        tune.work(tune.parser().parse_args([]))
