"""Code and commands of a page of docs/tutorials, as they are written, and what running them shows.

A block of Python begins with the name of its file: `# first_call.py` for a program of the page, which commands of the
page run, `# csrc/...` (in C++ `// csrc/...`) for an excerpt of a file of the repository, in which a line `...` stands
for lines left out. In a `console` block a line that begins with `$ ` is a command, and what follows is its output. An
`sh` block is for a server or a clone, and is not run.

    page = Page(text)
    page.wrong(folder)      runs it in an empty folder; what is not as the page says
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
SECONDS = 280  # for a command: one that compiles, on a busy machine of two cores

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEADER = re.compile(r"(?:#|//) ([\w./]+\.\w+)(: needs two GPUs)?\n")
# What differs from run to run, and from machine to machine.
VARYING = [
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"), "<time>"),
    (re.compile(r"\b\d+\.\d+ s\b"), "<seconds>"),
    (re.compile(r"(\.cpp):\d+"), r"\1:<line>"),
]


class Code(NamedTuple):
    """A block of code: its file, the text below that name, and whether it needs GPUs."""

    file: str
    text: str
    on_gpus: bool


class Page:
    def __init__(self, text: str) -> None:
        self.blocks: list[tuple[str, str]] = FENCE.findall(text)

    @property
    def unnamed(self) -> list[str]:
        """First lines of code that has no file's name: nothing would run it or look for it."""
        code = [text for language, text in self.blocks if language in ("python", "cpp", "cuda")]
        return [text.split("\n")[0] for text in code if not HEADER.match(text)]

    @property
    def code(self) -> list[Code]:
        found = [(HEADER.match(text), text) for _, text in self.blocks]
        return [Code(head[1], text[head.end() :], bool(head[2])) for head, text in found if head]

    @property
    def programs(self) -> list[Code]:
        return [code for code in self.code if "/" not in code.file]

    @property
    def excerpts(self) -> list[Code]:
        return [code for code in self.code if "/" in code.file]

    @property
    def needs_gpus(self) -> bool:
        return any(code.on_gpus for code in self.programs)

    @property
    def commands(self) -> list[tuple[str, str]]:
        """Each command, and the output that the page shows."""
        text = "".join(text for language, text in self.blocks if language == "console")
        parts = re.split(r"^\$ (.*)\n", text, flags=re.MULTILINE)
        return list(zip(parts[1::2], parts[2::2], strict=True))

    def wrong(self, folder: Path) -> list[str]:
        """Writes the programs into `folder` and runs the commands there, one after the other, each in a process of its
        own, with our package as if it were installed."""
        environment = prepared(folder)
        for code in self.programs:
            (folder / code.file).write_text(f"# {code.file}\n{code.text}")
        found = []
        for command, shown in self.commands:
            shell = ["bash", "-o", "pipefail", "-c", command]
            done = subprocess.run(
                shell, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
            )
            if done.returncode != 0 or settled(done.stdout) != settled(shown):
                found.append(f"$ {command}\n{done.stdout}{done.stderr}exit status {done.returncode}; shown:\n{shown}")
        return found


def prepared(folder: Path) -> dict[str, str]:
    """An environment in which `python` is this Python, and the package of this tree is installed: it is on the path,
    with the metadata that an installation would write."""
    place = folder / ".installed"
    metadata = place / "mnnvl_ar-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mnnvl-ar\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(entry_points())
    python = place / "python"  # not a link, which would leave the environment that this Python is in
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    path = os.pathsep.join([str(place), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "PATH": f"{place}{os.pathsep}{os.environ['PATH']}"}


def entry_points() -> str:
    """Those of pyproject.toml, as an installation keeps them. (Python 3.10 has no tomllib.)"""
    text = (ROOT / "pyproject.toml").read_text()
    groups = re.findall(r'^\[project\.entry-points\."(.+)"\]\n((?:\w.*\n)+)', text, re.MULTILINE)
    return "\n".join(f"[{group}]\n{lines}".replace('"', "") for group, lines in groups)


def settled(output: str) -> str:
    """Without what may differ: times, seconds, lines of our sources, space at the ends of lines."""
    for pattern, place in VARYING:
        output = pattern.sub(place, output)
    return "\n".join(line.rstrip() for line in output.strip().split("\n"))


def misquoted(excerpt: Code, root: Path = ROOT) -> list[str]:
    """Parts of an excerpt that are not in its file, in that order; the file, if it is not there."""
    if not (root / excerpt.file).is_file():
        return [f"{excerpt.file}: is not there"]
    text = (root / excerpt.file).read_text()
    for part in filter(None, re.split(r"^ *\.\.\.\n", excerpt.text, flags=re.MULTILINE)):
        before, found, text = text.partition(part)
        if not (found and (not before or before.endswith("\n"))):
            return [f"{excerpt.file}: {part}"]
    return []
