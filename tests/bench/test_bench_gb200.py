"""bench/gb200: the committed files are run as Slurm and Kubernetes run them, on host ranks, and bring home a whole
record. What must turn them red is in test_bench_gb200_red.py."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rehearsal import LIMIT, PATIENCE, Run, ended, environment, manifest, pods, slurm, start

from bench import options, tune
from bench.gb200 import __main__ as command
from bench.gb200 import crew, machine, parts, place, ranks, record, watch
from bench.launch import free_port
from mnnvl_ar.memory import MULTICAST_SWITCHES, multicast_refusal

pytestmark = pytest.mark.timeout(LIMIT + PATIENCE)


def is_whole(
    run: Run, world: int, by: str, ran: str = "check,bits,quantised,tune,unicast", beside: str = "gloo"
) -> None:
    """ran: the parts that the run was to have, and has had. beside: variants of peers, by commas."""
    assert run.status == 0, run.text
    assert run.found is not None
    assert (run.found["status"], run.found["trouble"], run.found["world"]) == (0, None, world)
    assert run.found["place"] == by
    assert {name for name, status in run.parts().items() if status == "done"} == set(ran.split(","))
    assert run.found["doctor"]["self_test"]["ranks"] == world
    assert run.found["doctor"]["problems"] == []
    rows = run.found["rows"]
    assert all(row["ok"] for row in rows)
    assert {row["tp"] for row in rows} == {world}
    assert {row["part"] for row in rows} == {"bits", "quantised", "unicast"} & set(ran.split(","))
    timed = [row for row in rows if row["part"] == "unicast"]
    if not timed:
        return
    ours = {"mnnvl_ar", "mnnvl_ar/one_shot", "mnnvl_ar/two_shot"}
    assert {row["variant"] for row in timed} == ours | set(beside.split(","))
    assert {row["context"] for row in timed} == {"chain", "gemm"}


def test_two_nodes_of_two_by_slurm(root: Path, tmp_path: Path):
    run = slurm(root, tmp_path / "out", "two_nodes.sbatch", 2, 2, "--tp", "4")
    is_whole(run, 4, "Slurm")
    assert run.found is not None
    assert [node["fabric"][0]["State"] for node in run.found["nodes"].values()] == ["Completed"] * 2
    assert list(run.found["table"]["tp"]) == ["4"]
    assert {name for name, status in run.parts().items() if status == "not run"} == {"multicast", "warm", "peers"}
    logs = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out" / "logs").rglob("*.log")}
    assert {f"logs/unicast/rank{rank}.log" for rank in range(4)} <= logs
    assert (tmp_path / "out" / "tables" / "host.json").exists()  # what `unicast` went by


def test_three_nodes_of_the_racks_file_by_slurm(root: Path, tmp_path: Path):
    only = ("--tp", "3", "--parts", "check,unicast")
    is_whole(slurm(root, tmp_path / "out", "nvl72.sbatch", 3, 1, *only), 3, "Slurm", "check,unicast")


def test_two_pods_by_kubernetes(root: Path, tmp_path: Path):
    statuses, text = pods(root, tmp_path, more="--parts check,tune,unicast")
    assert statuses == [0, 0], text
    (tmp_path / "gb200.log").write_text(text)  # as `kubectl logs` gives it
    is_whole(Run(0, text, tmp_path / "gb200.log"), 2, "Kubernetes", "check,tune,unicast")
    assert (tmp_path / "pod1" / "tables" / "host.json").exists()  # it came to the other pod, too


def test_the_manifests_names_and_numbers_go_together(root: Path):
    found = manifest(root)
    job, spec = found["Job"], found["Job"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    told = {each["name"]: each["value"] for each in container["env"]}
    service = found["Service"]["metadata"]["name"]
    assert told["HEAD"] == f"{job['metadata']['name']}-0.{service}"
    assert pod["subdomain"] == service
    assert found["Service"]["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    nodes = found["ComputeDomain"]["spec"]["numNodes"]
    assert (spec["completions"], spec["parallelism"], int(told["NODES"])) == (nodes, nodes, nodes)
    assert (spec["completionMode"], spec["backoffLimit"], pod["restartPolicy"]) == ("Indexed", 0, "Never")
    claim = found["ComputeDomain"]["spec"]["channel"]["resourceClaimTemplate"]["name"]
    assert [each["resourceClaimTemplateName"] for each in pod["resourceClaims"]] == [claim]
    assert f"--gpus-per-node {container['resources']['limits']['nvidia.com/gpu']}" in container["command"][-1]


@pytest.mark.gpu(1)
def test_one_gpu_is_a_world_of_one(root: Path, tmp_path: Path):
    """Nothing is sent here; graphs, dtypes and strategies are those of a rack."""
    on_gpus(root, tmp_path, 1)


@pytest.mark.gpu(2)
def test_two_gpus_of_one_host(root: Path, tmp_path: Path):
    on_gpus(root, tmp_path, 2)


def on_gpus(root: Path, out: Path, count: int) -> None:
    words = [sys.executable, "-m", "bench.gb200", "--parts", "check,bits,quantised", "--tp", str(count)]
    words += ["--gpus-per-node", str(count), "--out", str(out), "--port", str(free_port())]
    told = environment(CUDA_VISIBLE_DEVICES=",".join(map(str, range(count))))
    run = Run(*ended(start(words, root, told)), out / "results.json")
    is_whole(run, count, "nobody, so alone", "check,bits,quantised")
    assert run.found is not None
    assert {row["mode"] for row in run.found["rows"]} == {"graph", "eager"}


# ---- parts of it


def test_on_a_rack_everything_runs_and_every_command_line_makes_sense():
    planned = parts.plan(72, tps=parts.TPS, on_gpu=True, multicast=True, only=[])
    assert [part.name for part in planned] == list(parts.ORDER)
    by_name = {}
    for part in planned:
        if part.arguments[0] == parts.RUN:
            args = by_name[part.name] = options.parser().parse_args(part.arguments[1:])
            assert args.tp == [4, 8, 16, 36, 72]
            assert args.multicast == (part.name != "unicast")
    assert set(by_name) == set(parts.ORDER) - {"check", "tune"}
    (tuned,) = [part for part in planned if part.arguments[0] == parts.TUNE]
    shapes = tune.parser().parse_args(tuned.arguments[1:])
    assert (shapes.tp, shapes.hidden, shapes.multicast) == ([4, 8, 16, 36, 72], [7168], True)
    for name in ("multicast", "unicast"):
        assert set(by_name[name].strategy) == {"auto", "one_shot", "two_shot"}
        assert by_name[name].context == ["chain", "gemm"]
    assert by_name["warm"].warm_peers
    assert [part.name for part in planned if part.tuned] == ["multicast", "unicast", "peers"]
    assert sum(part.limit for part in planned) <= 110 * 60 + parts.SPARE  # nvl72.sbatch


def test_fewer_gpus_leave_out_what_does_not_fit():
    planned = parts.plan(8, tps=parts.TPS, on_gpu=True, multicast=False, only=[])
    assert [part.name for part in planned] == [name for name in parts.ORDER if name != "multicast"]
    assert all("--multicast" not in part.arguments for part in planned)
    assert {options.parser().parse_args(part.arguments[1:]).tp[-1] for part in planned[1:3]} == {8}


@pytest.mark.parametrize(("name", "nodes", "multicast"), [("two_nodes", 2, False), ("nvl72", 18, True)])
def test_a_jobs_time_is_longer_than_the_benchs(root: Path, name: str, nodes: int, multicast: bool):
    text = (root / "bench" / "gb200" / f"{name}.sbatch").read_text()
    hours, minutes, _ = re.search(r"--time=(\d+):(\d+):(\d+)", text).groups()  # type: ignore[union-attr]
    own = int(re.search(r"--minutes (\d+)", text)[1])  # type: ignore[index]
    assert own + 5 <= 60 * int(hours) + int(minutes)
    assert f"#SBATCH --nodes={nodes}\n" in text
    assert ("--multicast" in text.split("exec srun")[1]) == multicast


def find(variables: dict[str, str], **told: Any) -> place.Place:
    return place.find(variables, **{"node": None, "nodes": None, "head": "a", "port": 1, **told})


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_PROCID": "2", "SLURM_NTASKS": "5", "SLURM_NNODES": "5"},
        {"JOB_COMPLETION_INDEX": "2", "NODES": "5"},
        {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "5"},
        {"PMI_RANK": "2", "PMI_SIZE": "5"},
    ],
)
def test_the_place_is_what_the_starter_says(variables: dict[str, str]):
    found = find(variables)
    assert (found.node, found.nodes) == (2, 5)
    assert find(variables, node=0, nodes=2).nodes == 2  # options go first
    for name in variables:
        with pytest.raises(ValueError, match=r"counted from 0|are '|tasks on"):
            find({**variables, name: "7" if "NODES" in name or "NNODES" in name else "9x"} | _too_many(name))


def _too_many(name: str) -> dict[str, str]:
    return {"JOB_COMPLETION_INDEX": "7"} if name == "NODES" else {}


def test_a_place_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="one task a node"):
        find({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_NNODES": "2"})
    with pytest.raises(ValueError, match="go together"):
        find({}, node=1)
    with pytest.raises(ValueError, match="--head is missing"):
        find({}, node=1, nodes=2, head=None)
    assert find({}, head=None).nodes == 1


def node(**more: Any) -> dict[str, Any]:
    alike = {"nodes": 2, "options": [], "sources": "s", "library": "l", "torch": "2", "multicast_refusal": ""}
    gpu = {"State": "Completed", "Status": "Success", "CliqueId": "1", "ClusterUUID": "u"}
    return {"host": "h", "gpus": 4, "fabric": [gpu, gpu], **alike, **more}


@pytest.mark.parametrize(
    ("second", "told"),
    [
        ({"gpus": 3}, "node 1 (h) has 3 GPUs, wanted 4"),
        ({"library": "other"}, "node 1 (h): mnnvl_ar/_C.so: 'other'; on node 0 'l'"),
        ({"nodes": 3}, "node 1 (h): how many nodes there are: 3; on node 0 2"),
        ({"fabric": [{**node()["fabric"][0], "State": "In Progress"}]}, "fabric State is In Progress"),
        ({"fabric": [{**node()["fabric"][0], "ClusterUUID": "v"}]}, "another NVLink domain"),
    ],
)
def test_nodes_that_are_not_alike_are_told(second: dict[str, Any], told: str):
    assert machine.problems({0: node(), 1: node()}, 4) == []
    (line,) = machine.problems({0: node(), 1: node(**second)}, 4)
    assert told in line
    assert len(machine.problems({0: node(), 1: node()}, 8)) == 2


def test_the_rank_at_fault_goes_before_those_that_lost_it():
    def failure(rank: int, how: str, tail: str, when: float) -> dict[str, Any]:
        return {"what": f"rank {rank}", "rank": rank, "node": 0, "how": how, "tail": tail, "time": when}

    lost = failure(0, "ended with status 1", "RuntimeError: Connection closed by peer", 1.0)
    raised = failure(2, "ended with status 1", "ValueError: own", 2.0)
    killed = failure(3, "was killed by SIGKILL", "", 3.0)
    assert watch.blame([lost, raised], []) == "rank 2 on node 0 ended with status 1: ValueError: own"
    assert watch.blame([lost, raised, killed], []) == "rank 3 on node 0 was killed by SIGKILL"
    assert watch.blame([lost], []).startswith("rank 0")
    states = [{"rank": rank, "at": "rounds", "process": "stopped" if rank == 5 else ""} for rank in range(8)]
    late = {"what": "the part", "rank": None, "node": 0, "how": "made no progress in 9 s", "tail": "", "time": 0.0}
    assert watch.blame([late], states) == (
        "the part made no progress in 9 s; rank 5 at: rounds (process stopped); ranks 0, 1, 2, 3, 4, 6 and 7 at: rounds"
    )


def test_a_record_is_found_in_a_log_and_nothing_else_passes_for_one(tmp_path: Path):
    file = tmp_path / "a"
    text = json.dumps({"made_by": record.MADE_BY, "rows": []})
    file.write_text(f"noise\n{record.BEGIN}\n{text}\n{record.END}\nmore\n")
    assert record.read(file)["rows"] == []
    for bad in (f"{record.BEGIN}\n{text}\n", "noise", "{}", "[]"):
        file.write_text(bad)
        with pytest.raises(ValueError, match=str(file)):
            record.read(file)


def two_crews() -> list[crew.Crew]:
    port = free_port()
    return [crew.Crew(place.Place(node, 2, "127.0.0.1", port, "a test"), patience=10.0) for node in (0, 1)]


def test_a_node_without_a_sign_of_life_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(crew, "GONE", 2.0)
    first, second = two_crews()
    began = time.monotonic()
    second.tell("came/1", "here")
    first.tell("came/0", "too")
    assert first.gather("came", began, began + 10) == ({0: "too", 1: "here"}, [])
    while time.monotonic() < began + 3.0:  # as long as it beats, it is there
        second.beat()
        assert first.silent([0, 1], began) == []
        time.sleep(0.1)
    first.tell("more/0", "mine")
    assert first.gather("more", began, began + 30) == ({0: "mine"}, [1])
    assert time.monotonic() < began + 20
    assert first.silent([0, 1], began) == [1]


def test_without_the_first_node_nobody_waits():
    first, second = two_crews()
    second.append("list", "a")
    assert first.listed("list") == ["a"]
    first.tell("over", 3)
    assert second.wait_any("plan", "over") == [None, 3]
    del first
    with pytest.raises(crew.Gone, match="does not answer any more"):
        second.wait_any("never")
    with pytest.raises(crew.Gone, match="cannot reach"):
        crew.Crew(place.Place(1, 2, "127.0.0.1", free_port(), "a test"), patience=1.0)


STUCK = """
import os, pathlib, signal, time
from bench import progress
file = pathlib.Path(os.environ["PID"])
if os.environ["RANK"] == "1":
    progress.report("rounds", limit=float(os.environ["STAGE"]))
    file.write_text(f"{os.getpid()} ")
    os.kill(os.getpid(), signal.SIGSTOP)
