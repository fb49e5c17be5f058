"""`make gpu-test`: everything that needs GPUs, packed onto the GPUs at hand; its results go to tools/gpu_record.json.

    python -m tools.gpu_campaign [--seconds 1800] [--only tests,soak] [--stale] [--record FILE] [--logs FOLDER]

A job is a process that needs a number of GPUs and sees no others. Jobs start in order, as many at a time as there are
GPUs for: large ones first, except for the fault runs, which come last since they can be cut short. A job that exceeds
its time limit, or the campaign's, is interrupted (pytest then still records what has run) and killed 10 s later. Exit
status: 0 if every job ran and passed.

--stale: only kinds of results that the committed record has not whole, of today's sources and of such GPUs. After a
change of the host's diagnosis, say, that is half of it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools import ROOT, gpu_record

GRACE = 10.0  # seconds between the interrupt and the end
NO_TESTS = 5  # pytest's exit status
FAULTS = 110  # injected, over all numbers of GPUs


@dataclass(frozen=True)
class Job:
    """One process. The file to record into is appended to `command`; `limit` is in seconds. is_part: of tests only
    some are asked for, and there may be none that are this job's."""

    name: str
    gpus: int
    limit: float
    command: tuple[str, ...]
    is_part: bool = False


CASES = ("tests/gpu", "tests/ranks")
PROGRAMS = ("tests/bench", "tests/compat", "tests/host")  # the bench of a rack, servers' calls, tutorials


class Choice:
    """What is to be run. gpu: the name of those that are here. fresh: keys of the record that need not be made again;
    None: everything is to be run."""

    def __init__(self, gpu: str = "", fresh: set[str] | None = None) -> None:
        self.gpu, self.fresh = gpu, fresh

    def places(self, gpus: int, folders: tuple[str, ...]) -> tuple[str, ...]:
        """Of folders of tests: themselves, or the files of which those that need so many GPUs are to be run."""
        if self.fresh is None:
            return folders
        files = sorted(str(file.relative_to(ROOT)) for each in folders for file in (ROOT / each).glob("test_*.py"))
        hardware = gpu_record.hardware(gpus, self.gpu)
        return tuple(file for file in files if f"{hardware}: {gpu_record.part_of(file)}" not in self.fresh)

    def has(self, figure: str) -> bool:
        return self.fresh is None or figure not in self.fresh


def _tests(
    choice: Choice, gpus: int, suffix: str, which: str, limit: float, folders: tuple[str, ...] = CASES
) -> Iterator[Job]:
    options, places = ["-k", which] if which else [], choice.places(gpus, folders)
    pytest = ("-m", "pytest", "-q", "--durations", "10")
    command = (*pytest, "-m", "gpu", "--gpus", str(gpus), *places, *options, "--gpu-record")
    if places:
        yield Job(f"tests of {gpus}{suffix}", gpus, limit, (sys.executable, *command), places != folders)


def _tool(choice: Choice, name: str, figure: str, gpus: int, limit: float, *command: str) -> Iterator[Job]:
    """figure: the key that it has in the record."""
    if choice.has(figure):
        yield Job(name, gpus, limit, (sys.executable, "-m", *command, "--record"))


