"""What must turn a run of bench/gb200 red: a rank that dies, a wrong bit, a node that is missing, dies or is another's.
`harm/` holds what harms a rank."""

import sys
import time
from pathlib import Path

import pytest
from rehearsal import LIMIT, PATIENCE, Run, ended, environment, pods, slurm, start, with_site

from bench.launch import WRONG, free_port
from common.processes import command_lines

pytestmark = pytest.mark.timeout(LIMIT + PATIENCE)


def harmed(harm: str, rank: int, part: str) -> dict[str, str]:
    return {"PYTHONPATH": with_site("harm"), "HARM": harm, "HARM_RANK": str(rank), "HARM_PART": part}


def still_there(folder: Path) -> list[str]:
    """Processes whose command line names the folder, after a moment in which they may end."""
    end = time.monotonic() + PATIENCE
    while True:
        found = [line for line in command_lines() if str(folder) in line]
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("harm", "how"),
    [("kill", "was killed by SIGKILL"), ("raise", "ended with status 1: RuntimeError: harm as ordered")],
)
def test_a_rank_that_dies_is_named_and_ends_it_all(root: Path, tmp_path: Path, harm: str, how: str):
    only = ("--tp", "3", "--parts", "bits,unicast")
    run = slurm(root, tmp_path, "two_nodes.sbatch", 3, 1, *only, **harmed(harm, 1, "bits"))
    assert run.status == 1, run.text
    assert run.found is not None
    assert run.found["trouble"] == f"bits: rank 1 on node 1 {how}"
    assert f"FAILED: bits: rank 1 on node 1 {how}" in run.text
    assert run.parts() == {"bits": "failed"}  # and nothing after it
    assert {row["dtype"] for row in run.found["rows"]} == {"bfloat16"}  # its first cell was kept
    assert [failure["rank"] for failure in run.found["parts"][0]["failures"]].count(1) == 1


def test_a_wrong_bit_of_one_rank_turns_it_red(root: Path, tmp_path: Path):
    only = ("--tp", "2", "--parts", "bits,unicast")
    run = slurm(root, tmp_path, "two_nodes.sbatch", 2, 1, *only, **harmed("bit", 1, "bits"))
    assert run.status == WRONG, run.text
    assert "A RESULT OF OURS IS WRONG" in run.text
    assert run.parts() == {"bits": "wrong", "unicast": "done"}
    assert run.found is not None
    wrong = [row for row in run.found["rows"] if not row["ok"]]
    assert {row["part"] for row in wrong} == {"bits"}
    assert {row["error"] for row in wrong} == {"rank 1: out: other bits than the reference"}


def test_a_node_that_does_not_come_is_named(root: Path, tmp_path: Path):
    run = slurm(root, tmp_path, "two_nodes.sbatch", 3, 1, "--patience", "25", REHEARSAL_LOST_TASK="1")
    assert run.status == 1, run.text
    assert run.found is not None
    assert run.found["trouble"] == "node 1 of 3 did not come in 25 s"
    assert run.found["parts"] == []


def test_a_node_of_another_domain_is_named(root: Path, tmp_path: Path):
    run = slurm(root, tmp_path, "two_nodes.sbatch", 2, 1, REHEARSAL_CLIQUE="1 7")
    assert run.status == 1, run.text
    assert "node 1" in run.text
    assert "fabric CliqueId 7, on node 0 32766: another NVLink domain" in run.text


def test_a_node_that_is_killed_leaves_a_record(root: Path, tmp_path: Path):
    """srun ends the others by SIGTERM then."""
    kill = {"REHEARSAL_KILL_TASK": "1", "REHEARSAL_KILL_AT": str(tmp_path / "logs" / "bits" / "rank1.log")}
    run = slurm(root, tmp_path, "two_nodes.sbatch", 2, 1, "--tp", "2", "--parts", "bits,unicast", **kill)
    assert run.status != 0, run.text
    assert run.parts() == {"bits": "failed"}
    assert run.found is not None
    assert (run.found["status"], run.found["trouble"]) == (1, "bits: ended by SIGTERM")
    assert still_there(tmp_path) == []


def test_a_pod_that_is_killed_is_named(root: Path, tmp_path: Path):
    statuses, text = pods(root, tmp_path, kill=1, more="--parts bits,unicast")
    assert statuses == [1, -9], text
    assert "FAILED: bits: node 1 went silent" in text
    (tmp_path / "gb200.log").write_text(text)
    assert Run(1, text, tmp_path / "gb200.log").parts() == {"bits": "failed"}


def test_a_pod_that_is_missing_is_named(root: Path, tmp_path: Path):
    statuses, text = pods(root, tmp_path, without=1, more="--patience 5")
    assert statuses == [1], text
    assert "FAILED: node 1 of 2 did not come in 5 s" in text


def test_without_a_gpu_it_does_not_pass_for_a_measurement(root: Path, tmp_path: Path):
    command = [sys.executable, "-m", "bench.gb200", "--out", str(tmp_path), "--port", str(free_port())]
    told = environment(CUDA_VISIBLE_DEVICES="")
    status, text = ended(start(command, root, told))
    assert status == 1, text
    assert "has no GPU (--device cpu is a rehearsal)" in text
