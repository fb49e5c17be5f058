"""What the environment says. The first five have to be the same on all ranks. A rank that one of the first three leads
elsewhere does not come to the others, who wait for it, and then go where they may all go, or raise; where the fourth or
fifth differs, ranks do the cautious thing together.

MNNVL_AR=1               the servers' plugins put this library in place; without it they do nothing
MNNVL_AR_THROUGH         how a server comes to it: "flashinfer", by default: in place of two functions of FlashInfer;
                         "ops": by `torch.ops.mnnvl_ar` in its compiled graphs or its layer, without FlashInfer
MNNVL_AR_BACKENDS        which of FlashInfer's backends this library stands for, by default "mnnvl,trtllm"; "auto" is
                         ours, as the first of them, unless none is
MNNVL_AR_FALLBACK=0      where a workspace cannot be made, all ranks raise; by default all go to FlashInfer's trtllm,
                         if they are on one host
MNNVL_AR_TIMEOUT         seconds that making a workspace may take, by default 600: ranks of a server come to it minutes
                         apart, and FlashInfer would wait for ever
MNNVL_AR_ON_FAULT        "exit": a fault ends the process (`policy`); "log": it is logged, and calls end with NaN. By
                         default "exit" where a server's plugin is active, else "log"
MNNVL_AR_HOLD            seconds, by default 10: the longest that the call which found a fault waits for the process to
                         be ended before it goes on
MNNVL_AR_STARTUP_DEADLINE  seconds that a call waits for its peers until the server serves, by default 200, as anywhere
                         in this library
MNNVL_AR_DEADLINE        the same from then on, by default 20: shorter than the server's own limit for a step
MNNVL_AR_CALLS           a folder in which each process says how many calls it has served (`counted`); by default none
MNNVL_AR_PDL             the mode of calls that a server launches by PDL: "off", "late", "early", or by default "auto",
                         what was measured to be quickest between some matrix multiplications: others may differ

MNNVL_AR_ON_FAULT and what follows it are about this rank alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from mnnvl_ar.arguments import seconds
from mnnvl_ar.handle import DEFAULT_DEADLINE
from mnnvl_ar.ops import Pdl

BACKENDS = ("mnnvl", "trtllm")
THROUGH = ("flashinfer", "ops")
PDL = tuple(mode.name.lower() for mode in Pdl)  # the first is the default


@dataclass(frozen=True)
class Settings:
    backends: tuple[str, ...] = BACKENDS
    fallback: bool = True
    timeout: float = 600.0
    on_fault: str = ""  # not said: it depends on whether a server's plugin is active
    hold: float = 10.0
    startup_deadline: float = DEFAULT_DEADLINE
    deadline: float = 20.0
    through: str = THROUGH[0]
    calls: str = ""
    pdl: str = PDL[0]

    @staticmethod
    def read(environment: Mapping[str, str] = os.environ) -> Settings:
        """`ValueError` naming a variable that makes no sense."""
        names = tuple(filter(None, map(str.strip, environment.get("MNNVL_AR_BACKENDS", ",".join(BACKENDS)).split(","))))
        if unknown := [name for name in names if name not in BACKENDS]:
            raise ValueError(f"MNNVL_AR_BACKENDS: has {', '.join(unknown)}, wanted some of {', '.join(BACKENDS)}")
        fallback = environment.get("MNNVL_AR_FALLBACK", "1")
        if fallback not in ("0", "1"):
            raise ValueError(f"MNNVL_AR_FALLBACK: is {fallback!r}, wanted 0 or 1")
        on_fault = environment.get("MNNVL_AR_ON_FAULT", "")
        if on_fault not in ("exit", "log", ""):
            raise ValueError(f"MNNVL_AR_ON_FAULT: is {on_fault!r}, wanted exit or log")
        through = environment.get("MNNVL_AR_THROUGH", THROUGH[0])
        if through not in THROUGH:
            raise ValueError(f"MNNVL_AR_THROUGH: is {through!r}, wanted {' or '.join(THROUGH)}")
        pdl = environment.get("MNNVL_AR_PDL", PDL[0])
        if pdl not in PDL:
            raise ValueError(f"MNNVL_AR_PDL: is {pdl!r}, wanted {', '.join(PDL[:-1])} or {PDL[-1]}")
        return Settings(
            names,
            fallback == "1",
            _seconds(environment, "MNNVL_AR_TIMEOUT", Settings.timeout),
            on_fault,
            _seconds(environment, "MNNVL_AR_HOLD", Settings.hold),
            _seconds(environment, "MNNVL_AR_STARTUP_DEADLINE", Settings.startup_deadline),
            _seconds(environment, "MNNVL_AR_DEADLINE", Settings.deadline),
            through,
            environment.get("MNNVL_AR_CALLS", ""),
            pdl,
        )

    def ours(self, backend: str) -> str:
        """The backend to pose as if this one is asked for; empty if it is not ours."""
        if backend == "auto":
            return self.backends[0] if self.backends else ""
        return backend if backend in self.backends else ""


def _seconds(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name, str(default))
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    return seconds(name, number or text)
