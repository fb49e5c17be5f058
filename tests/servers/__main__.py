"""`make servers`: see docs/servers.md.

    python -m servers --list
    python -m servers --only vllm/llama-32 --seconds 580 --out FOLDER --results FILE

Exit status: 0 if every scenario that was chosen ran, or could not run here, and passed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]  # for bench and tools; what is started from here does not get it

from bench.results import FOLDER, machine_slug, source_digest  # noqa: E402
from servers import record, runner  # noqa: E402
from servers.plan import Scenario, scenarios  # noqa: E402


def chosen(words: str) -> list[Scenario]:
    """Those whose name holds one of the words; in the order of the plan."""
    parts = [word.strip() for word in words.split(",")]
    return [each for each in scenarios() if any(part in each.name for part in parts)]


def machine() -> tuple[str, int]:
    """As the bench names it, and the number of GPUs."""
    import torch

    count = torch.cuda.device_count()
    return (f"{count} x {torch.cuda.get_device_name(0)}" if count else "no GPU"), count


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name, expected seconds, and whether each can run here")
    parser.add_argument("--only", default="", help="scenarios whose name holds one of these words, separated by commas")
    parser.add_argument("--seconds", type=float, default=1800.0, help="begin none that is not expected to end in time")
    parser.add_argument("--work", type=Path, default=Path("/tmp/mnnvl_ar_servers"), help="models and answers; kept")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "servers", help="logs and events")
    parser.add_argument("--results", type=Path, help="by default bench/results/servers_MACHINE.json")
    parser.add_argument(
        "--join", type=Path, nargs="+", help="add what these records hold to --results, and run nothing"
    )
    options = parser.parse_args(arguments)
    if options.join:
        for file in options.join:
            found = json.loads(file.read_text())
            target = options.results or FOLDER / f"servers_{machine_slug(found['machine'])}.json"
            record.add(target, found["machine"], found["runs"])
        return 0
    name, gpus = machine()
    reasons = {each.name: runner.why_not(each, gpus) for each in chosen(options.only)}
    can = [each for each in chosen(options.only) if not reasons[each.name]]
    if options.list:
        for each in chosen(options.only):
            print(f"{each.name:34} {each.seconds:4.0f} s  {reasons[each.name]}".rstrip())
        return 0
    for each, reason in reasons.items():
        if reason:
            print(f"{each}: skipped: {reason}", flush=True)
    results = options.results or FOLDER / f"servers_{machine_slug(name)}.json"
    before = json.loads(results.read_text())["runs"] if results.exists() else []
    digest = source_digest()

    def keep(run: record.Run) -> None:
        record.add(results.resolve(), name, [{**run, "source_digest": digest}])

    out, work = options.out.resolve(), options.work.resolve()
    runner.ends_when_told()
    if left := runner.end_all(out):
        print(f"ended {len(left)} processes that an earlier call had left")
    runs, not_run = runner.campaign(
        can, options.seconds, lambda each, limit: runner.run(each, work, out, limit), keep, before
    )
    print(*(f"{each.name}: NOT RUN, no time" for each in not_run), sep="\n", flush=True)
    passed = sum(run["passed"] for run in runs)
    print(f"{passed} of {len(runs)} passed, {len(not_run)} not run, {len(reasons) - len(can)} skipped")
    return int(passed < len(runs) or bool(not_run))


if __name__ == "__main__":
    sys.exit(main())
