"""JSON-like content with one value changed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any


def edited(content: Any, path: Sequence[Any], value: object) -> Any:
    """A copy of `content` with `value` at `path`; without that key if `value` is None. The value itself for no path."""
    if not path:
        return value
    content = copy.deepcopy(content)
    part = content
    for key in path[:-1]:
        part = part[key]
    if value is None:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return content
