"""python -m tools.contracts renew: reads the facts of every supported release again and names what moved.

With `--accept` what moved is written to the committed JSON; without, it is an error. Of the newest release every
Python file is searched for call sites in files that projects.py does not name, which is an error too; `--everywhere`
does so for all releases.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from tools.contracts import facts, record
from tools.contracts.projects import PROJECTS, Project


def release(project: Project, wheel: facts.Files, everywhere: bool) -> tuple[facts.Facts, list[str]]:
    """Facts of a release, and the files that it would have to be read for too."""
    names = wheel.names()
    read = [name for name in names if facts.matches(name, project.wanted.files)]
    left = {name for name in names if name.endswith(".py") and not facts.matches(name, project.others)} - {*read}
    others = sorted(left) if everywhere else []
    texts = wheel.read([*read, *others])
    found = facts.of_release({name: texts[name] for name in read}, project.wanted)
    return found, [name for name in others if re.search(project.words, texts[name])]


def renew(names: list[str], accept: bool, everywhere: bool, folder: Path = record.HERE) -> list[str]:
    """What is wrong, a line each: what moved, unless that is accepted, and files that are not read."""
    from tools.contracts.index import Index  # needs pip, which what reads the committed JSON does not

    problems = []
    for name in names:
        project = PROJECTS[name]
        index = Index(project.index_name)
        versions = index.versions(project.oldest)
        after: record.ByVersion = {}
        for version in versions:
            with index.wheel(version) as wheel:
                after[version], others = release(project, wheel, everywhere or version == versions[-1])
            problems += [f"{name} {version}: {each}: mentions what is looked for and is not read" for each in others]
        moved = record.moved(record.load(name, folder), after)
        print(f"{name}: {len(versions)} releases, {versions[0]} to {versions[-1]}; {len(moved)} moved", flush=True)
        if accept:
            record.save(name, after, folder)
            print(*(f"  {line}" for line in moved), sep="\n")
        else:
            problems += [f"{name} {line}" for line in moved]
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.contracts", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("renew", help="read the releases again; fails with the name of what moved")
    command.add_argument("projects", nargs="*", metavar="PROJECT", help=f"of {', '.join(PROJECTS)}; all by default")
    command.add_argument("--accept", action="store_true", help="write what moved to the committed JSON")
    command.add_argument("--everywhere", action="store_true", help="search every Python file of every release")
    arguments = parser.parse_args()
    unknown = sorted({*arguments.projects} - {*PROJECTS})
    if unknown:
        parser.error(f"no such project: {', '.join(unknown)}")
    problems = renew(arguments.projects or [*PROJECTS], arguments.accept, arguments.everywhere)
    print(*problems, sep="\n", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
