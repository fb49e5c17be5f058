"""The command line of bench/run.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from bench import peers
from bench.cells import CONTEXTS, DTYPES, HIDDEN, OPS, QUICK_HIDDEN, QUICK_TOKENS, TOKENS, TPS

T = TypeVar("T")
# What decides which rows a run holds. Only a run that chose none of it may stand as the record of its machine.
CHOICES = ("quick", "tp", "op", "tokens", "hidden", "dtype", "mode", "l2", "context", "skew", "strategy", "pdl")
CHOICES += ("transport", "peers", "tables")


def _list(kind: Callable[[str], T], allowed: Sequence[T] | None = None) -> Callable[[str], list[T]]:
    def parse(text: str) -> list[T]:
        values = [kind(word) for word in text.split(",") if word]
        if allowed is not None and (unknown := [value for value in values if value not in allowed]):
            raise argparse.ArgumentTypeError(f"{unknown[0]!r}, wanted some of {', '.join(map(str, allowed))}")
        return values

    return parse


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="bench/run.py",
        description="mnnvl_ar beside its peers, one process a GPU, also under torchrun. Lists by commas.",
    )
    grid = p.add_argument_group("grid")
    grid.add_argument("--quick", action="store_true", help="a small grid unless given, fewer rounds")
    grid.add_argument("--tp", type=_list(int), help=f"group sizes (those of {TPS} that the machine has)")
    grid.add_argument("--op", type=_list(str, OPS), default=["fused"], help=f"{', '.join(OPS)} (fused)")
    grid.add_argument("--tokens", type=_list(int), help="1 to 2048, powers of two")
    grid.add_argument("--hidden", type=_list(int), help=",".join(map(str, HIDDEN)))
    grid.add_argument("--dtype", type=_list(str, DTYPES), default=["bfloat16"], help="also float16, float32")
    grid.add_argument("--mode", type=_list(str, ("graph", "eager")), help="graph, eager (graph; eager on the host)")
    grid.add_argument("--l2", type=_list(str, ("warm", "cold")), default=["warm"], help="warm, cold (warm)")
    grid.add_argument("--context", type=_list(str, CONTEXTS), default=["chain"], help=f"{', '.join(CONTEXTS)} (chain)")
    grid.add_argument("--skew", type=_list(float), default=[0.0], help="us from the first rank to the last (0)")
    variants = p.add_argument_group("variants")
    variants.add_argument("--strategy", type=_list(str, ("auto", "one_shot", "two_shot")), default=["auto"])
    variants.add_argument(
        "--pdl", type=_list(str, ("early", "late", "off", "auto")), default=["auto"], help="first: mnnvl_ar's"
    )
    variants.add_argument("--transport", default="auto")
    variants.add_argument("--peers", type=_list(str, list(peers.PEERS)), help=f"{', '.join(peers.PEERS)}")
    variants.add_argument("--multicast", action="store_true", help="allow NVLink multicast: your own machine only")
    run = p.add_argument_group("run")
    run.add_argument("--device", choices=("cuda", "cpu"), help="cpu: the host transport, eager, quick")
    run.add_argument("--processes", type=int, help="ranks to start without torchrun (one a GPU)")
    run.add_argument(
        "--rounds", type=int, help="timed replays of each variant (40, or 100 up to 64 tokens; 15 if quick)"
    )
    run.add_argument("--seconds", type=float, default=3600.0, help="stop cleanly then, and say what was not run")
    run.add_argument("--json", type=Path, help="result (bench/results/<machine>.json where nothing above is chosen)")
    run.add_argument("--resume", action="store_true", help="keep the file's rows of the same sources")
    run.add_argument("--tables", type=Path, help="folder of the tables that auto goes by (mnnvl_ar/tuning)")
    run.add_argument("--warm-peers", action="store_true", help="only compile what peers compile at first use")
    run.add_argument("--verbose", action="store_true", help="every variant's time")
    run.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)  # rows for a restart
    run.add_argument(
        "--without", action="append", default=[], metavar="PEER=REASON", help="leave a peer out, and record why"
    )
    return p


def settle_multicast(allow: bool) -> None:
    """Keeps NVLink multicast off for this process and all that it starts: a multicast object on an NVSwitch that others
    use too can take their GPUs down. `allow`, from the person who owns the whole machine, leaves it to the environment,
    and is refused where that forbids multicast already."""
    from mnnvl_ar.memory import forbid_multicast, multicast_refusal

    if not allow:
        forbid_multicast()
    elif switch := multicast_refusal():
        raise SystemExit(f"bench: --multicast, but multicast is forbidden here by {switch}")


def settle(args: argparse.Namespace, world_size: int) -> argparse.Namespace:
    """Fills in what depends on the machine."""
    if args.device == "cpu":
        args.quick, args.mode, args.l2, args.skew = True, ["eager"], ["warm"], [0.0]
    usual = parser()
    chosen = [name for name in CHOICES if getattr(args, name) != usual.get_default(name)]
    args.whole = args.device == "cuda" and not chosen
    args.tokens = args.tokens or list(QUICK_TOKENS if args.quick else TOKENS)
    args.hidden = args.hidden or list(QUICK_HIDDEN if args.quick else HIDDEN)
    args.tp = [tp for tp in args.tp or TPS if tp <= world_size] or [world_size]
    args.mode = args.mode or (["graph"] if args.device == "cuda" else ["eager"])
    if args.peers is None:
        args.peers = list(peers.ON_GPU if args.device == "cuda" else peers.ON_HOST)
    return args
