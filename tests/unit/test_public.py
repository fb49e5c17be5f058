"""What others may build on is what tests/unit/public.txt says: a change of it is seen, and decided (CONTRIBUTING.md).

python tests/unit/test_public.py > tests/unit/public.txt        accepts what there is
"""

from __future__ import annotations

import enum
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import mnnvl_ar

ROOT = Path(__file__).parent.parent.parent
COMMITTED = Path(__file__).with_name("public.txt")


def of_object(name: str, thing: Any) -> Iterator[str]:
    """A line for it, and for each of its public members."""
    if isinstance(thing, ModuleType):
        for each in sorted(getattr(thing, "__all__", [each for each in vars(thing) if own(thing, each)])):
            yield from of_object(f"{name}.{each}", getattr(thing, each))
    elif isinstance(thing, type):
        bases = ", ".join(base.__name__ for base in thing.__bases__ if base is not object)
        yield f"class {name}({bases})"
        if issubclass(thing, enum.Enum):
            yield from (f"{name}.{each.name} = {each.value!r}" for each in thing)
            return
        if "__init__" in vars(thing) and not getattr(thing, "_is_protocol", False):
            yield f"{name}{inspect.signature(thing)}"
        for each, member in sorted(vars(thing).items()):
            if not each.startswith("_"):
                member = getattr(member, "__func__", member)  # of a static method
                yield f"{name}.{each}{inspect.signature(member) if callable(member) else ''}"
    elif inspect.isfunction(thing) or isinstance(thing, torch._ops.OpOverload):
        yield f"{name}{inspect.signature(thing)}"
    else:
        yield f"{name}: {type(thing).__name__}"


def own(module: ModuleType, name: str) -> bool:
    """Made there, be it of an op, and not imported."""
    thing = getattr(module, name)
    made = getattr(thing, "__module__", None) == module.__name__ or isinstance(thing, torch._ops.OpOverload)
    return made and not name.startswith("_")


def surface(package: ModuleType = mnnvl_ar) -> list[str]:
    """Of Python, of torch.ops, and the environment variables that the package reads."""
    lines = [line for name in sorted(package.__all__) for line in of_object(name, getattr(package, name))]
    ops = [name for name in torch._C._dispatch_get_all_op_names() if re.match("mnnvl_ar::[^_]", name)]
    for op in sorted({name.split("::")[1].split(".")[0] for name in ops}):
        lines.append(f"torch.ops.{getattr(torch.ops.mnnvl_ar, op).default._schema}")
    # Not by mnnvl_ar*: while tests/host/test_wheel.py makes an sdist, there is a folder mnnvl_ar-<version>.
    files = [path for name in ("mnnvl_ar", "mnnvl_ar_plugins") for path in (ROOT / name).rglob("*.py")]
    texts = [path.read_text() for path in sorted(files)]
    return lines + sorted({f"${name}" for text in texts for name in re.findall(r'"(MNNVL_AR(?:_[A-Z]+)*)"', text)})


def test_the_surface_is_the_committed_one() -> None:
    assert surface() == COMMITTED.read_text().splitlines(), __doc__


def test_a_change_is_seen() -> None:
    class Broader:
        """Stands in for a package with one name more."""

    changed: Any = ModuleType("changed")
    vars(changed).update(vars(mnnvl_ar), __all__=[*mnnvl_ar.__all__, "Broader"], Broader=Broader)
    assert [line for line in surface(changed) if line not in surface()] == ["class Broader()"]

    class Other(mnnvl_ar.Workspace):
        def check(self, again: bool = False) -> None: ...

    vars(changed).update(__all__=mnnvl_ar.__all__, Workspace=Other)
    assert "Workspace.check(self, again: 'bool' = False) -> 'None'" in surface(changed)
    assert "Workspace.close(self, force: 'bool' = False) -> 'None'" not in surface(changed)


if __name__ == "__main__":
    print("\n".join(surface()))
