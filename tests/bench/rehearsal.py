"""Runs the files of bench/gb200 as Slurm and Kubernetes run them, on host ranks, or by ranks that share a GPU. `slurm/`
holds stand-ins for sbatch, srun, scontrol and nvidia-smi, `software/` software multicast."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from bench import progress
from bench.gb200 import record
from bench.launch import free_port

HERE = Path(__file__).parent
HOST, GPU = ("--device", "cpu"), ("--device", "cuda")
LIMIT = 540  # seconds, for a machine that does much else; alone it takes one of ten
PATIENCE = 60  # seconds in which what was asked to end has ended


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(HERE / "slurm"), str(Path(sys.executable).parent), os.environ["PATH"]])
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_", "PMI_"))}
    return {**clean, "PATH": path, **more}


def with_site(folder: str) -> str:
    """PYTHONPATH with the `sitecustomize.py` of a folder beside this file, and with what that imports."""
    return os.pathsep.join([str(HERE / folder), str(HERE)])


class Run:
    """How a rehearsal went. found: the record it left; None if it left none."""

    def __init__(self, status: int, text: str, file: Path) -> None:
        self.status, self.text = status, text
        self.found: dict[str, Any] | None = record.read(file) if file.exists() else None

    def parts(self) -> dict[str, str]:
        assert self.found is not None, self.text
        return {part["name"]: part["status"] for part in self.found["parts"]}


def slurm(
    root: Path,
    out: Path,
    name: str,
    nodes: int,
    ranks: int,
    *more: str,
    device: tuple[str, ...] = HOST,
    **variables: str,
) -> Run:
    """`sbatch bench/gb200/NAME`, on `nodes` nodes of `ranks` ranks each. device: "--device" and what it is."""
    command = ["sbatch", f"--nodes={nodes}", f"bench/gb200/{name}", *device, "--ranks-per-node", str(ranks)]
    command += ["--out", str(out), "--port", str(free_port()), *more]
    status, text = ended(start(command, root, environment(**variables)))
    return Run(status, text, out / "results.json")


def start(command: list[str], root: Path, told: dict[str, str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(command, cwd=root, env=told, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Status and output, once it has ended; after `LIMIT` seconds it is asked to end, with all that it has started."""
    try:
        text, _ = process.communicate(timeout=LIMIT)
        return process.returncode, text
    except subprocess.TimeoutExpired:
        process.terminate()
        text, _ = process.communicate(timeout=PATIENCE)
        raise AssertionError(f"it took too long:\n{text}") from None


def manifest(root: Path) -> dict[str, Any]:
    """The documents of two_nodes.yaml by kind."""
    text = (root / "bench" / "gb200" / "two_nodes.yaml").read_text()
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def pods(
    root: Path, out: Path, *, without: int | None = None, kill: int | None = None, more: str = ""
) -> tuple[list[int], str]:
    """The job's pods as its controller starts them, but for the image, and the name of the first pod, which no DNS
    here knows. Exit statuses, and what the first pod has printed. without: the index of a pod that does not come. kill:
    of one that is killed with all that is in it, once its rank makes calls."""
    job = manifest(root)["Job"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    own = {each["name"]: each["value"] for each in container["env"]}
    extra = shlex.join([*HOST, "--port", str(free_port()), "--tp", "2"])
    own |= {"HEAD": "127.0.0.1", "BENCH_ARGS": f"{extra} {more}"}
    started = []
    for index in range(job["completions"]):
        if index == without:
            continue
        # No disk is shared: each pod has its own /tmp.
        words = [word.replace("/tmp/gb200", str(out / f"pod{index}")) for word in container["command"]]
        told = environment(**own, JOB_COMPLETION_INDEX=str(index))
        started.append(start(words, root, told))
    if kill is not None:
        end_pod(started[kill], out / f"pod{kill}" / "logs" / "bits" / f".rank{kill}.stage")
    # Ranks wait for each other, so it is enough to wait for one after the other; the others' output fits in a pipe.
    found = [ended(pod) for pod in started]
    return [status for status, _ in found], found[0][1]


def end_pod(pod: "subprocess.Popen[str]", at: Path) -> None:
    until = time.monotonic() + LIMIT / 2
    while "mnnvl_ar" not in progress.read(at)[0].what and time.monotonic() < until:
        time.sleep(0.02)
    inside = Path(f"/proc/{pod.pid}/task/{pod.pid}/children").read_text().split()
    for number in [pod.pid, *map(int, inside)]:
        os.kill(number, signal.SIGKILL)
