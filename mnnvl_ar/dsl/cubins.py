"""Kernels that were built before: one cubin a world size, architecture and epilogue, and a list of them.

    FOLDER/one_shot-r2-sm_90a.cubin      and so on
    FOLDER/kernels.json                  of each file: the kernel's name, and a digest of the sources it was built from

Contract
  * A cubin of other sources than are here is not taken: it might sign or reduce otherwise.
  * Needs neither the DSL nor PyTorch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path

from mnnvl_ar.dsl import constants

HERE = Path(__file__).resolve().parent
FOLDER = Path(os.environ.get("MNNVL_AR_CUBINS") or HERE.parent.parent / "build" / "dsl")
LIST = "kernels.json"
SOURCES = ("constants.py", "ptx.py", "numerics.py", "fault.py", "ring.py", "one_shot.py")


@dataclass(frozen=True)
class Built:
    """A kernel: its cubin, and its name there."""

    cubin: bytes
    kernel: str


def file_name(ranks: int, architecture: str, epilogue: str) -> str:
    """`epilogue`: "module:function", or "" for the norm alone."""
    middle = f"-{epilogue.replace(':', '.')}" if epilogue else ""
    return f"one_shot-r{ranks}-{architecture}{middle}.cubin"


def digest(epilogue: str) -> str:
    """Of all that a kernel is made from."""
    files = [HERE / name for name in SOURCES]
    if epilogue:
        try:
            spec = importlib.util.find_spec(epilogue.partition(":")[0])
        except ImportError:  # of a package that it would lie in
            spec = None
        if spec is None or spec.origin is None or ":" not in epilogue:
            raise ValueError(f"epilogue: is {epilogue!r}, wanted 'module:function' of a module that can be imported")
        files.append(Path(spec.origin))
    parts = [constants.DSL.encode(), *(file.read_bytes() for file in files)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def listed(folder: Path) -> dict[str, dict[str, str]]:
    file = folder / LIST
    found: dict[str, dict[str, str]] = json.loads(file.read_text()) if file.exists() else {}
    return found


def find(ranks: int, architecture: str, epilogue: str, folder: Path) -> Built | None:
    """The kernel, if it has been built from the sources that are here. `ValueError`: the epilogue's are not."""
    name, sources = file_name(ranks, architecture, epilogue), digest(epilogue)
    entry = listed(folder).get(name)
    if entry is None or entry["sources"] != sources or not (folder / name).exists():
        return None
    return Built((folder / name).read_bytes(), entry["kernel"])


def keep(built: Built, ranks: int, architecture: str, epilogue: str, folder: Path) -> Path:
    """Writes it down. One process at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    name = file_name(ranks, architecture, epilogue)
    (folder / name).write_bytes(built.cubin)
    entries = {**listed(folder), name: {"kernel": built.kernel, "sources": digest(epilogue)}}
    (folder / LIST).write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")
    return folder / name
