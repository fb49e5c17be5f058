"""Every two ranks by themselves, on host ranks: what is measured, a pair that fails, one that is slow."""

import itertools
import re
import time
from typing import Any

import pytest
import torch

import mnnvl_ar
from common.machines import between, gpu, here, report
from mnnvl_ar.doctor import matrix, pairs, selftest, show
from mnnvl_ar.ranks import Rank, RankPool

PATIENCE = 3.0


@pytest.mark.parametrize("size", range(1, 10))
def test_every_two_meet_once(size: int) -> None:
    table = pairs.rounds(size)
    assert sorted(itertools.chain(*table)) == list(itertools.combinations(range(size), 2))
    for round_ in table:
        met = list(itertools.chain(*round_))
        assert len(met) == len(set(met)), "a rank is in two pairs at once"
    assert len(table) == (size - 1 if size % 2 == 0 else size)


def measured(
    rank: Rank, broken: tuple[int, int] | None = None, fault: str = "", seconds: float = 120.0
) -> list[dict[str, Any]]:
    """As the self-test does it. fault, of the pair `broken`: "bits", whose sums are wrong; "absent", the second rank
    does not come; "silent", it makes a workspace and no call; "gone", rank 2 comes to none."""
    torch.set_num_threads(1)
    real = pairs._tried

    def tried(store: Any, pair: tuple[int, int], number: int, *more: Any) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as patch:
            if pair == broken and fault == "bits":
                patch.setattr(mnnvl_ar.reference, "same_bits", lambda *_: False)
            if pair == broken and number == pair[1] and fault == "absent":
                return {"error": "injected"}
            if fault == "gone" and number == 2:
                return {"error": "injected"}
            if pair == broken and number == pair[1] and fault == "silent":
                patch.setattr(pairs, "_measured", lambda _: time.sleep(PATIENCE + 1) or {})
            return real(store, pair, number, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "_tried", tried)
        return pairs.measure(rank.join(60.0), torch.device("cpu"), PATIENCE, seconds)


def ready(rank: Rank) -> None:
    """They have started, and met: what is timed then is the pairs alone."""
    rank.join(60.0)


def test_three_ranks() -> None:
    with RankPool(3) as pool:
        found = pairs.merge(pool.run(measured))
    assert [pair["ranks"] for pair in found] == [[0, 1], [0, 2], [1, 2]]
    for pair in found:
        assert pair["error"] == ""
        assert pair["gpus"] == ["", ""]
        assert pair["latency_us"] > 0
        assert pair["bandwidth_gb_s"] > 0
    text = matrix.pairs(found, 3)
    assert text[1].split() == ["rank", "0", "1", "2"]
    assert text[2].split()[1:] == ["-", f"{found[0]['bandwidth_gb_s']:.1f}", f"{found[1]['bandwidth_gb_s']:.1f}"]
    assert text[4].split()[1:] == [f"{found[1]['latency_us']:.1f}", f"{found[2]['latency_us']:.1f}", "-"]
    assert "an all_reduce of 256 KiB" in text[5]
    assert "one of 16 bytes takes (medians of calls alone)" in text[6]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("bits", "the sum differs from the reference"),
        ("absent", ""),
        ("silent", r"waited [3-9]\.\d\d s for rank 1"),  # of a deadline of 3 s; a busy machine looks up later
    ],
)
def test_a_broken_pair_costs_itself_alone(fault: str, says: str) -> None:
    with RankPool(3) as pool:
        found = pairs.merge(pool.run(measured, (0, 2), fault))
    by_ranks = {tuple(pair["ranks"]): pair for pair in found}
    assert re.search(says, by_ranks.pop((0, 2))["error"])
    assert [pair["error"] for pair in by_ranks.values()] == ["", ""]
    assert "FAILED" in "\n".join(matrix.pairs(found, 3))


@pytest.mark.parametrize("seconds", [6.0, 0.0])
def test_it_is_over_in_time_whoever_does_not_come(seconds: float) -> None:
    """Rank 2 comes to neither of its pairs: without an end, rank 0 and 1 would wait 9 and 18 s for it."""
    with RankPool(3) as pool:
        pool.run(ready)
        began = time.monotonic()
        by_rank = pool.run(measured, None, "gone", seconds)
        assert time.monotonic() - began < seconds + 15
    found = {tuple(pair["ranks"]): pair["error"] for pair in pairs.merge(by_rank)}
    assert found.keys() == {(0, 1), (0, 2), (1, 2)}
    assert found[0, 2]
    assert found[1, 2]
    if not seconds:
        assert set(found.values()) == {"no time was left for it"}


