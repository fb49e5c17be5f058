"""Facts by version, as they are committed and as they moved.

In a file: {"project", "versions": all in order, "facts": {name: {versions: value}}}, where a key such as
"0.6.8.post1 .. 0.6.10" stands for all versions from one to the other in that order; in memory {version: {name: value}}.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias

from tools.contracts.facts import Facts

HERE = Path(__file__).resolve().parent
ByVersion: TypeAlias = dict[str, Facts]
ABSENT = object()
WIDTH = 200  # characters of a value in a line about what moved


def load(name: str, folder: Path = HERE) -> ByVersion:
    """Committed facts of a project, "flashinfer", "vllm" or "sglang", by version, oldest first."""
    path = folder / f"{name}.json"
    if not path.exists():
        return {}
    record = json.loads(path.read_text())
    facts: ByVersion = {version: {} for version in record["versions"]}
    for fact, runs in record["facts"].items():
        for run, value in runs.items():
            for version in _versions(run, record["versions"]):
                facts[version][fact] = value
    return facts


def save(name: str, facts: ByVersion, folder: Path = HERE) -> None:
    names = sorted({fact for each in facts.values() for fact in each})
    record = {
        "project": name,
        "versions": [*facts],
        "facts": {
            fact: {
                f"{run[0]} .. {run[-1]}" if len(run) > 1 else run[0]: facts[run[0]][fact]
                for run in _runs([*facts], [each.get(fact, ABSENT) for each in facts.values()])
                if fact in facts[run[0]]
            }
            for fact in names
        },
    }
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def moved(before: ByVersion, after: ByVersion) -> list[str]:
    """One line for each fact added, removed or changed since `before`, with its versions. A release that `before` does
    not know is held against the one before it."""
    changes: dict[tuple[str, str], list[str]] = {}
    lines = [f"{version}: no longer there" for version in before if version not in after]
    previous: Facts | None = None
    for version, facts in after.items():
        if version not in before:
            lines.append(f"{version}: a new release")
        old = before.get(version, previous)
        for fact in sorted({*facts, *(old or {})}) if old is not None else ():
            change = _change((old or {}).get(fact, ABSENT), facts.get(fact, ABSENT))
            if change:
                changes.setdefault((fact, change), []).append(version)
        previous = facts
    for (fact, change), versions in changes.items():
        shown = ["..".join(dict.fromkeys((run[0], run[-1]))) for run in _consecutive(versions, [*after])]
        lines.append(f"{', '.join(shown)}: {fact}: {change}")
    return lines


def _change(old: Any, new: Any) -> str | None:
    """Words for it; of lists and dictionaries only what is in one of them."""
    if old is ABSENT or new is ABSENT:
        return None if old is new else f"added, {_short(new)}" if old is ABSENT else f"removed, was {_short(old)}"
    if old == new:
        return None
    if isinstance(old, dict) and isinstance(new, dict):
        changes = {key: _change(old.get(key, ABSENT), new.get(key, ABSENT)) for key in sorted({*old, *new})}
        return "; ".join(f"{key} {change}" for key, change in changes.items() if change)
    if isinstance(old, list) and isinstance(new, list):
        gone, come = [each for each in old if each not in new], [each for each in new if each not in old]
        parts = [f"without {_short(gone)}"] * bool(gone) + [f"with {_short(come)}"] * bool(come)
        return "changed, " + (", ".join(parts) or "order")
    return f"changed, {_short(old)} to {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= WIDTH else f"{text[:WIDTH]} ..."


def _runs(versions: list[str], values: list[Any]) -> list[list[str]]:
    """Versions that follow each other with one value."""
    runs: list[list[str]] = []
    for number, version in enumerate(versions):
        if number and _same(values[number], values[number - 1]):
            runs[-1].append(version)
        else:
            runs.append([version])
    return runs


def _same(left: Any, right: Any) -> bool:
    """As JSON: 1 is neither 1.0 nor true, and a dictionary's order counts for nothing."""
    if left is ABSENT or right is ABSENT:
        return left is right
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


def _consecutive(some: list[str], versions: list[str]) -> list[list[str]]:
    runs = _runs(versions, [version in some for version in versions])
    return [run for run in runs if run[0] in some]


def _versions(run: str, versions: list[str]) -> list[str]:
    first, _, last = run.partition(" .. ")
    return versions[versions.index(first) : versions.index(last or first) + 1]
