"""What the environment says. It has to be the same on all ranks; where it is not, they do the cautious thing together.

MNNVL_AR=1               the servers' plugins put this library in place; without it they do nothing
MNNVL_AR_BACKENDS        which of FlashInfer's backends this library stands for, by default "mnnvl,trtllm"; "auto" is
                         ours, as the first of them, unless none is
MNNVL_AR_FALLBACK=0      where a workspace cannot be made, all ranks raise; by default all go to FlashInfer's trtllm
MNNVL_AR_TIMEOUT         seconds that making a workspace may take, by default 600: ranks of a server come to it minutes
                         apart, and FlashInfer would wait for ever
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from mnnvl_ar.arguments import seconds

BACKENDS = ("mnnvl", "trtllm")


@dataclass(frozen=True)
class Settings:
    backends: tuple[str, ...] = BACKENDS
    fallback: bool = True
    timeout: float = 600.0

    @staticmethod
    def read(environment: Mapping[str, str] = os.environ) -> Settings:
        """`ValueError` naming a variable that makes no sense."""
        names = tuple(filter(None, map(str.strip, environment.get("MNNVL_AR_BACKENDS", ",".join(BACKENDS)).split(","))))
        if unknown := [name for name in names if name not in BACKENDS]:
            raise ValueError(f"MNNVL_AR_BACKENDS: has {', '.join(unknown)}, wanted some of {', '.join(BACKENDS)}")
        fallback = environment.get("MNNVL_AR_FALLBACK", "1")
        if fallback not in ("0", "1"):
            raise ValueError(f"MNNVL_AR_FALLBACK: is {fallback!r}, wanted 0 or 1")
        text = environment.get("MNNVL_AR_TIMEOUT", "600")
        try:
            timeout = float(text)
        except ValueError:
            timeout = 0.0
        return Settings(names, fallback == "1", seconds("MNNVL_AR_TIMEOUT", timeout or text))

    def ours(self, backend: str) -> str:
        """The backend to pose as if this one is asked for; empty if it is not ours."""
        if backend == "auto":
            return self.backends[0] if self.backends else ""
        return backend if backend in self.backends else ""
