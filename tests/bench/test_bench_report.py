"""bench/report.py on made-up runs: figures, the page's table, pictures."""

import sys
from pathlib import Path
from typing import Any

import pytest
import synthetic

from bench import plots, report, targets
from bench.cells import Cell


def by_name(figures: list[targets.Figure]) -> dict[str, targets.Figure]:
    return {figure.name: figure for figure in figures}


def test_all_figures_are_reached_by_a_run_near_the_floor():
    for figure in targets.judge(synthetic.rows()):
        assert figure.reached is True, str(figure)


def test_a_slow_cell_shows_in_each_figure_it_spoils():
    rows = synthetic.rows()
    slow = next(r for r in rows if (r["variant"], r["tp"], r["hidden"], r["tokens"]) == ("mnnvl_ar", 8, 7168, 1))
    slow["p50_us"] = 2.4 * slow["floor_us"]
    figures = by_name(targets.judge(rows))
    each = figures["each cell's speed-up, T <= 128"]
    assert each.reached is False
    assert "TP8 H=7168 T=1" in each.got
    assert "flashinfer/one_shot" in each.got
    assert figures["TP8 H=7168 T=1"].reached is False
    assert figures["time over floor, T <= 8"].reached is False
    assert figures["time over floor, T > 8"].reached is True
    assert "NOT REACHED" in str(each)


def test_a_wrong_peer_is_no_peer_and_a_wrong_answer_of_ours_counts():
    cell = Cell("fused", 8, 1, 7168, "bfloat16")
    ours = synthetic.row(cell, "mnnvl_ar", 1.2)
    wrong = synthetic.row(cell, "nccl", 1.0, ok=False)
    right = synthetic.row(cell, "vllm", 3.0)
    figures = by_name(targets.judge([ours, wrong, right]))
    assert "vllm" in figures["each cell's speed-up, T <= 128"].got
    assert figures["right answers"].reached is True
    assert by_name(targets.judge([{**ours, "ok": False}, right]))["right answers"].reached is False


def test_what_was_not_measured_is_neither_reached_nor_missed():
    assert {figure.reached for figure in targets.judge([])} == {None}
    cold = [{**row, "l2": "cold"} for row in synthetic.rows()]
    assert {figure.reached for figure in targets.judge(cold)} == {None}


def quantised_rows(cost: float = 0.1, vllm: float = 1.6, fused: float = 1.4, **other: Any) -> list[dict[str, Any]]:
    """Of one cell: the norm alone takes 3 us, its codes besides `cost` more, ours without it 3 us; peers in its terms.
    FlashInfer's quickest is wrong."""
    times = {"mnnvl_ar": 3.0, "mnnvl_ar/with_norm": 3.0 + cost, "mnnvl_ar+vllm": 3.0 * vllm}
    times |= {"flashinfer/one_shot": 3.0 * fused, "flashinfer/two_shot/with_norm": (3.0 + cost) * fused}
    cell = {"tp": 2, "tokens": 8, "hidden": 4096, "dtype": "bfloat16", **other}
    made = [{**cell, "op": "mxfp8", "variant": name, "p50_us": us, "ok": True} for name, us in times.items()]
    wrong = {**cell, "op": "mxfp8", "variant": "flashinfer/one_shot_fp32", "p50_us": 1.0, "ok": False}
    return [{**cell, "op": "fused", "variant": "mnnvl_ar", "p50_us": 3.0, "ok": True}, *made, wrong]


BESIDE, OVER_VLLM = "codes beside the norm, T <= 8", "quantised, over ours and vLLM's op"
OVER_FUSED, RIGHT = "quantised, over FlashInfer's fused, T <= 64", "right quantised answers"


def test_figures_of_quantised_ops():
    figures = by_name(targets.quantised(quantised_rows()))
    assert {name: figure.reached for name, figure in figures.items()} == dict.fromkeys(
        (BESIDE, OVER_VLLM, OVER_FUSED, RIGHT), True
    )
    assert figures[BESIDE].got == "0.10 us at worst (mxfp8 TP2 H=4096 T=8), 0 of 1 cells over"
    assert "1.40x at worst" in figures[OVER_FUSED].got
    assert "0 of 2 cells short" in figures[OVER_FUSED].got
    for name, rows in (
        (BESIDE, quantised_rows(cost=0.2)),
        (OVER_VLLM, quantised_rows(vllm=1.4)),
        (OVER_FUSED, quantised_rows(fused=1.2)),
        (RIGHT, [{**row, "ok": row["ok"] and row["variant"] != "mnnvl_ar/with_norm"} for row in quantised_rows()]),
    ):
        reached = {found: figure.reached for found, figure in by_name(targets.quantised(rows)).items()}
        assert reached == {found: found != name for found in reached}, name


