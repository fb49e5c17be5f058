"""The fault matrix (tools/faults/run.py, as it is) with the twin in the library's place, on GPUs, one a rank.

    python -m tools.twin_faults one|other|both [options of tools.faults.run]

one: rank 0 runs the twin wherever it can, the others the library; other: the reverse; both: all run the twin. Calls
that the twin does not have are the library's. On one GPU, with virtual ranks and without the kinds that end a process,
the same is tests/gpu/test_gpu_twin.py::test_fault_matrix.
"""

from __future__ import annotations

import sys
from typing import Any

from tools.faults import run
from tools.faults.plan import Plan
from tools.faults.rank import Outcome, round_of


def with_one(rank: Any, plan: Plan) -> Outcome:
    return _beside(rank, plan, "one")


def with_other(rank: Any, plan: Plan) -> Outcome:
    return _beside(rank, plan, "other")


def with_both(rank: Any, plan: Plan) -> Outcome:
    return _beside(rank, plan, "both")


def _beside(rank: Any, plan: Plan, side: str) -> Outcome:
    from common.twin import beside
    from mnnvl_ar import dsl

    dsl.load(rank.device, rank.world_size)
    ended: list[Outcome] = []
    beside(rank, lambda rank: ended.append(round_of(rank, plan)), side)
    return ended[0]


def main() -> int:
    from tools import twin_faults as here  # by a name that ranks can import

    sides = {"one": here.with_one, "other": here.with_other, "both": here.with_both}
    if len(sys.argv) < 2 or sys.argv[1] not in sides:
        print(__doc__)
        return 2
    side = sys.argv.pop(1)
    if any(word.startswith("--re") for word in sys.argv):  # argparse takes `--record=FILE` and `--rec FILE`, too
        print("--record: these figures would stand for the library's")
        return 2
    sys.argv += ["--device", "cuda"]
    setattr(run, "round_of", sides[side])  # noqa: B010
    return run.main()


if __name__ == "__main__":
    sys.exit(main())