def pair(a: int, b: int, bandwidth: float = 340.0, error: str = "") -> dict[str, Any]:
    about = {"ranks": [a, b], "gpus": [gpu(a)["uuid"], gpu(b)["uuid"]], "error": error}
    figures = {"latency_us": 2.4, "bandwidth_gb_s": bandwidth, "small_bytes": 16, "large_bytes": 16 << 20}
    return about if error else {**about, **figures}


def told(found: list[dict[str, Any]], size: int, by_turns: bool = False, **more: Any) -> tuple[list[str], str]:
    """The problems, and the report's text, of so many GPUs whose pairs were found so."""
    good = {"ran": True, "ok": True, "ranks": size, "device": "cuda", "transport_reason": "", "latency_us": 9.0}
    good |= {"bandwidth_gb_s": 300.0, "row_bytes": 16384, "message_bytes": 16 << 20, "by_turns": by_turns}
    good |= {} if by_turns else {"pairs": found}
    machine = here(*(gpu(n) for n in range(size)), **more)
    about = report({0: machine}, size, good)
    return about["problems"], show.text(about)


def test_eight_gpus_fit_a_line() -> None:
    found = [pair(a, b, 300.0 + 10 * a + b) for a, b in itertools.combinations(range(8), 2)]
    problems, text = told(found, 8)
    assert problems == []
    table = text.split("by themselves:\n")[1].split("\nvLLM")[0].split("\n")
    assert table[1].split() == ["0", "-", *(f"{300 + b}.0" for b in range(1, 8))]
    assert table[8].split() == ["7", *["2.4"] * 7, "-"]
    assert "16 MiB" in text
    assert "replays of CUDA graphs" in text
    assert max(map(len, table)) <= 120


def test_a_slow_pair_is_a_problem() -> None:
    """Beside others that are linked alike, and by less than half: pairs over PCIe are no problem beside NVLinks."""
    others = [pair(a, b) for a, b in itertools.combinations(range(4), 2) if (a, b) != (1, 3)]
    (line,) = told([*others, pair(1, 3, 100.0)], 4)[0]
    assert line.startswith("ranks 1 and 3 by themselves: 100.0 GB/s, where pairs linked alike (NV18) reach 340.0")
    assert told([*others, pair(1, 3, 200.0)], 4)[0] == []
    links = between(4)["links"]
    links[1][3] = links[3][1] = "SYS"
    assert told([*others, pair(1, 3, 20.0)], 4, links=links)[0] == []
    assert told([*others, pair(1, 3, 20.0)], 4, links=[[None] * 4] * 4)[0] == [], "how they are linked is not known"


def test_a_pair_that_failed_is_a_problem() -> None:
    problems, text = told([pair(0, 1), pair(0, 2, error="the sum differs"), pair(1, 2)], 3)
    assert problems == ["ranks 0 and 2 by themselves (ranks 0 and 1 there): the sum differs"]
    assert text.count("FAILED") == 2


def test_the_summary_has_the_pairs_of_all_ranks() -> None:
    good = {"ran": True, "ok": True}
    sides = {rank: {**pair(0, 1, 300.0 + rank), "gpu": str(rank)} for rank in (0, 1)}
    found = selftest.summary({rank: {**good, "pairs": [side]} for rank, side in sides.items()})
    (merged,) = found["pairs"]
    assert merged["bandwidth_gb_s"] == 300.0, "of the two ranks' figures the worse"
    assert merged["gpus"] == ["0", "1"]


def by_turns(rank: Rank, gpus: tuple[str, ...]) -> tuple[bool, int]:
    """What the self-test says of ranks with these GPUs, and how many calls it makes at a time."""
    torch.set_num_threads(1)
    calls = set[int]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "_uuid", lambda device: gpus[rank.rank])
        patch.setattr(selftest, "CALLS", {"cpu": 2})
        patch.setattr(selftest, "_time", lambda ws, x, seconds, count: calls.add(count) or 1.0)
        found = selftest.measure(rank.join(20.0), rank.device, 0.1, 20.0)
    assert len(calls) == 1
    return found["by_turns"], calls.pop()


@pytest.mark.parametrize(("gpus", "shared"), [(("a", "b", "a"), True), (("a", "b", "c"), False), (("", "", ""), False)])
def test_ranks_that_share_a_gpu_run_by_turns(gpus: tuple[str, ...], shared: bool) -> None:
    """Each for milliseconds: batches meant for GPUs would take longer than a doctor may."""
    with RankPool(3) as pool:
        assert pool.run(by_turns, gpus) == [(shared, 3 if shared else 2)] * 3
    assert ("by turns" in told([], 3, shared)[1]) == shared
