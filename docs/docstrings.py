"""Our docstrings are plain text, made to be read in a terminal; Sphinx reads reStructuredText. This is the one as the
other, so that no docstring is written for a generator.

    to_rst(lines, link)     the lines of a docstring, as reStructuredText

What is known of plain text:
* `name` in backticks is code, and a link where `link` knows the name;
* lines "name: what it is", or "one, other: ...", are a list of arguments or attributes; what is indented under a line
  belongs to it;
* a line "Errors: ...", "Source: ..." begins a paragraph of its own, which ends where a sentence begins with a line;
* a paragraph that is indented as a whole is an example;
* what a member of an enumeration means is in the comment behind it.
"""

from __future__ import annotations

import enum
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ITEM = re.compile(r"((?:\*{0,2}[a-z_]\w*, )*[a-z_]\w*): +(\S.*)")
LABEL = re.compile(r"((?:Attributes|Errors|Source)(?: and [a-z]+)?):(?= )")
CODE = re.compile(r"`([^`]+)`")

Link = Callable[[str], str | None]


def public_names(listed: Path) -> set[str]:
    """The full names of what tests/unit/public.txt lists, apart from torch.ops and the environment. What is public in
    the package and in a module of it (`Strategy`, `ops.Strategy`) has one name, the shorter."""
    lines = (line.removeprefix("class ") for line in listed.read_text().splitlines())
    found = (re.match(r"[\w.]+", line) for line in lines if not line.startswith(("torch.", "$")))
    names = {name[0] for name in found if name}
    return {f"mnnvl_ar.{name}" for name in names if name.partition(".")[2] not in names}


def converter(known: set[str]) -> Callable[..., None]:
    """For Sphinx's `autodoc-process-docstring`."""

    def convert(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
        module = name.rpartition(".")[0]

        def link(text: str) -> str | None:
            places = (f"{name}.{text}", f"{module}.{text}", f"mnnvl_ar.{text}", text)
            return next((place for place in places if place in known and place != name), None)

        lines[:] = to_rst(lines, link)
        if isinstance(thing, type) and issubclass(thing, enum.Enum):
            lines += meanings(inspect.getsource(thing), link)

    return convert


def meanings(source: str, link: Link) -> list[str]:
    """A list of an enumeration's members, of those that have a comment behind them."""
    found = re.findall(r"^ +(\w+) = .*?  # (.+)$", source, re.MULTILINE)
    return [line for name, text in found for line in (f"``{name}``", f"    {_inline(text, link)}", "")]


def to_rst(lines: list[str], link: Link = lambda _: None) -> list[str]:
    return [line for paragraph in _paragraphs(lines) for line in [*_paragraph(paragraph, link), ""]]


def _paragraphs(lines: list[str]) -> Iterator[list[str]]:
    paragraph: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            paragraph.append(line.rstrip())
        elif paragraph:
            yield paragraph
            paragraph = []


def _paragraph(lines: list[str], link: Link) -> Iterator[str]:
    if all(line.startswith(" ") for line in lines):
        yield from ["::", "", *lines]
        return
    for kind, name, text in _parts(lines):
        if kind == "item":
            names = ", ".join(f"``{each}``" for each in name.split(", "))
            yield from [names, f"    {_inline(text, link)}", ""]
        elif kind == "label":
            yield from [f"**{name}.** {_inline(text, link)}", ""]
        else:
            yield from [_inline(text, link), ""]


def _parts(lines: list[str]) -> list[tuple[str, str, str]]:
    """(kind, name, text) of each part of a paragraph, lines that belong together joined."""
    parts: list[tuple[str, str, str]] = []
    for line in lines:
        item, label = ITEM.fullmatch(line), LABEL.match(line)
        before = parts[-1][0] if parts else ""
        if item:
            parts.append(("item", item[1], item[2]))
        elif label:
            parts.append(("label", label[1], line[label.end() :].strip()))
        elif before == "label" and parts[-1][2].endswith(".") and line[0].isupper():
            parts.append(("text", "", line.strip()))
        elif before and (line.startswith(" ") or before != "item"):
            kind, name, text = parts[-1]
            parts[-1] = (kind, name, f"{text} {line.strip()}")
        else:
            parts.append(("text", "", line.strip()))
    return parts


def _inline(text: str, link: Link) -> str:
    """Code as code or as a link; what else reStructuredText would take for markup, as it is."""
    done = []
    for number, piece in enumerate(CODE.split(text)):
        if number % 2:
            target = link(piece)
            done.append(f":py:obj:`{piece} <{target}>`" if target else f"``{piece}``")
        else:
            plain = re.sub(r"([*|\\]|_(?!\w))", r"\\\1", piece)
            done.append(f"\\ {plain}" if number and piece[:1].isalnum() else plain)
    return "".join(done)
