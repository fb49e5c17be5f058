"""`python -m mnnvl_ar doctor`: what this machine has, what a group on it would get and why, a short self-test, and
which of the servers that are installed here would run on this library.

Nothing is changed, and the self-test gives back what it takes. Under torchrun (RANK and WORLD_SIZE set) the given group
is tested, over several hosts if it spans them, and rank 0 reports for all, whatever becomes of the others. Exit status:
0, a group would work; 1, it would not, or the self-test failed.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from mnnvl_ar.compat import servers
from mnnvl_ar.doctor import group, merge, outlook, selftest, show
from mnnvl_ar.doctor.machine import examine
from mnnvl_ar.doctor.problems import problems


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="all that is known, as JSON")
    parser.add_argument(
        "--group-size",
        type=int,
        default=0,
        help="ranks to plan for (default: those of torchrun, else one a GPU, else 2)",
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="of the self-test; 0 leaves it out (default 1)")
    parser.add_argument(
        "--timeout", type=float, default=60.0, help="seconds, beside --seconds, that ranks wait at most (default 60)"
    )


def run(args: argparse.Namespace) -> int:
    if group.is_given():
        return group.run(args.seconds, args.timeout, lambda *told: _report(args, *told))
    machine = examine()
    gpus = len(machine["gpus"]) if machine["uses"] is not None else 0
    return _report(args, {0: machine}, selftest.run(gpus, args.seconds, args.timeout), [], gpus or 2)


def _report(
    args: argparse.Namespace,
    machines: dict[int, dict[str, Any]],
    self_test: dict[str, Any],
    missing: list[int],
    size: int,
) -> int:
    found: dict[str, Any] = {"world_size": size, "missing": missing, "hosts": merge.hosts(machines)}
    found["outlook"] = outlook.of(merge.members(machines, args.group_size or size - len(missing)))
    found["self_test"] = self_test
    found["servers"] = servers.examine()
    found["problems"] = problems(found)
    print(json.dumps(found, indent=2) if args.json else show.text(found))
    return int(bool(found["problems"]))
