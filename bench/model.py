"""The predictions for machines that nobody here has run, bench/gb200/predictions.md: what is expected (expected.py),
what peers have published (published.py), and beneath it the cost model's floor, which is made here.

    python -m bench.model --write      makes the page

Multicast stores one message once, and the switch delivers it to all: one GPU then sends little, but still receives
from every other, so receiving is what bounds it.

    one-shot = 1 hop  + max(send x,        receive (R - 1) x)     / link
    two-shot = 2 hops + max(send (R-1)/R x, receive (R-1)/R x)    / link     columns to their owners
                      + max(send 1/R x,     receive (R-1)/R x)    / link     sums from their owners

Which of the two a size goes by is what the library's `auto` takes where nothing was measured: mnnvl_ar.tuning.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import expected, published
from mnnvl_ar.tuning import cost_model
from mnnvl_ar.tuning.machines import Machine, machine_of

PAGE = Path(__file__).resolve().parent / "gb200" / "predictions.md"
TPS = expected.TPS
TOKENS = (1, 4, 16, 64, 256, 1024)
HIDDEN = (7168,)

GB200 = machine_of("NVIDIA GB200")


def one_shot_us(nbytes: int, ranks: int, machine: Machine = GB200, *, multicast: bool = True) -> float:
    sends = nbytes if multicast else (ranks - 1) * nbytes
    return _fixed(machine) + machine.hop_us + max(sends, (ranks - 1) * nbytes) / machine.bytes_per_us


def two_shot_us(nbytes: int, ranks: int, machine: Machine = GB200, *, multicast: bool = True) -> float:
    share = (ranks - 1) / ranks * nbytes
    back = max(nbytes / ranks if multicast else share, share)
    return _fixed(machine) + 2 * machine.hop_us + (share + back) / machine.bytes_per_us


def _fixed(machine: Machine) -> float:
    return machine.launch_us + machine.read_l2_us + machine.reduction_us + machine.write_us


def crossover_bytes(ranks: int) -> int:
    """The largest message that `auto` sends by one-shot."""
    return cost_model.one_shot_bytes(GB200, ranks)


def page() -> str:
    rate, launch, hop = GB200.bytes_per_us / 1e3, GB200.launch_us, GB200.hop_us
    lines = [
        "# Predictions for GB200 over multicast",
        "",
        "**These are predictions of a cost model, not measurements.** Nothing on this page has been run on a GB200.",
        "Made by `python -m bench.model --write`.",
        "",
        *expected.section(),
        "",
        *published.section(),
        "",
        "## The floor",
        "",
        "By the cost model at the top of `bench/model.py`, which is what `auto` goes by. It holds only what cannot be",
        "avoided. Expected are, by the same strategies, so many times as much:",
        "; ".join(f"at TP{tp} {_over(1, tp):.1f} for T = 1, {_over(1024, tp):.1f} for T = 1024" for tp in (8, 72))
        + ".",
        "",
        f"Assumed: {rate:.0f} GB/s each way and GPU (NVLink 5, datasheet), and H200's measured launch",
        f"({launch} us) and hop ({hop} us). On H200 no kernel gets more than 365 of the datasheet's 450 GB/s.",
        "",
        "Fused AllReduce + add + RMSNorm, bf16, us a call, by the strategy that `auto` takes where nothing was",
        f"measured: one-shot (1) or two-shot (2). `auto` counts {GB200.stage_us} us for two-shot's second wait. It is",
        "no floor, so the times leave it out: just below the bounds one-shot is taken although two-shot's time would",
        "be less, by that much at most.",
    ]
    for hidden in HIDDEN:
        lines += ["", f"### Hidden {hidden}", "", "| tokens | " + " | ".join(f"TP{tp}" for tp in TPS) + " |"]
        lines.append("|---" * (len(TPS) + 1) + "|")
        for tokens in TOKENS:
            lines.append(f"| {tokens} | " + " | ".join(_entry(tokens * hidden * 2, tp) for tp in TPS) + " |")
    lines += [
        "",
        "### Where two-shot takes over",
        "",
        "| | " + " | ".join(f"TP{tp}" for tp in TPS) + " |",
        "|---" * (len(TPS) + 1) + "|",
        "| message, KB a rank | " + " | ".join(f"{crossover_bytes(tp) / 1e3:.0f}" for tp in TPS) + " |",
        "",
        "The bounds are those of `mnnvl_ar/tuning/cost_model.py`; `make tune` replaces them by what is measured.",
        "Without multicast the model gives the same: each GPU then sends R - 1 messages instead of one, and",
        "receives as many as before. What multicast saves is the instructions that send them, which the model does not",
        "know.",
        "",
    ]
    return "\n".join(lines)


def _over(tokens: int, ranks: int) -> float:
    """What is expected over the floor, at the last of HIDDEN."""
    nbytes = tokens * HIDDEN[-1] * 2
    if nbytes <= crossover_bytes(ranks):
        return expected.LIKELY.one_shot_us(tokens, ranks, HIDDEN[-1]) / one_shot_us(nbytes, ranks)
    return expected.LIKELY.two_shot_us(tokens, ranks, HIDDEN[-1]) / two_shot_us(nbytes, ranks)


def _entry(nbytes: int, ranks: int) -> str:
    if nbytes <= crossover_bytes(ranks):
        return f"{one_shot_us(nbytes, ranks):.1f} (1)"
    return f"{two_shot_us(nbytes, ranks):.1f} (2)"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The cost model's predictions for GB200.")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} instead of printing it")
    if parser.parse_args().write:
        PAGE.write_text(page())
    else:
        print(page())
