"""The pictures: latency by size beside floor and peers, and speed-up over the best peer as a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.results import OURS, Row, by_cell, is_ours, ours_and_best

# One colour a peer, the same in every picture, also where a peer is missing.
COLOURS = {
    OURS: "#d62728",
    "nccl": "#7f7f7f",
    "nccl/pdl_norm": "#c7c7c7",
    "nccl/unmixed": "#525252",
    "nccl/unmixed/pdl_norm": "#969696",
    "nccl_symmetric": "#8c564b",
    "nccl_symmetric/pdl_norm": "#c49c94",
    "symm_mem/one_shot": "#9467bd",
    "symm_mem/one_shot/pdl_norm": "#6a51a3",
    "symm_mem/two_shot/pdl_norm": "#dadaeb",
    "vllm/pdl_norm": "#ffbb78",
    "symm_mem/two_shot": "#c5b0d5",
    "flashinfer/one_shot": "#2ca02c",
    "flashinfer/one_shot_late": "#006d2c",
    "flashinfer/one_shot_fp32": "#98df8a",
    "flashinfer/one_shot_fp32_late": "#bcbd22",
    "flashinfer/two_shot": "#1f77b4",
    "vllm": "#ff7f0e",
    "flashinfer_mnnvl": "#17becf",
}


ACROSS = 2  # panels, so that a page shows their labels in a size that can be read
TOKENS_TOLD = (1, 4, 16, 64, 256, 1024)  # on the axis


def latency(rows: Sequence[Row], title: str, file: Path) -> None:
    """One panel a group size and hidden size, log-log. Raises ImportError without matplotlib."""
    plt = _pyplot()
    tps, widths = _values(rows, "tp"), _values(rows, "hidden")
    columns = min(ACROSS, len(widths))
    lines = -(-len(widths) // columns)
    panels = [(tp, hidden) for tp in tps for hidden in [*widths, *[0] * (lines * columns - len(widths))]]
    size = (4.6 * columns + 1, 3.1 * lines * len(tps) + 1.4)
    figure, axes = plt.subplots(
        lines * len(tps), columns, figsize=size, squeeze=False, sharex=True, layout="constrained"
    )
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    for axis, (tp, hidden) in zip(axes.flat, panels, strict=True):
        if not hidden:
            axis.set_axis_off()
            continue
        here = [row for row in rows if (row["tp"], row["hidden"]) == (tp, hidden)]
        for variant in sorted(variants, key=is_ours):  # ours on top
            mine = sorted((row for row in here if row["variant"] == variant), key=lambda row: int(row["tokens"]))
            style: dict[str, Any] = {"color": COLOURS.get(variant), "label": variant, "marker": ".", "linewidth": 1}
            if variant == OURS:
                style.update(linewidth=2.4, marker="o", markersize=4)
            axis.plot([row["tokens"] for row in mine], [row["p50_us"] for row in mine], **style)
        floor = sorted({(int(row["tokens"]), float(row["floor_us"])) for row in here if row["floor_us"] is not None})
        if floor:
            axis.plot([t for t, _ in floor], [us for _, us in floor], "k--", linewidth=1, label="floor")
        axis.set(xscale="log", yscale="log", title=f"TP{tp}, hidden {hidden}")
        _plain_numbers(axis.xaxis, [t for t in TOKENS_TOLD if any(row["tokens"] >= t for row in rows)])
        _plain_numbers(axis.yaxis, _told([float(row["p50_us"]) for row in here]))
        axis.grid(True, alpha=0.25)
    for column in axes.T:
        lowest = [axis for axis in column if axis.axison][-1]
        lowest.set_xlabel("tokens")
        lowest.tick_params(labelbottom=True)
    for axis in axes[:, 0]:
        axis.set_ylabel("us a call, p50")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.suptitle(title)
    figure.legend(handles, labels, loc="outside lower center", ncol=min(4, len(labels)), frameon=False)
    _save(plt, figure, file)


def speed_up(rows: Sequence[Row], title: str, file: Path) -> None:
    """One panel a group size: best peer's time over ours, tokens by hidden. Raises ImportError without matplotlib."""
    plt = _pyplot()
    tps, widths, counts = (_values(rows, name) for name in ("tp", "hidden", "tokens"))
    ratios = {}
    for cell in by_cell(rows).values():
        ours, best = ours_and_best(cell)
        if ours is not None and best is not None:
            ratios[ours["tp"], ours["hidden"], ours["tokens"]] = best["p50_us"] / ours["p50_us"]
    from matplotlib.colors import TwoSlopeNorm

    scale = TwoSlopeNorm(1.0, vmin=0.5, vmax=3.0)  # red where a peer is ahead
    size = (0.62 * len(counts) + 2, (0.45 * len(widths) + 1) * len(tps) + 0.6)
    figure, axes = plt.subplots(len(tps), 1, figsize=size, squeeze=False, layout="constrained")
    for axis, tp in zip(axes.flat, tps, strict=True):
        grid = [[ratios.get((tp, hidden, tokens), float("nan")) for tokens in counts] for hidden in widths]
        axis.imshow(grid, cmap="RdYlGn", norm=scale, aspect="auto")
        axis.set_xticks(range(len(counts)), counts)
        axis.set_yticks(range(len(widths)), widths)
        axis.set(title=f"TP{tp}", ylabel="hidden")
        for y, line in enumerate(grid):
            for x, ratio in enumerate(line):
                if ratio == ratio:
                    axis.text(x, y, f"{ratio:.1f}", ha="center", va="center", fontsize=8)
    axes.flat[-1].set_xlabel("tokens")
    figure.suptitle(title)
    _save(plt, figure, file)


def _values(rows: Sequence[Row], name: str) -> list[int]:
    return sorted({int(row[name]) for row in rows})


def _told(times: Sequence[float]) -> list[int]:
    """What an axis of microseconds is marked with: those of 1, 2, 5, 10, ... that are near to these times."""
    steps = [mantissa * 10**power for power in range(6) for mantissa in (1, 2, 5)]
    return [step for step in steps if min(times) / 2 <= step <= 2 * max(times)]


def _plain_numbers(axis: Any, ticks: Sequence[int]) -> None:
    """A logarithmic axis that is marked with these numbers, written out, and with no others."""
    from matplotlib.ticker import NullLocator

    axis.set_ticks(ticks, labels=[f"{tick}" for tick in ticks])
    axis.set_minor_locator(NullLocator())


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(plt: Any, figure: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)
