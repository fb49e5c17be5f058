"""Which strategy `auto` takes, and in what launch shape: by a table of what was measured on this class of machine, or
by a cost model where there is none.

Both depend on what all ranks have alike (class of machine, world size), and bring-up compares them, so all ranks pick
alike.
"""

from __future__ import annotations

import torch

from . import cost_model, files
from .table import Entry, Table

__all__ = ["Entry", "Table", "table_for", "table_of"]


def table_for(device: torch.device, world_size: int) -> Table:
    """What `auto` goes by in a group of `world_size` ranks on machines like that of `device`."""
    return table_of(torch.cuda.get_device_name(device) if device.type == "cuda" else "host", world_size)


def table_of(machine: str, world_size: int) -> Table:
    """The same by the name of a GPU, as `torch.cuda.get_device_name` has it, or "host". Raises `MnnvlArError` where
    there is a table that makes no sense."""
    name = files.machine_class(machine)
    file = files.FOLDER / f"{name}.json"
    tables = files.read(file) if file.exists() else {}
    if world_size in tables:
        return tables[world_size]
    constants = cost_model.MACHINES.get(name, cost_model.H200)
    return Table(cost_model.one_shot_bytes(constants, world_size), source="cost model")
