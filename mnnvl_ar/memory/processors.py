"""How many SMs each rank's calls may count on, agreed on by all ranks.

All CTAs of a call have to be on the device at once, and the whole device is not always there: a green context and MPS
give a process fewer SMs, and ranks that share a GPU have it together. Each rank says what its context has; the least of
any rank's share is what all go by, so that plans are alike where devices are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def agreed(members: Sequence[Mapping[str, Any]]) -> int:
    """From each rank's `Traits`: the least, over ranks, of what its context has and of its part of its device. 0: no
    rank knows, as on the host. At least 1 otherwise."""
    ranks_on = Counter(member["uid"] for member in members)
    shares = [
        min(member["processors"], max(1, member["device_processors"] // ranks_on[member["uid"]]))
        for member in members
        if member["processors"]
    ]
    return min(shares, default=0)