def test_figures_of_quantised_ops_are_of_small_sizes_and_of_both_contexts():
    figures = by_name(targets.quantised(quantised_rows(cost=0.2, fused=1.0, tokens=128)))
    assert [figures[name].reached for name in (BESIDE, OVER_VLLM, OVER_FUSED)] == [None, True, None]
    both = quantised_rows() + quantised_rows(cost=0.5, context="gemm")
    assert by_name(targets.quantised(both))[BESIDE].got == (
        "0.50 us at worst (mxfp8 TP2 H=4096 T=8 gemm), 1 of 2 cells over"
    )
    for other in ({"l2": "cold"}, {"mode": "eager"}, {"skew_us": 2.0}, {"dtype": "float16"}):
        assert {figure.reached for figure in targets.quantised(quantised_rows(**other))} == {None}
    assert {figure.reached for figure in targets.quantised(synthetic.rows())} == {None}


def test_the_table_goes_between_the_markers_and_nowhere_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(report, "draw", lambda runs, folder: [folder / "bench_latency_h200x8.png"])
    results, page = tmp_path / "results", tmp_path / "page.md"
    synthetic.write(results / "h200x2.json", "2 x NVIDIA H200", synthetic.rows((2,)))
    synthetic.write(results / "h200x8.json", "8 x NVIDIA H200", synthetic.rows((2, 8)))
    page.write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n")
    arguments = ["--results", str(results), "--images", str(tmp_path / "images"), "--page", str(page)]
    assert report.main(arguments) == 0
    once = page.read_text()
    assert once.startswith("above\n")
    assert once.endswith("\nbelow\n")
    assert "old" not in once
    assert "(images/bench_latency_h200x8.png)" in once
    assert "8 x NVIDIA H200" in once
    assert "| tokens | TP2 | TP8 |" in once
    assert report.main(arguments) == 0
    assert page.read_text() == once
    printed = capsys.readouterr().out
    assert "STALE" in printed
    assert "reached      geometric mean" in printed


def test_a_run_of_todays_sources_comes_before_a_larger_one_of_others(tmp_path: Path):
    runs = {
        f"h200x{n}": {"machine": f"{n} x NVIDIA H200", "source_digest": digest, "rows": synthetic.rows((n,))}
        for n, digest in ((2, "today"), (4, "before"), (8, "before"))
    }
    pictures = [tmp_path / f"bench_latency_{name}.png" for name in runs]
    section = report.page_section(runs, pictures, tmp_path, "today")
    shown = [
        "2 x NVIDIA H200, hidden",
        "(bench_latency_h200x2.png)",
        "8 x NVIDIA H200, hidden",
        "4 x NVIDIA H200, hidden",
    ]
    assert sorted(shown, key=section.index) == shown
    assert section.count(".png") == 1
    assert [line.endswith("**earlier than today's**.") for line in section.split("\n") if ", hidden" in line] == [
        False,
        True,
        True,
    ]


def alone_row(variant: str, p50: float, **more: Any) -> dict[str, Any]:
    usual = {"op": "fused", "tp": 1, "tokens": 8, "hidden": 4096, "dtype": "bfloat16", "ok": True}
    return {**usual, "context": "gemm", "variant": variant, "p50_us": p50, "floor_us": 1.0, **more}


def test_a_world_of_one_has_a_table_of_its_own(tmp_path: Path):
    """And no picture, no figure to reach and no place in the others' table: it has no peer."""
    results, page = tmp_path / "results", tmp_path / "page.md"
    rows = [
        alone_row("mnnvl_ar", 3.2),
        alone_row("mnnvl_ar/pdl_early", 3.6, ok=False),
        alone_row("yardstick/copy", 1.5),
    ]
    rows.append(alone_row("mnnvl_ar", 16.0, context="chain", mode="eager"))
    rows.append(alone_row("mnnvl_ar", 3.3, l2="cold"))
    synthetic.write(results / "h200x1.json", "1 x NVIDIA H200", rows)
    synthetic.write(results / "h200x2.json", "2 x NVIDIA H200", synthetic.rows((2,)))
    markers = [report.BEGIN, report.END, *report.ALONE]
    page.write_text("\n".join(markers) + "\n")
    assert report.main(["--results", str(results), "--images", str(tmp_path / "images"), "--page", str(page)]) == 0
    others, own = page.read_text().split(report.ALONE[0])
    assert "1 x NVIDIA H200" not in others
    assert "h200x1" not in others
    assert "1 x NVIDIA H200. Sources `0000000000000000`, **earlier than today's**." in own
    assert "| fused, between GEMMs | 4096 | 8 | 3.20 | - | - | 3.60 WRONG | - | 1.50 | - |" in own
    assert "| fused, in a chain of calls alone, eager | 4096 | 8 | 16.00 |" in own
    assert "| fused, between GEMMs, cold | 4096 | 8 | 3.30 |" in own
    assert not (tmp_path / "images" / "bench_latency_h200x1.png").exists()


