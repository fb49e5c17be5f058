"""Measures launch shapes and writes the quickest ones as a table: `make tune`, minutes.

For each group size, row size and number of tokens, the shapes of bench/shapes.py are captured and timed as bench/run.py
does it (same clock, same check of the bits), all over one workspace's memory, between two GEMMs, as a server calls them
(bench/contexts.py). The table is what strategy and PDL mode "auto" go by from then on: mnnvl_ar/tuning/<machine
class>.json, in the format of mnnvl_ar/tuning/files.py.

The file is written whenever a row size of a group is done, so a later failure loses nothing that was measured before. A
row size that is measured anew replaces all of its entries; other row sizes and group sizes stay as they are, and where
a group's entries are of several sources, its `source_digest` names them all. All ranks need the same file: copy it to
every host.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import launch, options
from bench.cells import HIDDEN, TOKENS, TPS, Cell


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ints = lambda text: [int(word) for word in text.split(",")]  # noqa: E731
    parser.add_argument("--tp", type=ints)
    parser.add_argument("--tokens", type=ints, default=list(TOKENS))
    parser.add_argument("--hidden", type=ints, default=list(HIDDEN))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--context", choices=("gemm", "chain"), default="gemm")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1800.0, help="stop then, and leave unfinished row sizes out")
    parser.add_argument("--multicast", action="store_true", help="allow NVLink multicast: your own machine only")
    parser.add_argument("--out", type=Path, help="(mnnvl_ar/tuning/<machine class>.json)")
    for ignored in ("--scratch", "--without"):
        parser.add_argument(ignored, help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    return parser


def main() -> int:
    args = parser().parse_args()
    options.settle_multicast(allow=args.multicast)
    if "RANK" not in os.environ:
        processes = args.processes or _gpus()
        if args.device == "cuda" and processes < 2:
            print("tune: needs two GPUs at least")
            return 1
        command = [str(Path(__file__)), *sys.argv[1:]]
        return launch.run(command, processes, deadline=time.monotonic() + args.seconds + 60)
    return work(args)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def work(args: argparse.Namespace) -> int:
    import torch
    import torch.distributed as dist

    from bench import progress
    from bench.results import source_digest
    from bench.shapes import table
    from bench.team import are_shared, gpus_of_ranks, join_world, make_team
    from bench.tune_group import tune_group

    rank, size, device = join_world(args.device)
    if args.out is None and are_shared(gpus_of_ranks(device)):
        raise SystemExit("tune: ranks that share a GPU tell nothing of launch shapes: --out FILE, for a rehearsal")
    end = time.monotonic() + args.seconds
    mode, context = ("graph", args.context) if device.type == "cuda" else ("eager", "chain")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "host"
    digest = source_digest()  # before the first table is written, which is a source as well
    for tp in [tp for tp in args.tp or TPS if tp <= size]:
        progress.report(f"tuning TP{tp}", limit=600.0)
        team = make_team(tp, device)
        rows = [[Cell("fused", tp, t, h, "bfloat16", mode, context=context) for t in args.tokens] for h in args.hidden]
        for best in tune_group(team, rows, args.rounds, end) if team is not None else ():
            if rank == 0:
                write(args.out, name, {str(tp): table(best)}, digest)
        dist.barrier()
    dist.barrier()
    dist.destroy_process_group()
    return 0


def write(file: Path | None, name: str, tables: dict[str, list[dict[str, Any]]], digest: str) -> None:
    """Writes `tables`, entries by world size that were measured on sources with this digest, into the file of machine
    `name`. A file that the library could not read again does not replace the one that is there."""
    from mnnvl_ar.tuning import files
    from mnnvl_ar.tuning.machines import machine_class

    file = file or files.FOLDER / f"{machine_class(name)}.json"
    tp = json.loads(file.read_text())["tp"] if file.exists() else {}
    for size, entries in tables.items():
        tp[size] = _merged(tp.get(size, {}), entries, digest)
    groups = ",\n".join(f'"{size}": {_lines(tp[size])}' for size in sorted(tp, key=int))
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        draft.write_text(f'{{"machine": {json.dumps(name)}, "tp": {{\n{groups}\n}}}}\n')
        files.read(draft)
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)
    print(f"wrote {file}")


def _merged(before: dict[str, Any], entries: list[dict[str, Any]], digest: str) -> dict[str, Any]:
    """The group `before` with `entries` in place of its own of the same row sizes."""
    measured = {entry["row_bytes"] for entry in entries}
    kept = [entry for entry in before.get("entries", ()) if entry["row_bytes"] not in measured]
    digests = before.get("source_digest", "").split(" + ") if kept else []
    return {
        "source_digest": " + ".join(dict.fromkeys([*digests, digest])),
        "entries": sorted([*kept, *entries], key=lambda entry: (entry["row_bytes"], entry["max_tokens"])),
    }


def _lines(group: dict[str, Any]) -> str:
    """JSON with one line for each entry."""
    entries = ",\n".join("  " + json.dumps(entry) for entry in group.get("entries", ()))
    text = json.dumps({**group, "entries": []} if entries else group)
    return text.replace('"entries": []', f'"entries": [\n{entries}\n]')


if __name__ == "__main__":
    sys.exit(main())