while not file.exists() or not file.read_text().endswith(" "):
    time.sleep(0.02)
while pathlib.Path(f"/proc/{file.read_text().strip()}/stat").read_text().rpartition(")")[2].split()[0] != "T":
    time.sleep(0.02)
progress.report("rounds", limit=float(os.environ["STAGE"]))
time.sleep(200)
"""


@pytest.mark.parametrize(
    ("stage", "limit", "how"), [(1.0, 100.0, "made no progress in"), (100.0, 15.0, "was not done in 15 s")]
)
def test_ranks_that_stand_still_are_ended_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: float, limit: float, how: str
):
    monkeypatch.setattr(watch, "GRACE", 0.5)
    began = time.monotonic()
    alone = crew.Crew(place.Place(0, 1, "127.0.0.1", free_port(), "a test"), patience=10.0)
    told = {"STAGE": str(stage), "PID": str(tmp_path / "pid")}
    started = ranks.Ranks(["-c", STUCK], 0, 2, 2, ("127.0.0.1", 1), tmp_path, told)
    outcome = watch.run(alone, "part/0", started, limit, lambda text: None)
    assert time.monotonic() - began < 60
    assert outcome is not None
    assert outcome.trouble is not None
    assert outcome.trouble.startswith(f"the part {how}")
    assert "rank 1 at: " in outcome.trouble
    assert "(process stopped)" in outcome.trouble
    assert started.running == []


def test_multicast_stays_off_unless_it_is_allowed(monkeypatch: pytest.MonkeyPatch):
    for name in MULTICAST_SWITCHES:
        monkeypatch.delenv(name, raising=False)
    command.settle(command.parser().parse_args(["--multicast"]))
    assert not multicast_refusal()
    command.settle(command.parser().parse_args([]))
    assert all(os.environ[name] == value for name, value in MULTICAST_SWITCHES.items())


@pytest.mark.parametrize("transport", ["multicast", "unicast"])
def test_a_run_for_multicast_that_had_none_says_so(tmp_path: Path, transport: str):
    found = record.Record(tmp_path / "results.json", "a test", 8, {0: node()})
    found.found["doctor"] = {"self_test": {"transport_reason": "no multicast: as the switch says"}}
    (part,) = parts.plan(8, tps=[8], on_gpu=True, multicast=True, only=["multicast"])
    left = tmp_path / "multicast.json"
    left.write_text(json.dumps({"machine": "8 x G", "rows": [{"transport": transport}, {"variant": "nccl"}]}))
    found.begin(part, [])
    found.end(part, watch.Outcome(), 1.0, left, tmp_path / "no.log")
    (about,) = record.read(tmp_path / "results.json")["parts"]
    assert about["status"] == "done"
    without = "WITHOUT multicast, over unicast: no multicast: as the switch says"
    assert about["why"] == ("" if transport == "multicast" else without)


def test_a_rank_whose_node_is_gone_before_it_begins_does_not_begin():
    """Killed between fork and exec, the node's program tells nobody."""
    for node, status in ((os.getpid(), 0), (1, -signal.SIGKILL)):
        rank = subprocess.run([sys.executable, "-c", ""], preexec_fn=functools.partial(ranks._end_with, node))
        assert rank.returncode == status
