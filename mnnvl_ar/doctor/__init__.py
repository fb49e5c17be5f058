"""`python -m mnnvl_ar doctor`: what this machine has, what a group on it would get and why, and a short self-test.

Nothing is changed and no multicast object is made. Under torchrun (RANK and WORLD_SIZE set) the given group is tested,
over several hosts if it spans them, and rank 0 reports for all. Exit status: 0, a group would work; 1, it would not, or
the self-test failed.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from mnnvl_ar.doctor import group, outlook, selftest, show
from mnnvl_ar.doctor.machine import examine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="all that is known, as JSON")
    parser.add_argument("--group-size", type=int, default=0, help="ranks to plan for (default: one a visible GPU)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of the self-test; 0 leaves it out (default 1)")


def run(args: argparse.Namespace) -> int:
    if group.is_given():
        found, rank = group.examine(args.seconds)
    else:
        found, rank = {"hosts": [examine()]}, 0
        found["self_test"] = selftest.run(len(found["hosts"][0]["gpus"]), args.seconds)
    if rank != 0:
        return int(not found["self_test"].get("ok", True))
    found["outlook"] = outlook.of(found["hosts"], args.group_size or found.get("world_size", 0))
    found["problems"] = outlook.problems(found)
    return report(found, args.json)


def report(found: dict[str, Any], as_json: bool) -> int:
    print(json.dumps(found, indent=2) if as_json else show.text(found))
    return int(bool(found["problems"]))
