"""What vLLM and SGLang load if MNNVL_AR=1 (`mnnvl_ar_plugins`), and what `python -m mnnvl_ar doctor` says of it.

vLLM looks FlashInfer's functions up at each call, so they are put in place on the module. SGLang binds one of them at
import, so its own registry of hooks puts ours around them, wherever they have been bound.
Our log lines go where the server's go: vLLM gives handlers to its own logger only, SGLang to the root.

A fault then ends the process, and the deadline becomes short when the server serves (`policy`).

A plugin that cannot do what it was asked for leaves FlashInfer alone and says so; but it ends the process where that
would be no better: where MNNVL_AR_FALLBACK=0 says so, and where multicast is switched off, which FlashInfer's mnnvl
would use all the same. By SystemExit, since SGLang goes on after any other error of a plugin.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from importlib import metadata
from typing import Any

from mnnvl_ar.compat import flashinfer, policy
from mnnvl_ar.compat.settings import Settings
from mnnvl_ar.errors import MnnvlArError
from mnnvl_ar.memory import multicast_refusal

GROUPS = {"vllm": "vllm.general_plugins", "sglang": "sglang.srt.plugins"}  # of entry points, by server
FILTERS = {"vllm": "VLLM_PLUGINS", "sglang": "SGLANG_PLUGINS"}  # variables that choose among plugins
NAME, SWITCH = "mnnvl_ar", "MNNVL_AR"

_log = logging.getLogger("mnnvl_ar")


def vllm() -> None:
    _log.parent = logging.getLogger("vllm")
    _activate("vllm", flashinfer.install)


def sglang() -> None:
    _activate("sglang", _hook)


def _hook() -> str:
    """SGLang applies the hooks when all plugins are loaded, once a process."""
    flashinfer.adopted()
    registry: Any = importlib.import_module("sglang.srt.plugins.hook_registry")
    for name, replacement in flashinfer.REPLACEMENTS.items():
        registry.HookRegistry.register(f"{flashinfer.MODULE}.{name}", replacement, registry.HookType.AROUND)
    return flashinfer.described()


def _activate(server: str, put_in_place: Callable[[], str]) -> None:
    try:
        settings = Settings.read()
    except ValueError as error:
        raise SystemExit(f"mnnvl_ar: {error}") from error
    try:
        what = put_in_place()
    except (ImportError, MnnvlArError) as error:
        switched_off = multicast_refusal()
        if settings.fallback and not switched_off:
            _log.warning("mnnvl_ar is not active: %s", error)
            return
        why = f"multicast is switched off by {switched_off}" if settings.fallback else "MNNVL_AR_FALLBACK=0"
        raise SystemExit(f"mnnvl_ar cannot be active ({error}), and FlashInfer is no choice: {why}") from error
    policy.activate(server)
    otherwise = "all ranks go to FlashInfer's trtllm" if settings.fallback else "all ranks raise"
    fault = f"ends the process with status {policy.STATUS}" if policy.handler(settings) else "is logged"
    _log.info(
        "%s, backends %s; where a workspace cannot be made, %s; a fault %s",
        *(what, ", ".join(settings.backends) or "none", otherwise, fault),
    )


def examine() -> list[dict[str, Any]]:
    """Of each server: name, version (None if it is not installed), whether our plugin would be active, why not, and
    what would be replaced. Imports FlashInfer, but no server, and changes nothing."""
    return [_examined(server, group) for server, group in GROUPS.items()]


def _examined(server: str, group: str) -> dict[str, Any]:
    version = _version(server)
    found: dict[str, Any] = {"server": server, "version": version, "active": False, "why_not": "", "replaces": ""}
    allowed = os.environ.get(FILTERS[server])
    if version is None:
        found["why_not"] = "not installed"
    elif NAME not in {entry.name for entry in metadata.entry_points(group=group)}:
        found["why_not"] = f"no entry point in {group}: install mnnvl_ar as a package, a bare folder is not found"
    elif allowed is not None and NAME not in map(str.strip, allowed.split(",")):
        found["why_not"] = f"{FILTERS[server]}={allowed} leaves {NAME} out"
    elif os.environ.get(SWITCH) != "1":
        found["why_not"] = f"{SWITCH}=1 is not set"
    else:
        try:
            Settings.read()
            flashinfer.checked()
        except (ImportError, MnnvlArError, ValueError) as error:
            found["why_not"] = str(error)
        else:
            found |= {"active": True, "replaces": flashinfer.described()}
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
