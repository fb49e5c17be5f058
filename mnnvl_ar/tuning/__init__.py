"""Which strategy "auto" takes, and in what launch shape: by a table of what was measured on this class of machine, or
by a cost model where there is none. Beside it, what is known of each class of machine.

A table depends only on what all ranks have alike (class of machine, world size), and bring-up compares it, so all ranks
choose alike.
"""

from __future__ import annotations

import torch

from . import cost_model, files, machines
from .machines import Link, link_for, link_of
from .table import Entry, LaunchShape, Table

__all__ = ["Entry", "LaunchShape", "Link", "Table", "link_for", "link_of", "table_for", "table_of"]


def table_for(device: torch.device, world_size: int) -> Table:
    """What `auto` goes by in a group of `world_size` ranks on machines like that of `device`."""
    return table_of(machines.name_of(device), world_size)


def table_of(machine: str, world_size: int) -> Table:
    """The same by the name of a GPU, as `torch.cuda.get_device_name` has it, or "host". Raises `MnnvlArError` where
    there is a table that makes no sense."""
    file = files.FOLDER / f"{machines.machine_class(machine)}.json"
    tables = files.read(file) if file.exists() else {}
    like = 2 if world_size == 1 else world_size  # one rank runs what two run, but for the link
    if like in tables:
        return tables[like]
    return Table(cost_model.one_shot_bytes(machines.machine_of(machine), world_size), source="cost model")