def test_a_machine_without_a_floor_is_shown_without(tmp_path: Path):
    rows = [{**row, "floor_us": None} for row in synthetic.rows((8,))]
    figures = by_name(targets.judge(rows))
    assert {figures[f"time over floor, T {which} 8"].reached for which in ("<=", ">")} == {None}
    section = report.page_section({"b": {"machine": "8 x B", "source_digest": "0", "rows": rows}}, [], tmp_path, "0")
    best = next(
        row for row in rows if (row["tokens"], row["hidden"], row["variant"]) == (1024, 7168, "flashinfer/one_shot")
    )
    assert f"(flashinfer/one_shot {best['p50_us']:.1f}; -)" in section


def test_no_two_variants_share_a_colour():
    assert len(set(plots.COLOURS.values())) == len(plots.COLOURS)


@pytest.mark.parametrize("floor", [True, False])
def test_pictures(tmp_path: Path, floor: bool):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (the dev extra)")
    run = {"machine": "8 x NVIDIA H200", "rows": [row for row in synthetic.rows((8,)) if row["hidden"] == 7168]}
    if not floor:
        run["rows"] = [{**row, "floor_us": None} for row in run["rows"]]
    pictures = report.draw({"h200x8": run}, tmp_path)
    assert [p.name for p in pictures] == ["bench_latency_h200x8.png", "bench_speedup_h200x8.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") and p.stat().st_size > 10_000 for p in pictures)


def test_the_lowest_panel_of_each_column_names_its_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of three panels in two columns the second column ends a line above the first."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (the dev extra)")
    figures: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda plt, figure, file: figures.append(figure))
    rows = report.usual(synthetic.rows((2,)))
    rows += [{**row, "hidden": 8192} for row in rows if row["hidden"] == 7168 and row["tokens"] < 1024]  # cut short
    plots.latency(rows, "title", tmp_path / "a.png")
    (figure,) = figures
    figure.canvas.draw()
    upper_left, upper_right, lower_left, empty = figure.axes
    assert not empty.axison
    assert [axis.get_xlabel() for axis in (upper_left, upper_right, lower_left)] == ["", "tokens", "tokens"]
    for axis in (upper_right, lower_left):
        told = [tick.label1.get_text() for tick in axis.xaxis.get_major_ticks() if tick.label1.get_visible()]
        assert told == ["1", "4", "16", "64", "256", "1024"]


def test_the_legend_covers_nothing_and_numbers_are_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (the dev extra)")
    figures: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda plt, figure, file: figures.append(figure))
    plots.latency(report.usual(synthetic.rows((2, 8))), "title", tmp_path / "a.png")
    (figure,) = figures
    figure.canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.y0 >= 0
    assert not [axis for axis in figure.axes if axis.get_tightbbox().overlaps(box)]
    for axis in figure.axes:
        told = [label.get_text() for label in (*axis.get_xticklabels(), *axis.get_yticklabels())]
        assert len(told) > 6
        assert all(text.isdigit() for text in told)
    axes = figure.axes[-1]
    axes.set_xscale("log")  # control: matplotlib's own marks are powers
    assert not all(label.get_text().isdigit() for label in axes.get_xticklabels())
    legend.set_loc("center")  # control: a legend on a picture
    figure.canvas.draw()
    assert [axis for axis in figure.axes if axis.get_tightbbox().overlaps(legend.get_window_extent())]


def test_without_matplotlib_the_page_keeps_the_pictures_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    results, page, images = tmp_path / "results", tmp_path / "page.md", tmp_path / "images"
    synthetic.write(results / "h200x8.json", "8 x NVIDIA H200", synthetic.rows((8,)))
    page.write_text(f"{report.BEGIN}\n{report.END}\n")
    images.mkdir()
    (images / "bench_speedup_h200x8.png").touch()
    assert report.main(["--results", str(results), "--images", str(images), "--page", str(page)]) == 0
    assert "](images/bench_speedup_h200x8.png)" in page.read_text()
    assert "bench_latency" not in page.read_text()  # there is none
    assert capsys.readouterr().out.count("not drawn anew") == 2


def test_without_a_run_there_is_a_word_and_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert report.main(["--results", str(tmp_path)]) == 0
    assert "no recorded run" in capsys.readouterr().out
