"""Entry points of vLLM (`vllm.general_plugins`, and `vllm.platform_plugins` for MNNVL_AR_THROUGH=ops) and SGLang
(`sglang.srt.plugins`): active with MNNVL_AR=1.

Apart from `mnnvl_ar`, whose import loads PyTorch and the compiled library: servers load every plugin that is installed,
in every process, and one that is not wanted must cost nothing.
"""

import os
from types import ModuleType


def vllm() -> None:
    if _is_on():
        _servers().vllm()


def vllm_platform() -> str | None:
    if _is_on() and os.environ.get("MNNVL_AR_THROUGH") == "ops":
        name: str | None = _servers().vllm_platform()
        return name
    return None


def sglang() -> None:
    if _is_on():
        _servers().sglang()


def _servers() -> ModuleType:
    """What does it. `SystemExit` where it cannot be loaded: after any other error SGLang, and vLLM where it asks for
    platforms, would go on without us, whatever MNNVL_AR_FALLBACK and the switches of multicast say."""
    try:
        from mnnvl_ar.compat import servers
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise SystemExit(f"mnnvl_ar cannot be loaded, and MNNVL_AR=1 asks for it: {why}") from error
    return servers


def _is_on() -> bool:
    value = os.environ.get("MNNVL_AR", "0")
    if value not in ("", "0", "1"):
        import logging

        logging.getLogger("mnnvl_ar").warning("MNNVL_AR: is %r, wanted 1 or 0: mnnvl_ar is not active", value)
    return value == "1"
