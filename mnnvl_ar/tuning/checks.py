"""Reads the JSON files of this folder. Whatever is wrong in one is an error that names the file, the place in it, what
was got there and what was wanted."""

from __future__ import annotations

import json
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any, TypeVar

from mnnvl_ar.errors import MnnvlArError

Built = TypeVar("Built")


class Wrong(Exception):
    """Something in the file is not as wanted; the text names place, got and wanted."""


def read(kind: str, file: Path, build: Callable[[Any], Built], advice: str) -> Built:
    """What `build` makes of the file's content. Raises `MnnvlArError` where the file cannot be read, or `build` raises
    `Wrong`; `kind` says what kind of file it is, `advice` what to do."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise MnnvlArError(f"{kind} {file.name}: cannot be read: {error}") from error
    try:
        return build(content)
    except Wrong as wrong:
        raise MnnvlArError(f"{kind} {file.name}: {wrong}. {advice}") from None


def check(right: bool, place: str, got: object, wanted: str) -> None:
    if not right:
        raise Wrong(f"{place}: got {got!r}, wanted {wanted}")


def check_object(place: str, got: Any) -> None:
    check(isinstance(got, dict), place, got, "an object")


def check_keys(place: str, got: Any, needed: Set[str], optional: Set[str] = frozenset()) -> None:
    """An object with all keys of `needed`, and no others but those of `optional`."""
    check_object(place or "content", got)
    wanted = ", ".join(sorted(needed)) + "".join(f", perhaps {key}" for key in sorted(optional))
    check(needed <= got.keys() <= needed | optional, f"{place} keys".strip(), sorted(got), wanted)


def check_whole(place: str, got: Any, least: int, most: int) -> None:
    check(type(got) is int and least <= got <= most, place, got, f"a whole number from {least} to {most}")
