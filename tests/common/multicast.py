"""NVLink multicast stays off in tests and in all that they start, as it does in the bench, and for the same reason.

MNNVL_AR_TEST_MULTICAST=1 leaves it to the environment: for a person who has the whole machine, NVSwitches included.
"""

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))

from bench.safety import forbid_multicast


def keep_multicast_off() -> None:
    """To be called before anything that might make a workspace or a process group."""
    if os.environ.get("MNNVL_AR_TEST_MULTICAST") != "1":
        forbid_multicast()
