"""What vLLM and SGLang load if MNNVL_AR=1 (`mnnvl_ar_plugins`), and what `python -m mnnvl_ar doctor` says of it.

MNNVL_AR_THROUGH=ops, without FlashInfer: vLLM has a platform that names classes of ours (`vllm_platform`), SGLang hooks
on two functions of its layers (`sglang_layer`). By default in place of FlashInfer's functions (`flashinfer`):
vLLM looks FlashInfer's functions up at each call, so they are put in place on the module. SGLang binds one of them at
import, so its own registry of hooks puts ours around them, wherever they have been bound.
Our log lines go where the server's go: vLLM gives handlers to its own logger only, SGLang to the root.

A fault then ends the process, and the deadline becomes short when the server serves (`policy`).

A plugin that cannot do what it was asked for, whatever it was that failed, leaves FlashInfer alone and says so; but it
ends the process where that would be no better: where MNNVL_AR_FALLBACK=0 says so, and where multicast is switched off,
which FlashInfer's mnnvl would use all the same. By SystemExit, since SGLang goes on after any other error of a plugin.

One switch of multicast that is set has all of them set: each library knows its own alone, and PyTorch's symmetric
memory stands behind FlashInfer's trtllm.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from importlib import metadata
from typing import Any

from mnnvl_ar.compat import creation, flashinfer, policy
from mnnvl_ar.compat.settings import Settings
from mnnvl_ar.errors import MnnvlArError
from mnnvl_ar.memory import MULTICAST_SWITCHES, forbid_multicast, multicast_refusal

GROUPS = {"vllm": "vllm.general_plugins", "sglang": "sglang.srt.plugins"}  # of entry points, by server
PLATFORMS, CUDA = "vllm.platform_plugins", "vllm.platforms.cuda.CudaPlatform"
PLATFORM = "mnnvl_ar.compat.vllm_platform.Platform"
# With our platform: FlashInfer's all-reduce off, and where a model calls its fused op by itself, not its mnnvl.
ENVIRONMENT = {"VLLM_ALLREDUCE_USE_FLASHINFER": "0", "VLLM_FLASHINFER_ALLREDUCE_BACKEND": "trtllm"}
FILTERS = {"vllm": "VLLM_PLUGINS", "sglang": "SGLANG_PLUGINS"}  # variables that choose among plugins
NAME, SWITCH = "mnnvl_ar", "MNNVL_AR"

_log = logging.getLogger("mnnvl_ar")


def vllm() -> None:
    _log.parent = logging.getLogger("vllm")
    _activate("vllm", flashinfer.install if _settings().through == "flashinfer" else _on_our_platform)


def vllm_platform() -> str | None:
    """The platform's name, if vLLM's own would be CUDA. vLLM asks in every process, before it knows its platform."""
    _log.parent = logging.getLogger("vllm")
    _forbid_wholly()
    try:
        platforms: Any = importlib.import_module("vllm.platforms")
        theirs = platforms.cuda_platform_plugin()
        if theirs not in (None, CUDA):
            raise MnnvlArError(f"vLLM's CUDA platform is {theirs}, wanted {CUDA}")
    except Exception as error:  # vLLM would go on without a word
        refuse(error, _settings())
        return None
    if theirs is None:
        return None
    os.environ.update(ENVIRONMENT)
    return PLATFORM


def _forbid_wholly() -> None:
    """Where one switch forbids multicast, all do from now on."""
    switch = multicast_refusal()
    if switch and any(os.environ.get(name) != value for name, value in MULTICAST_SWITCHES.items()):
        forbid_multicast()
        _log.info("mnnvl_ar: multicast is switched off by %s, and so from now on by every other switch too", switch)


def _on_our_platform() -> str:
    platforms: Any = importlib.import_module("vllm.platforms")
    found = f"{type(platforms.current_platform).__module__}.{type(platforms.current_platform).__name__}"
    if found != PLATFORM:
        raise MnnvlArError(f"vLLM's platform is {found}, wanted {PLATFORM}, an entry point of {PLATFORMS}")
    return f"{_by_ops('vLLM')} by its platform"


def _by_ops(server: str) -> str:
    return f"mnnvl_ar {creation.version()} is called as torch.ops.mnnvl_ar in {server}'s graphs,"


def sglang() -> None:
    _activate("sglang", _hook if _settings().through == "flashinfer" else _hook_on_layers)


def _hook_on_layers() -> str:
    from mnnvl_ar.compat import sglang_layer

    return sglang_layer.hook()


def _hook() -> str:
    """SGLang applies the hooks when all plugins are loaded, once a process."""
    flashinfer.adopted()
    registry: Any = importlib.import_module("sglang.srt.plugins.hook_registry")
    for name, replacement in flashinfer.REPLACEMENTS.items():
        registry.HookRegistry.register(f"{flashinfer.MODULE}.{name}", replacement, registry.HookType.AROUND)
    return flashinfer.described()


def _settings() -> Settings:
    try:
        return Settings.read()
    except ValueError as error:
        raise SystemExit(f"mnnvl_ar: {error}") from error


def refuse(error: Exception, settings: Settings, *, makes_multicast: bool = True) -> None:
    """Says why the server is left as it is; `SystemExit` where that is no choice, as when FlashInfer may then make the
    multicast that is switched off."""
    switched_off = multicast_refusal() if makes_multicast else ""
    if settings.fallback and not switched_off:
        _log.warning("mnnvl_ar is not active: %s", said(error))
        return
    why = f"multicast is switched off by {switched_off}" if settings.fallback else "MNNVL_AR_FALLBACK=0"
    raise SystemExit(f"mnnvl_ar cannot be active ({said(error)}), and FlashInfer is no choice: {why}") from error


def said(error: Exception) -> str:
    """In one line: what it says, with its kind where that is not enough to make sense of it."""
    text = " ".join(str(error).split())
    return text if text and isinstance(error, (ImportError, MnnvlArError)) else f"{type(error).__name__}: {text}"


def _activate(server: str, put_in_place: Callable[[], str]) -> None:
    settings = _settings()
    _forbid_wholly()
    try:
        what = put_in_place()
    except Exception as error:  # anything may come of importing FlashInfer, or the server's layers
        refuse(error, settings)
        return
    policy.activate(server)
    through_ops = settings.through == "ops"
    instead = "the server's own all-reduce" if through_ops else "FlashInfer's trtllm, if on one host"
    backends = "" if through_ops else f", backends {', '.join(settings.backends) or 'none'}"
    otherwise = f"all ranks go to {instead}" if settings.fallback else "all ranks raise"
    fault = f"ends the process with status {policy.STATUS}" if policy.handler(settings) else "is logged"
    _log.info("%s%s; where a workspace cannot be made, %s; a fault %s", what, backends, otherwise, fault)


def examine() -> list[dict[str, Any]]:
    """Of each server: name, version (None if it is not installed), whether our plugin would be active, why not, and
    what would be replaced. Imports FlashInfer, but no server, and changes nothing."""
    return [_examined(server, group) for server, group in GROUPS.items()]


def _examined(server: str, group: str) -> dict[str, Any]:
    version = _version(server)
    found: dict[str, Any] = {"server": server, "version": version, "active": False, "why_not": "", "replaces": ""}
    allowed = os.environ.get(FILTERS[server])
    through_ops = os.environ.get("MNNVL_AR_THROUGH") == "ops"
    groups = [group, PLATFORMS] if through_ops and server == "vllm" else [group]
    absent = [each for each in groups if NAME not in {entry.name for entry in metadata.entry_points(group=each)}]
    if version is None:
        found["why_not"] = "not installed"
    elif absent:
        group = absent[0]
        found["why_not"] = f"no entry point in {group}: install mnnvl_ar as a package, a bare folder is not found"
    elif allowed is not None and NAME not in map(str.strip, allowed.split(",")):
        found["why_not"] = f"{FILTERS[server]}={allowed} leaves {NAME} out"
    elif os.environ.get(SWITCH) != "1":
        found["why_not"] = f"{SWITCH}=1 is not set"
    else:
        try:
            Settings.read()
            if not through_ops:
                flashinfer.checked()
        except ValueError as error:  # of the settings, named
            found["why_not"] = str(error)
        except Exception as error:
            found["why_not"] = said(error)
        else:
            title = {"vllm": "vLLM", "sglang": "SGLang"}[server]
            what = f"{_by_ops(title)} if it is as we know it" if through_ops else flashinfer.described()
            found |= {"active": True, "replaces": what}
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
