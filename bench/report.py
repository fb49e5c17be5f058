"""Makes pictures and the tables of docs/benchmarks.md from the recorded runs, and says how the figures stand. With
--predicted, nothing of that, but what a rack has measured beside what was predicted (bench/against.py)."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import against, alone, plots, results, servers, targets
from bench.gb200 import record
from bench.results import Row

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
SERVERS = "<!-- servers:begin -->", "<!-- servers:end -->"
ALONE = "<!-- alone:begin -->", "<!-- alone:end -->"
TABLE_HIDDEN = 7168


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    parser.add_argument("--images", type=Path, default=results.ROOT / "docs" / "images")
    parser.add_argument("--page", type=Path, default=results.ROOT / "docs" / "benchmarks.md")
    parser.add_argument("--predicted", type=Path, metavar="FILE", help="what bench.gb200 brought home: record or log")
    args = parser.parse_args(arguments)
    if args.predicted:
        return _predicted(args.predicted)
    today = results.source_digest()
    if of_servers := servers.section(servers.load(args.results), today):
        print(put_in_page(of_servers, args.page, *SERVERS))
    recorded = load(args.results)
    if of_one := alone.section(recorded, today):
        print(put_in_page(of_one, args.page, *ALONE))
    runs = {name: run for name, run in recorded.items() if not alone.is_alone(run)}
    if not runs:
        print(f"no recorded run in {args.results}; make one by `make bench` where there are GPUs")
        return 0
    for name, run in runs.items():
        stale = (
            "" if run["source_digest"] == today else f", STALE: of sources {run['source_digest']}, today's are {today}"
        )
        print(f"{name}: {run['machine']}, {len(run['rows'])} rows{stale}")
    pictures = draw(runs, args.images)
    section = page_section(runs, pictures, args.page.parent, today)
    print(put_in_page(section, args.page))
    print("\n".join(standing(runs, args.results)))
    return 0


def _predicted(file: Path) -> int:
    """1 where the run did not come to its end, or a result of ours was wrong; 2 where there is none in the file."""
    try:
        found = record.read(file)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(against.lines(found)))
    return 0 if against.is_sound(found) else 1


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Recorded runs by file name, the one with the largest group last."""
    files = sorted(set(folder.glob("*.json")) - set(folder.glob(servers.PATTERN)))
    runs = {file.stem: json.loads(file.read_text()) for file in files}
    runs = {name: run for name, run in runs.items() if usual(run["rows"]) or alone.is_alone(run)}
    return dict(sorted(runs.items(), key=lambda item: max(row["tp"] for row in item[1]["rows"])))


def usual(rows: list[Row]) -> list[Row]:
    """What pictures and tables show: fused, bf16, in a graph, warm, without our forced variants."""
    rows = [row for row in rows if row["op"] == "fused" and row["dtype"] == "bfloat16"]
    rows = [row for row in rows if results.is_usual(row)]
    return [row for row in rows if row["variant"] == results.OURS or results.is_peer(row["variant"])]


def draw(runs: dict[str, dict[str, Any]], folder: Path) -> list[Path]:
    """The pictures of each run, those of the largest first; without matplotlib those that are there already, so that
    the page keeps them, with a word about it."""
    pictures = []
    for name, run in reversed(runs.items()):
        for kind, plot, text in (
            ("latency", plots.latency, "AllReduce + add + RMSNorm, bf16, us a call in a graph"),
            ("speedup", plots.speed_up, "times as fast as the best peer"),
        ):
            file = folder / f"bench_{kind}_{name}.png"
            try:
                plot(usual(run["rows"]), f"{run['machine']}: {text}", file)
            except ImportError as error:
                print(f"{file.name} is not drawn anew: {error} (pip install 'mnnvl-ar[bench]')")
            if file.exists():
                pictures.append(file)
    return pictures


def page_section(runs: dict[str, dict[str, Any]], pictures: list[Path], base: Path, today: str) -> str:
    """A table of each run, those of the sources `today` first, and the largest first; and the first one's pictures."""
    largest_first = list(reversed(runs.items()))
    order = sorted(largest_first, key=lambda item: item[1]["source_digest"] != today)
    sections = [_table(run, today) for _, run in order]
    name, run = order[0]
    shown = [
        f"![{picture.stem.split('_')[1]} on {run['machine']}]"
        f"({picture.relative_to(base) if picture.is_relative_to(base) else picture})"
        for picture in pictures
        if picture.stem.endswith(f"_{name}")
    ]
    return "\n\n".join([sections[0], *shown, *sections[1:]])


def _table(run: dict[str, Any], today: str) -> str:
    rows = [row for row in usual(run["rows"]) if row["hidden"] == TABLE_HIDDEN]
    cells = {(cell[0]["tp"], cell[0]["tokens"]): results.ours_and_best(cell) for cell in results.by_cell(rows).values()}
    tps = sorted({tp for tp, _ in cells})
    lines = [
        f"{run['machine']}, hidden {TABLE_HIDDEN}. {results.sources_told(run, today)}",
        "",
        "| tokens | " + " | ".join(f"TP{tp}" for tp in tps) + " |",
        "|---" * (len(tps) + 1) + "|",
    ]
    for tokens in sorted({tokens for _, tokens in cells}):
        lines.append(f"| {tokens} | " + " | ".join(_entry(cells.get((tp, tokens))) for tp in tps) + " |")
    return "\n".join(lines)


def _entry(cell: tuple[Row | None, Row | None] | None) -> str:
    ours, best = cell or (None, None)
    if ours is None:
        return "-"
    wrong = "" if ours["ok"] else " WRONG"
    peer = f"{best['variant']} {best['p50_us']:.1f}" if best is not None else "no peer"
    floor = "-" if ours["floor_us"] is None else f"{ours['floor_us']:.1f}"
    return f"**{ours['p50_us']:.1f}**{wrong} ({peer}; {floor})"


def put_in_page(section: str, page: Path, begin: str = BEGIN, end: str = END) -> str:
    """Replaces what is between the markers; says what it did."""
    text = page.read_text() if page.exists() else ""
    if begin not in text or end not in text:
        return f"{page.name} has no {begin} ... {end}; the table would be:\n{section}"
    head, rest = text.split(begin, 1)
    tail = rest.split(end, 1)[1]
    page.write_text(f"{head}{begin}\n{section}\n{end}{tail}")
    return f"wrote the table into {page.name}"


def standing(runs: dict[str, dict[str, Any]], folder: Path) -> list[str]:
    """One line a figure and run."""
    lines = []
    for name, run in runs.items():
        lines.append(f"figures to reach, {name}:")
        lines += [f"  {figure}" for figure in (*targets.judge(run["rows"]), *targets.quantised(run["rows"]))]
    lines.append("figures to reach, any run:")
    costs = [json.loads(file.read_text()) for file in sorted((folder / "cpu_cost").glob("*.json"))]
    ours = [row["cpu_us"] for cost in costs for row in cost["rows"] if row["variant"] == results.OURS]
    lines += [f"  {targets.cpu_cost(max(ours, default=None))}", f"  {targets.workspace(workspace_bytes())}"]
    return lines


def workspace_bytes() -> int | None:
    """The size of the workspace that `targets.workspace` judges; None where the library is not built."""
    try:
        from mnnvl_ar import tuning, workspace
    except (ImportError, OSError):
        return None
    table = tuning.table_of("NVIDIA H200", 8)
    slot_bytes = table.slot_bytes(8, 2048, 8192 * 2, max_bytes=workspace.DEFAULT_MAX_BYTES)
    return workspace.Layout(slot_bytes).nbytes


if __name__ == "__main__":
    sys.exit(main())
