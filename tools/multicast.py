"""NVLink multicast stays off in tests, in tools and in all that they start.

Creating a multicast object on an NVSwitch that others use too can take their GPUs down. A person who has the whole
machine, NVSwitches included, may set MNNVL_AR_TEST_MULTICAST=1, which leaves multicast to the environment.
"""

import os


def keep_multicast_off() -> None:
    """To be called before anything that might make a workspace or a process group. Loads mnnvl_ar."""
    if os.environ.get("MNNVL_AR_TEST_MULTICAST") != "1":
        from mnnvl_ar.memory import forbid_multicast

        forbid_multicast()
