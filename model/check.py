"""Run Spin over ring.pml: every configuration that must hold, and every variant with one rule broken, which must fail.

    python model/check.py                    all of it
    python model/check.py --quick            the configurations that take seconds
    python model/check.py --trail frozen-slot    the counterexample of one variant, step by step

Exits 1 if the correct ring has an error or was not searched to the end, or if a broken variant has no
error; 2 if a tool is missing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

MODEL = Path(__file__).with_name("ring.pml")
MEMORY_MB = 1900  # per search, and two run at once
SECONDS = 900  # per search: one that takes longer counts as incomplete


@dataclass(frozen=True)
class Config:
    name: str
    what: str
    defines: str
    breaks: str = ""  # the outcome a broken rule must lead to; empty: the ring must hold
    seconds: int = 1  # roughly; the long ones start first
    progress: bool = False  # look for endless runs in which no call finishes, instead of safety
    depth: int = 20_000


@dataclass(frozen=True)
class Result:
    config: Config
    good: bool
    verdict: str
    states: int
    depth: int
    seconds: float


WRONG, HANG = "wrong data read", "hang"
ONE_CTA = "-DCMAX=1 -DCAP=4 -DCHECKS=1 -DSCRIPT={0,0,0,0,0,0}"
SIMPLE = f"{ONE_CTA} -DEARLY=0"

HOLDS = [
    Config("r2", "2 ranks, 2 CTAs, 6 calls, one- and two-shot", ""),
    Config("r2-endless", "the same 6 calls round and round, without end", "-DFOREVER", seconds=3, depth=1_000_000),
    Config(
        "r2-progress",
        "... and no endless run in which no call finishes",
        "-DFOREVER -DPROGRESS -DSCRIPT={5,2,3,1,4,5}",
        seconds=17,
        progress=True,
        depth=4_000_000,
    ),
    Config(
        "r2-any",
        "4 calls, each of any of 3 shapes",
        "-DCALLS=4 -DNONDET -DSHAPE_A=1 -DSHAPE_B=4 -DSHAPE_C=0",
        seconds=4,
    ),
    Config("r2-any-6", "6 calls, each of any of 2 shapes", "-DNONDET -DSHAPE_A=0 -DSHAPE_B=4", seconds=4),
    Config(
        "r2-any-endless",
        "1 CTA, calls of any of 3 shapes without end",
        "-DFOREVER -DNONDET -DCMAX=1 -DCAP=4 -DSHAPE_A=0 -DSHAPE_B=6 -DSHAPE_C=1",
        seconds=2,
        depth=1_000_000,
    ),
    Config("r2-in-order", "no early start", "-DEARLY=0"),
    Config("r2-multicast", "senders store to themselves too", "-DSELF=1", seconds=2),
    Config("r2-torn", "vectors land in two pieces", "-DTEAR=1"),
    Config("r2-link", "stores land late and in any order", "-DLINK=1", seconds=4),
    Config(
        "r2-link-torn",
        "... and in two pieces, 4 calls",
        "-DLINK=1 -DTEAR=1 -DCALLS=4 -DCAP=6 -DSCRIPT={1,3,0,1}",
        seconds=2,
    ),
    Config("r2-loose", "clear, arrival and polls of a CTA in any order", "-DLOOSE=1", seconds=4),
    Config("r2-link-loose", "both, 4 calls", "-DLINK=1 -DLOOSE=1 -DCALLS=4 -DSCRIPT={2,3,4,1}", seconds=50),
    Config("r2-gated", "equality test, CTAs finish only after the state has advanced", "-DEQUAL -DGATE"),
    Config("r3", "3 ranks, 2 CTAs, 4 calls", "-DRANKS=3 -DCALLS=4 -DCAP=12 -DSCRIPT={1,4,0,3}", seconds=75),
    Config(
        "r3-endless",
        "3 ranks, 1 CTA, 6 calls without end",
        "-DRANKS=3 -DCMAX=1 -DFOREVER -DCAP=12 -DSCRIPT={1,6,0,4,0,1}",
        depth=1_000_000,
    ),
    Config(
        "r3-owner",
        "... rows of one vector: two ranks own none of it",
        "-DRANKS=3 -DCMAX=1 -DFOREVER -DCAP=12 -DVECS=1 -DSCRIPT={1,6,6,4,0,6}",
        depth=1_000_000,
    ),
    Config(
        "r3-any-endless",
        "3 ranks, 1 CTA, calls of any of 2 shapes without end",
        "-DFOREVER -DNONDET -DRANKS=3 -DCMAX=1 -DCAP=6 -DSHAPE_A=0 -DSHAPE_B=6",
        seconds=22,
        depth=4_000_000,
    ),
    Config(
        "r3-link",
        "3 ranks, 1 CTA, 4 calls, stores land late",
        "-DRANKS=3 -DCMAX=1 -DCALLS=4 -DLINK=1 -DCAP=6 -DSCRIPT={0,0,6,0}",
        seconds=12,
    ),
    Config(
        "r3-loose",
        "3 ranks, 1 CTA, 4 calls, any order in a CTA",
        "-DRANKS=3 -DCMAX=1 -DCALLS=4 -DLOOSE=1 -DCAP=6 -DSCRIPT={0,0,6,0}",
        seconds=3,
    ),
]

BREAKS = [
    Config("frozen-slot", "R6: slot index frozen at capture", f"{SIMPLE} -DBREAK_FROZEN_SLOT", WRONG),
    Config(
        "frozen-slot-hang", "... the same, looking only for a hang", f"{SIMPLE} -DBREAK_FROZEN_SLOT -DCHECKS=0", HANG
    ),
    Config(
        "frozen-size",
        "R6: bytes to clear frozen at capture",
        f"{SIMPLE} -DSCRIPT={{0,1,1,1,0,1}} -DBREAK_FROZEN_SIZE",
        WRONG,
    ),
    Config("two-slots", "R3: two slots", f"{SIMPLE} -DBREAK_TWO_SLOTS", HANG),
    Config("clear-late", "R3: a slot is cleared one call too late", f"{SIMPLE} -DBREAK_LATE", HANG),
    Config("clear-soon", "R3: a slot is cleared one call too early", f"{SIMPLE} -DBREAK_SOON", HANG),
    Config("not-fenced", "R3: a clear lands after its CTA counted as finished", f"{ONE_CTA} -DBREAK_UNFENCED", HANG),
    Config("wrap", "R3: epochs wrap at 2^k, not at a multiple of three", f"{SIMPLE} -DBREAK_WRAP", WRONG),
    Config(
        "advance",
        "R4: the first CTA advances the state, not the last",
        "-DCHECKS=1 -DEARLY=0 -DSCRIPT={1,1,1,1,1,1} -DBREAK_ADVANCE",
        HANG,
    ),
    Config("steward", "R4: a CTA arrives before its row warps have read the state", f"{SIMPLE} -DBREAK_STEWARD", HANG),
    Config("trigger", "R4: dependents triggered before the state advances", f"{ONE_CTA} -DBREAK_TRIGGER", WRONG),
    Config("no-quiescence", "R4: nobody waits for an unfinished predecessor", f"{ONE_CTA} -DBREAK_NO_QUIESCE", HANG),
    Config("send-unchecked", "R4: sends do not wait for it, the rest does", f"{ONE_CTA} -DBREAK_SEND_EARLY", WRONG),
    Config(
        "clear-unchecked", "R4: the clear does not wait for it, the rest does", f"{ONE_CTA} -DBREAK_CLEAR_EARLY", HANG
    ),
    Config(
        "equality",
        "R4: quiescence tested with ==, finishing not gated",
        "-DCHECKS=1 -DEARLY=0 -DSCRIPT={1,1,1,1,1,1} -DEQUAL",
        HANG,
    ),
    Config(
        "grid", "R5: more CTAs than are co-resident", "-DCHECKS=1 -DEARLY=0 -DSCRIPT={1,1,1,1,1,1} -DBREAK_GRID", HANG
    ),
    Config("order", "R6: a rank replays two calls in the other order", f"{SIMPLE} -DBREAK_ORDER", WRONG),
    Config("zero-tokens", "R7: one rank counts a call of no tokens", f"{SIMPLE} -DBREAK_ZERO", HANG),
    Config("flushed", "R1: the poll takes a negative subnormal for the sentinel", f"{SIMPLE} -DBREAK_FLUSH", HANG),
    Config("sentinel-sent", "R1: a payload equal to the sentinel is sent as it is", f"{SIMPLE} -DBREAK_SANITISE", HANG),
    Config("one-word", "R2: the poll looks at one word of the vector", f"{SIMPLE} -DTEAR=1 -DBREAK_WORD", WRONG),
]


def defines(config: Config) -> list[str]:
    """The -D options; a later one replaces an earlier one of the same name."""
    chosen: dict[str, str] = {}
    for option in config.defines.split():
        chosen[option[2:].split("=")[0]] = option
    return list(chosen.values())


def missing_tools() -> list[str]:
    return [tool for tool in ("spin", "cc") if shutil.which(tool) is None]


def run(command: list[str], where: Path) -> str:
    """Output of a build step, which has to succeed."""
    done = subprocess.run(command, cwd=where, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:2])}: exit {done.returncode}\n{done.stdout[-2000:]}")
    return done.stdout


def search(config: Config, where: Path) -> Result:
    """Build one configuration's verifier and run it to the end or, for a broken rule, to the shortest failure."""
    where.mkdir(parents=True, exist_ok=True)
    shutil.copy(MODEL, where)
    started = time.monotonic()
    options = ["-DCOLLAPSE", f"-DMEMLIM={MEMORY_MB}", "-DNP" if config.progress else "-DSAFETY"]
    if config.breaks:
        options.append("-DBFS")  # breadth first: the shortest counterexample
    run(["spin", "-a", *defines(config), MODEL.name], where)
    run(["cc", "-O0" if config.seconds <= 1 else "-O2", "-w", *options, "-o", "pan", "pan.c"], where)
    command = ["./pan", f"-m{config.depth}", *(["-l"] if config.progress else [])]
    try:
        done = subprocess.run(
            command,
            cwd=where,
            text=True,
            timeout=SECONDS,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        output = done.stdout
    except subprocess.TimeoutExpired:
        output = f"Search not completed: more than {SECONDS} s"
    good, verdict = judge(config, output)
    return Result(
        config,
        good,
        verdict,
        number(r"(\d+) states, stored", output),
        number(r"depth reached (\d+)", output),
        time.monotonic() - started,
    )


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def judge(config: Config, output: str) -> tuple[bool, str]:
    """Whether the search said what it should, and what it said."""
    complaint = re.search(r"Search not completed.*|.*too small.*|.*out of memory.*|.*MEMLIM.*|.*VECTORSZ.*", output)
    errors = re.search(r"errors: (\d+)", output)
    if errors is None:
        return False, f"no verdict: {output.strip()[-200:]}"
    if errors.group(1) == "0":
        if complaint:
            return False, f"INCOMPLETE: {complaint.group(0).strip()}"
        return (False, "NO ERROR FOUND") if config.breaks else (True, "holds")
    if "assertion violated" in output:
        outcome = WRONG if config.breaks else "ASSERTION VIOLATED"
    elif "invalid end state" in output.split("Spin Version")[0]:
        outcome = HANG if config.breaks else "INVALID END STATE"
    else:
        outcome = "ERROR"
    return outcome == config.breaks, outcome


def readable(config: Config, where: Path) -> list[str]:
    """The counterexample's steps, in the words of the model's printf, then what never ends."""
    replay = run(["spin", "-t", *defines(config), MODEL.name], where)
    steps: list[str] = []
    unfinished: dict[str, str] = {}
    finished: set[str] = set()
    for line in (raw.strip() for raw in replay.splitlines()):
        call = re.match(r"(rank \d+ call \d+ CTA \d+): (.*)", line)
        if call:
            steps.append(line)
            who, step = call.groups()
            unfinished[who] = step
            if step == "finishes":
                finished.add(who)
        elif line.startswith(("...", "rank ")):
            steps.append(line if line.startswith("rank ") else f"    {line}")
    if config.breaks == HANG:
        steps += [
            f"{who}: waits for ever; its last step: {last}"
            for who, last in sorted(unfinished.items())
            if who not in finished
        ]
    return steps


def show(result: Result) -> None:
    mark = "ok  " if result.good else "FAIL"
    print(
        f"{mark} {result.config.name:17} {result.states:>9} states  depth {result.depth:>7}  {result.seconds:6.1f} s  "
        f"{result.verdict:16} {result.config.what}",
        flush=True,
    )


def check(configs: Iterable[Config], where: Path, jobs: int) -> bool:
    """Search them all, the long ones first; print each as it ends."""
    order = sorted(configs, key=lambda config: -config.seconds)
    results: list[Result] = []
    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(search, config, where / config.name) for config in order]):
            results.append(done.result())
            show(results[-1])
    bad = [result.config.name for result in results if not result.good]
    spent = os.times()
    print(f"{spent.children_user + spent.children_system:.0f} s of CPU time, compilation included")
    print(
        f"{len(results) - len(bad)} of {len(results)} as they should be" + (f"; not: {', '.join(bad)}" if bad else "")
    )
    return not bad


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the ring's model with Spin.")
    parser.add_argument("--quick", action="store_true", help="only the configurations that take seconds")
    parser.add_argument("--only", metavar="NAME", nargs="+", help="only these configurations")
    parser.add_argument("--trail", metavar="VARIANT", help="print one variant's counterexample")
    parser.add_argument("--jobs", type=int, default=2, help="searches at once (default 2)")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="build here and keep it (default: a temporary folder)")
    arguments = parser.parse_args()

    absent = missing_tools()
    if absent:
        print(f"model/check.py needs {' and '.join(absent)} (Debian: apt-get install spin gcc)", file=sys.stderr)
        return 2
    configs = {config.name: config for config in HOLDS + BREAKS}
    asked = [*(arguments.only or []), *([arguments.trail] if arguments.trail else [])]
    unknown = [name for name in asked if name not in configs]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(configs)}")

    os.nice(5)
    with tempfile.TemporaryDirectory() as folder:
        where = (arguments.keep or Path(folder)).resolve()
        if arguments.trail:
            config = configs[arguments.trail]
            result = search(config, where / config.name)
            show(result)
            if result.good and config.breaks:
                for index, step in enumerate(readable(config, where / config.name), 1):
                    print(f"{index:3}  {step}")
            return 0 if result.good else 1
        chosen = [configs[name] for name in arguments.only] if arguments.only else list(configs.values())
        if arguments.quick:
            chosen = [config for config in chosen if config.seconds <= 2]
        return 0 if check(chosen, where, arguments.jobs) else 1


if __name__ == "__main__":
    sys.exit(main())
