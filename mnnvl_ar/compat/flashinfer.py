"""Ours in place of two functions of FlashInfer: `create_allreduce_fusion_workspace` and `allreduce_fusion`.

    print(install())      # in every process, before workspaces are made
    uninstall()           # workspaces of ours that are still there go on working through `calls.fused`

What is not ours goes to the originals with the arguments as they came: other backends at creation, other workspaces at
calls. `inspect.signature` of each replacement is the installed release's. No version is asked for: `wrong` looks at the
names, codes and parameters that the front rests on, and `install` touches nothing where one is not as it should be.
What somebody else has put around ours (by `functools.wraps`) stays where it is, and so does ours within it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from mnnvl_ar.compat.calls import fused
from mnnvl_ar.compat.creation import created, version
from mnnvl_ar.compat.patterns import PATTERNS, REFUSED
from mnnvl_ar.compat.workspace import FusionWorkspace
from mnnvl_ar.errors import MnnvlArError

MODULE = "flashinfer.comm"
CREATE, FUSE = "create_allreduce_fusion_workspace", "allreduce_fusion"
MODULES = (MODULE, f"{MODULE}.allreduce")  # where callers find them, and where they are made
_MARK = "_mnnvl_ar"  # of a function of ours: itself. `functools.wraps` copies it to what others put around that
# In FlashInfer's order, as far as the oldest release has them, and further names that later ones may have.
_PARAMETERS = {
    CREATE: (
        *("backend", "world_size", "rank", "max_token_num", "hidden_dim", "dtype", "gpus_per_node", "comm_backend"),
        *("force_oneshot_support", "group"),
    ),
    FUSE: tuple(
        name for name, each in inspect.signature(fused).parameters.items() if each.kind is each.POSITIONAL_OR_KEYWORD
    ),
}
_OLDEST = {CREATE: "force_oneshot_support", FUSE: "shared_expert_output"}  # the last one there has to be
_LAYOUTS = {"SWIZZLED_128x4": 0, "SWIZZLED_8x4": 1, "LINEAR": 2}

_log = logging.getLogger("mnnvl_ar")


def fuse(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In place of `original`, FlashInfer's `allreduce_fusion`."""
    return (fused if _is_ours(args, kwargs) else original)(*args, **kwargs)


def _is_ours(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    workspace = kwargs["workspace"] if "workspace" in kwargs else args[1] if len(args) > 1 else None
    return isinstance(workspace, FusionWorkspace)


# What is called in place of each function, with that function first.
REPLACEMENTS = {CREATE: created, FUSE: fuse}


def install() -> str:
    """Puts ours in place, once; says what is in place then. `MnnvlArError` says what is not as we know it, and then
    nothing was touched; `ImportError` where there is no FlashInfer."""
    adopted()
    replaced = functools.cache(wrapped)  # one for both modules where they have one function
    for module in map(importlib.import_module, MODULES):
        for name in REPLACEMENTS:
            present = getattr(module, name)
            if not hasattr(present, _MARK):
                setattr(module, name, replaced(name, present))
    return described()


def uninstall() -> None:
    """Gives FlashInfer its functions back. May be called twice, and without `install`."""
    for module in filter(None, map(sys.modules.get, MODULES)):
        for name in REPLACEMENTS:
            present: Any = getattr(module, name, None)
            mark: Any = getattr(present, _MARK, None)
            if mark is None:
                continue
            if mark is present:
                setattr(module, name, mark.__wrapped__)
            else:
                _log.warning("mnnvl_ar: %s.%s is somebody's around ours, and both stay", module.__name__, name)


def checked() -> ModuleType:
    """`flashinfer.comm`, which is as we know it."""
    comm = importlib.import_module(MODULE)
    if problems := [*wrong(comm), *_missing()]:
        raise MnnvlArError(f"FlashInfer {_their_version()} is left as it is: {'; '.join(problems)}")
    return comm


def _missing() -> list[str]:
    """What is not where FlashInfer makes its functions, a line each."""
    try:
        home = importlib.import_module(MODULES[1])
    except ImportError as error:
        return [f"there is no {MODULES[1]} ({error})"]
    return [f"there is no {MODULES[1]}.{name}" for name in REPLACEMENTS if not callable(getattr(home, name, None))]


def adopted() -> ModuleType:
    """The same, and our workspaces are instances of its abstract class, for as long as the process lives."""
    comm = checked()
    comm.AllReduceFusionWorkspace.register(FusionWorkspace)
    return comm


def wrong(comm: ModuleType) -> list[str]:
    """What is not as this front knows it, a line each."""
    lines = [line for name in REPLACEMENTS for line in _wrong_function(name, getattr(comm, name, None))]
    codes = getattr(comm, "AllReduceFusionPattern", None)
    known = {pattern.name: code for code, pattern in PATTERNS.items()} | {name: code for code, name in REFUSED.items()}
    for name, code in known.items():
        found = getattr(codes, name, None if code < 6 else code)  # older releases have no more
        if found != code:
            lines.append(f"AllReduceFusionPattern.{name} is {found}, wanted {code}")
    layouts = getattr(comm, "QuantizationSFLayout", None)
    lines += [
        f"QuantizationSFLayout.{name} is {getattr(layouts, name, None)}, wanted {code}"
        for name, code in _LAYOUTS.items()
        if getattr(layouts, name, None) != code
    ]
    if not hasattr(getattr(comm, "AllReduceFusionWorkspace", None), "register"):
        lines.append("AllReduceFusionWorkspace is no abstract class")
    return lines


def _wrong_function(name: str, function: Any) -> list[str]:
    if not callable(function):
        return [f"there is no {name}"]
    parameters = inspect.signature(function).parameters.values()
    positional = tuple(each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD)
    ours = _PARAMETERS[name]
    if positional != ours[: len(positional)]:
        odd = next(each for each, known in zip((*positional, None), (*ours, None), strict=False) if each != known)
        return [f"{name} has a parameter {odd} where it is not known"]
    least = ours.index(_OLDEST[name]) + 1
    return [f"{name} has no parameter {ours[len(positional)]}"] if len(positional) < least else []


def wrapped(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """What stands in place of `original`."""

    def create_ours(*args: Any, **kwargs: Any) -> Any:
        return created(original, *args, **kwargs)

    def fuse_ours(*args: Any, **kwargs: Any) -> Any:  # as `fuse`, but each call in between costs its tenths of a us
        if isinstance(kwargs.get("workspace"), FusionWorkspace) or _is_ours(args, kwargs):
            return fused(*args, **kwargs)
        return original(*args, **kwargs)

    ours = functools.update_wrapper(fuse_ours if name == FUSE else create_ours, original)
    setattr(ours, _MARK, ours)
    return ours


def _their_version() -> str:
    return str(getattr(importlib.import_module("flashinfer"), "__version__", "of an unknown version"))


def described() -> str:
    return f"mnnvl_ar {version()} stands in for {CREATE} and {FUSE} of FlashInfer {_their_version()}"
