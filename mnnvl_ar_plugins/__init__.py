"""Entry points of vLLM (`vllm.general_plugins`, and `vllm.platform_plugins` for MNNVL_AR_THROUGH=ops) and SGLang
(`sglang.srt.plugins`): active with MNNVL_AR=1.

Apart from `mnnvl_ar`, whose import loads PyTorch and the compiled library: servers load every plugin that is installed,
in every process, and one that is not wanted must cost nothing.
"""

import os


def vllm() -> None:
    if _is_on():
        from mnnvl_ar.compat import servers

        servers.vllm()


def vllm_platform() -> str | None:
    if _is_on() and os.environ.get("MNNVL_AR_THROUGH") == "ops":
        from mnnvl_ar.compat import servers

        return servers.vllm_platform()
    return None


def sglang() -> None:
    if _is_on():
        from mnnvl_ar.compat import servers

        servers.sglang()


def _is_on() -> bool:
    value = os.environ.get("MNNVL_AR", "0")
    if value not in ("", "0", "1"):
        import logging

        logging.getLogger("mnnvl_ar").warning("MNNVL_AR: is %r, wanted 1 or 0: mnnvl_ar is not active", value)
    return value == "1"
