"""A server's keyword arguments as options of its command line."""

from __future__ import annotations

import json
from typing import Any


def flags(arguments: dict[str, Any], *, negated: bool) -> list[str]:
    """{"max_num_seqs": 4} is --max-num-seqs 4. False is --no-NAME if options can be negated, else left out."""
    found: list[str] = []
    for name, value in arguments.items():
        option = name.replace("_", "-")
        if value is True:
            found.append(f"--{option}")
        elif value is False:
            found += [f"--no-{option}"] if negated else []
        elif isinstance(value, list):
            found += [f"--{option}", *map(str, value)]
        else:
            found += [f"--{option}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return found
