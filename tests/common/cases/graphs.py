"""Captured and eager calls in any order: only the order in which they run counts."""

from __future__ import annotations

import random
from typing import Any

from common.cases.calls import Prepared, wanted
from common.cases.traffic import palette, same_on_device


def check_graphs(rank: Any, runs: int, workspaces: list[dict[str, Any]], seed: int = 0, **sizes: Any) -> int:
    """Some calls captured alone, some in a row as one graph, some graphs never replayed; then `runs` random picks of
    graphs and eager calls, back to back; every output is compared, on the device. Returns how many calls were made.
    """
    handles = [rank.workspace(**options).handle for options in workspaces]
    prepared = [Prepared(rank, call) for call in palette(20, seed, **sizes)]
    answers = [[w.to(rank.device) for w in wanted(each.call, rank.world_size)] for each in prepared]
    draw = random.Random(seed)
    rows = [[n] for n in range(8)] + [[8, 9, 10, 11, 12], [13, 14, 13, 15]]
    graphs = []
    for row in rows:
        chosen = [(prepared[n], draw.choice(handles)) for n in row]
        for _ in range(2):  # the first one is thrown away, as servers do after profiling
            graph = rank.capture(lambda chosen=chosen: [each.launch(handle) for each, handle in chosen])
        graphs.append((graph, row))
    for want in answers:  # loads the kernels of the comparison, while nobody waits
        same_on_device(want[0].clone(), want[0])
    rank.barrier()
    good, made = [], 0
    for _ in range(runs):
        if draw.random() < 0.6:
            graph, row = draw.choice(graphs)
            graph.replay()
        else:
            row = [draw.randrange(16, len(prepared))]
            prepared[row[0]].launch(draw.choice(handles))
        made += len(row)
        for n in set(row):
            good += [same_on_device(g, w) for g, w in zip(prepared[n].outputs, answers[n], strict=True)]
        if len(good) > 400:
            assert all(flag.item() for flag in good), f"a wrong bit before run {made}"
            good.clear()
    assert all(flag.item() for flag in good)
    rank.barrier()
    return made