def jobs(here: int, choice: Choice | None = None) -> Iterator[Job]:
    """What `here` GPUs can run, in the order in which it is to begin."""
    choice = choice or Choice()
    sizes = [n for n in (8, 4, 2) if n <= here]
    for n in sizes:
        yield from _tests(choice, n, "", "not test_replay", 400)
        yield from _tests(choice, n, ", replays", "test_replay", 400)
        if n == 2:
            yield from _tests(choice, n, ", programs", "", 300, PROGRAMS)
        if n * 2 > here:
            soak, safety = ("tools.replay.soak", "--ranks", str(n)), ("tools.safety_cost", "--ranks", str(n))
            yield from _tool(choice, f"soak of {n}", f"soak, {n} ranks", n, 200, *soak)
            yield from _tool(choice, f"cost of safety of {n}", f"cost of safety, {n} ranks", n, 120, *safety)
    if here >= 1:
        yield from _tool(choice, "sanitizers", "compute-sanitizer clean", 1, 600, "tools.sanitize")
        virtual = ("virtual-2 or virtual-3", "virtual-4 or virtual-8", "virtual-9")
        for which in virtual:
            yield from _tests(choice, 1, f", {which}", which, 400)
        yield from _tests(choice, 1, ", controls", "controls", 300)
        yield from _tests(choice, 1, ", twin", "test_gpu_twin", 400)
        figure = "twin beside the library, 2 virtual ranks"
        yield from _tool(choice, "the twin's times", figure, 1, 120, "tools.twin_time")
        yield from _tests(choice, 1, ", software multicast", "test_software_multicast", 600)
        apart = ("controls", "test_gpu_twin", "test_software_multicast", *virtual)
        yield from _tests(choice, 1, ", others", f"not ({' or '.join(apart)})", 400)
        yield from _tests(choice, 1, ", programs", "not share_a_gpu", 400, PROGRAMS)

    if here >= 1:  # by processes that share the first GPU: the driver lets one run after the other
        yield from _tests(choice, 1, ", ranks that share it", "share_a_gpu", 560, PROGRAMS)
        shared = "--device", "cuda", "--share", "--ranks", "2", "--faults", "60", "--seconds", "170"
        figure = "faults, cuda, 2 ranks on one GPU"
        yield from _tool(choice, "faults on one GPU", figure, 1, 200, "tools.faults.run", *shared)
    for n in sizes:
        options = "--device", "cuda", "--ranks", str(n), "--faults", str(-(-FAULTS // len(sizes))), "--deadline", "0.5"
        yield from _tool(choice, f"faults of {n}", f"faults, cuda, {n} ranks", n, 400, "tools.faults.run", *options)


@dataclass
class Running:
    job: Job
    gpus: list[str]
    process: subprocess.Popen[bytes]
    log: Path
    record: Path
    began: float = field(default_factory=time.monotonic)
    interrupted: float = 0.0

    def hurry(self, end: float) -> None:
        """Interrupts, and later kills, a process whose time is over."""
        now = time.monotonic()
        if now < min(self.began + self.job.limit, end):
            return
        with contextlib.suppress(ProcessLookupError):
            if self.interrupted == 0.0:
                self.interrupted = now
                os.kill(self.process.pid, signal.SIGINT)
            elif now > self.interrupted + GRACE:
                os.killpg(self.process.pid, signal.SIGKILL)

    @property
    def is_good(self) -> bool:
        """Once it has ended."""
        return self.process.returncode == 0 or (self.job.is_part and self.process.returncode == NO_TESTS)

    def outcome(self) -> str:
        text = self.log.read_text(errors="replace").strip().split("\n")
        status = self.process.returncode
        ran = min(self.job.limit, self.interrupted - self.began)  # the campaign's time may have been over before
        said = "passed" if self.is_good else f"interrupted after {ran:.0f} s" if self.interrupted else "FAILED"
        return f"{self.job.name}: {said} (exit {status}), {time.monotonic() - self.began:.0f} s: {text[-1][-200:]}"


def run(
    wanted: Sequence[Job], gpus: Sequence[str], seconds: float, logs: Path, records: Path, ended: Callable[[Path], None]
) -> list[Job]:
    """Runs the jobs in order, each as soon as there are GPUs for it. Each may write a record of its own in
    `records`; `ended` is called with that file when the job has ended. Returns the jobs that did not pass."""
    free, waiting, running, bad = list(gpus), list(wanted), list[Running](), list[Job]()
    began = time.monotonic()
    end = began + seconds
    while waiting or running:
        while waiting and waiting[0].gpus <= len(free) and time.monotonic() < end:
            job = waiting.pop(0)
            print(f"{job.name}: begins, {job.limit:.0f} s at most", flush=True)
            mine, free = free[: job.gpus], free[job.gpus :]
            running.append(_start(job, mine, logs, records))
        if time.monotonic() >= end and waiting:
            print(*(f"{job.name}: NOT RUN, no time" for job in waiting), sep="\n", flush=True)
            bad += waiting
            waiting = []
        for one in list(running):
            if one.process.poll() is None:
                one.hurry(end)
                continue
            with contextlib.suppress(ProcessLookupError, PermissionError):  # ranks that outlived it
                os.killpg(one.process.pid, signal.SIGKILL)
            running.remove(one)
            done, since = len(wanted) - len(waiting) - len(running), f"{time.monotonic() - began:.0f} s"
            print(f"[{done} of {len(wanted)} jobs, {since}] {one.outcome()}", flush=True)
            free += one.gpus
            bad += [] if one.is_good else [one.job]
            ended(one.record)
        time.sleep(0.1)
    return bad


def _start(job: Job, gpus: list[str], logs: Path, records: Path) -> Running:
    file = job.name.replace(" ", "-").replace(",", "")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(gpus), "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    log, record = logs / f"{file}.log", records / f"{file}.json"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*job.command, str(record)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_accept_interrupts,
        )
    return Running(job, gpus, process, log, record)


def _accept_interrupts() -> None:
    """A process that a shell starts in the background ignores SIGINT, and so do its children unless they reset it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def visible_gpus() -> list[str]:
    import torch

    masked = os.environ.get("CUDA_VISIBLE_DEVICES")
    return masked.split(",") if masked else [str(i) for i in range(torch.cuda.device_count())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600.0, help="for all of it")
    parser.add_argument("--only", default="", help="jobs whose name holds one of these words, separated by commas")
    parser.add_argument(
        "--stale", action="store_true", help="only what the committed record has not of today's sources"
    )
    parser.add_argument("--record", type=Path, default=gpu_record.FILE)
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "gpu-test")
    options = parser.parse_args()
    gpus = visible_gpus()
    words = [word.strip() for word in options.only.split(",")]
    choice = Choice(gpu_record.gpu_name(), gpu_record.fresh()) if options.stale else Choice()
    wanted = [job for job in jobs(len(gpus), choice) if any(word in job.name for word in words)]
    if not wanted:
        print(f"nothing to run: {len(gpus)} GPUs here", *(job.name for job in jobs(len(gpus), choice)), sep="\n  ")
        return 1
    options.logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as records:
        written: list[Path] = []

        def keep(one: Path) -> None:  # at once, so that a campaign that is cut short has a record too
            written.extend([one] if one.exists() else [])
            gpu_record.join(sorted(written), options.record)

        bad = run(wanted, gpus, options.seconds, options.logs, Path(records), keep)
    print(f"{len(wanted) - len(bad)} of {len(wanted)} jobs passed; {options.record} written, logs in {options.logs}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
