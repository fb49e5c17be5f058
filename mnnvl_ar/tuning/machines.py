"""What is known of each class of machine: mnnvl_ar/tuning/machines.json. The cost model (cost_model.py), the pace of
one-shot (csrc/launch/pace.h) and the bench's floor (bench/floor.py) take their figures from it.

    {"h200": {"hop_us": {"is": 0.61, "source": "measured on ..."}, ...},
     "b200": {"otherwise": {"is": "h200", "source": "not measured: ..."}, "egress_bytes_per_us": {...}, ...}, ...}

Each figure has its unit in its name and stands once: a class has the figures that are its own, and names a class above
it in the file whose figures hold otherwise. `source` is for people: what a figure was measured on, or that it is from a
datasheet, or that it was not measured.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from . import checks
from .checks import check, check_keys, check_object, check_whole

FILE = Path(__file__).with_name("machines.json")
DEFAULT = "h200"  # counts for machines that are not in the file


@dataclass(frozen=True)
class Link:
    """NVLink as one-shot's pace counts it (csrc/launch/pace.h), in clocks of an SM. What it gets wrong costs time, and
    nothing else: ranks may differ."""

    hop_clocks: int  # from a store to the first look that finds it, in a small call
    queued_hop_clocks: int  # the same while the link is full
    burst_bytes_per_clock: int  # in a call that waits for all of its rows at once
    paced_bytes_per_clock: int  # of stores without end
    paced_from_bytes: int  # sent by a rank in a call: from here on, rows leave one after the other

    def columns(self) -> dict[str, Any]:
        """As the op takes it, by the names of its arguments."""
        return {f"link_{name}": figure for name, figure in asdict(self).items()}


@dataclass(frozen=True)
class Machine:
    """Times in microseconds, rates in bytes a microsecond, of one GPU."""

    launch_us: float  # one empty kernel in a chain of a graph, with programmatic dependent launch
    hop_us: float  # from a store until a load at the peer, which spins, has seen it
    stage_us: float  # what one more wait costs besides its hop
    read_l2_us: float  # a load that another one waits for, of what is in L2
    read_dram_us: float  # of what is not
    reduction_us: float  # one sum over a row: shuffles, a trip through shared memory and a barrier, shuffles
    write_us: float  # from a store until L2 has acknowledged it
    egress_bytes_per_us: float  # what one GPU can send
    ingress_bytes_per_us: float  # and receive at the same time
    crossover_bytes_per_us: float  # the same, as cost_model.py counts what two-shot does not send
    link: Link

    @property
    def bytes_per_us(self) -> float:
        """What one GPU can send and receive at the same time, as much of either."""
        return min(self.egress_bytes_per_us, self.ingress_bytes_per_us)


FIGURES = tuple(field.name for field in fields(Machine) if field.name != "link")
LINK_FIGURES = tuple(f"link_{field.name}" for field in fields(Link))


def name_of(device: torch.device) -> str:
    """The machine of `device` as the functions here take it: the name of its GPU, or "host"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "host"


def machine_class(machine: str) -> str:
    """The name of a GPU (`torch.cuda.get_device_name`) as files have it: "NVIDIA H200" -> "h200"."""
    return re.sub(r"[^a-z0-9]+", "", machine.replace("NVIDIA", "").lower())


def known(machine: str) -> Machine | None:
    """The figures of a machine by the name of its GPU; None where the file has none of its class."""
    return shipped().get(machine_class(machine))


def machine_of(machine: str) -> Machine:
    """The figures of a machine by the name of its GPU; those of H200 where the file has none of its class."""
    return known(machine) or shipped()[DEFAULT]


def link_of(machine: str, generation: int = 0) -> Link:
    """The link of a machine by the name of its GPU. Where the file has none of its class, its `generation`, the major
    number of the compute capability, tells Blackwell (10 and later) from H200."""
    found = known(machine) or shipped()["b200" if generation >= 10 else DEFAULT]
    return found.link


def link_for(device: torch.device) -> Link:
    generation = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    return link_of(name_of(device), generation)


@functools.cache
def shipped() -> dict[str, Machine]:
    """The machines of the file that ships, by class."""
    return read(FILE)


def read(file: Path) -> dict[str, Machine]:
    """The file's machines by class. Raises `MnnvlArError` naming file, place, got and wanted."""
    return checks.read("file of machines", file, _machines, "Put back the one that ships with the library.")


def _machines(content: Any) -> dict[str, Machine]:
    check_object("content", content)
    figures: dict[str, dict[str, Any]] = {}
    for name, part in content.items():
        check(bool(name) and name == machine_class(name), "content", name, "a class of machine, such as h200")
        figures[name] = _figures(name, part, figures)
    check(DEFAULT in figures, "content", sorted(figures), f"{DEFAULT} among the classes")
    return {name: _machine(own) for name, own in figures.items()}


def _figures(place: str, part: Any, above: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A class's figures by their names in the file, its own and those of the class that it names."""
    known = {*FIGURES, *LINK_FIGURES}
    check_object(place, part)
    inherits = "otherwise" in part
    check_keys(place, part, {"otherwise"} if inherits else known, known if inherits else set())
    for name, figure in part.items():
        here = f"{place}, {name}"
        check_keys(here, figure, {"is", "source"})
        source = figure["source"]
        check(isinstance(source, str) and source.strip() != "", f"{here}, source", source, "where it is from")
        if name == "otherwise":
            check(figure["is"] in list(above), here, figure["is"], "a class above it in the file")
        elif name in LINK_FIGURES:
            check_whole(here, figure["is"], 1, 2**32 - 1)
        else:
            check(_is_positive(figure["is"]), here, figure["is"], "a number above 0")
    own = {name: figure["is"] for name, figure in part.items()}
    return {**above.get(own.pop("otherwise", ""), {}), **own}


def _is_positive(got: Any) -> bool:
    return type(got) in (int, float) and 0 < got < math.inf


def _machine(figures: dict[str, Any]) -> Machine:
    link = Link(**{name.removeprefix("link_"): figures[name] for name in LINK_FIGURES})
    return Machine(**{name: float(figures[name]) for name in FIGURES}, link=link)
