"""What a call takes by a strategy table: C++ against a plain look-up in Python, and sizes against choices."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from mnnvl_ar import Pdl, Strategy
from mnnvl_ar._library import ops
from mnnvl_ar.tuning import Entry, LaunchShape, Table
from mnnvl_ar.workspace import create

AUTO, ONE, TWO = Strategy.AUTO, Strategy.ONE_SHOT, Strategy.TWO_SHOT
ROWS = (16, 512, 1024, 1040, 14336, 32768)
NOTHING = (0, 0, 0, 0, 0)

launch_shapes = st.builds(LaunchShape, st.integers(0, 8), st.integers(0, 200), st.integers(0, 8), st.integers(0, 4))
row_sizes = st.sampled_from(ROWS) | st.integers(1, 2048).map(lambda vectors: 16 * vectors)
tokens = st.integers(0, 70) | st.integers(0, 5000)


@st.composite
def tables(draw: Any) -> Table:
    sizes = draw(st.sets(st.tuples(st.sampled_from(ROWS), st.integers(1, 64)), max_size=12))
    strategies = st.sampled_from([ONE, TWO])
    entries = [
        Entry(*size, draw(strategies), draw(launch_shapes), draw(st.sampled_from(list(Pdl)[1:])))
        for size in sorted(sizes)
    ]
    return Table(draw(st.integers(0, 1 << 21)) if not entries else 0, tuple(entries))


@dataclass(frozen=True)
class Oracle:
    """The rules in plain Python; the negative controls get one of them wrong."""

    smaller_of_ties: bool = True
    inclusive: bool = True
    last_beyond: bool = True
    shape_of_other_strategy: bool = False

    def entry(self, table: Table, tokens: int, row_bytes: int) -> Entry | None:
        sign = 1 if self.smaller_of_ties else -1
        rows = {e.row_bytes for e in table.entries}
        row = min(rows, key=lambda r: (abs(r - row_bytes), sign * r), default=None)
        entries = [e for e in table.entries if e.row_bytes == row]
        for entry in entries:
            if tokens < entry.max_tokens + self.inclusive:
                return entry
        return entries[-1 if self.last_beyond else 0] if entries else None

    def choice(self, table: Table, tokens: int, row_bytes: int, strategy: Strategy = AUTO) -> list[int]:
        """Where all fits."""
        entry = self.entry(table, tokens, row_bytes)
        if strategy != AUTO:
            taken = strategy
        elif entry is not None:
            taken = entry.strategy
        else:
            taken = ONE if tokens * row_bytes <= table.one_shot_bytes else TWO
        if entry is None or (entry.strategy != taken and not self.shape_of_other_strategy):
            return [taken, *NOTHING]
        return [taken, *astuple(entry.launch), entry.pdl]


def workspace(table: Table, ranks: int = 4, slot_bytes: int = (1 << 32) - 16, **settings: Any) -> int:
    """A handle that is only asked, never called: it has no memory."""
    return create((0,) * ranks, 0, torch.device("cpu"), slot_bytes, table, **settings)


def choice(handle: int, *call: int) -> list[int]:
    """Strategy, cluster, max_ctas, batch, lag, pdl."""
    return list(ops._workspace_choice(handle, *call))[:6]


def pieces(handle: int, *call: int) -> tuple[int, int]:
    """How many, and the rows of each but the last."""
    count, rows = ops._workspace_choice(handle, *call)[6:]
    return count, rows


@given(tables(), st.lists(st.tuples(tokens, row_sizes, st.sampled_from([AUTO, ONE, TWO])), min_size=1, max_size=30))
def test_the_library_chooses_as_the_oracle(table: Table, calls: list[tuple[int, int, Strategy]]) -> None:
    handle = workspace(table)
    for call in calls:
        assert choice(handle, *call) == Oracle().choice(table, *call)


TELLING = Table(
    entries=(
        Entry(512, 4, ONE, LaunchShape(cluster=2)),
        Entry(512, 8, TWO, LaunchShape(cluster=4)),
        Entry(1024, 8, TWO, LaunchShape(cluster=8, batch=4)),
    )
)
CALLS = [(tokens, row, s) for tokens in (0, 4, 5, 8, 9) for row in (16, 512, 752, 768, 784, 2048) for s in (AUTO, ONE)]


@pytest.mark.parametrize("rule", ["", *Oracle.__dataclass_fields__])
def test_an_oracle_with_one_rule_wrong_is_caught(rule: str) -> None:
    wrong = Oracle(**{rule: not getattr(Oracle(), rule)}) if rule else Oracle()
    handle = workspace(TELLING)
    differ = [call for call in CALLS if choice(handle, *call) != wrong.choice(TELLING, *call)]
    assert bool(differ) == bool(rule)


def test_a_forced_strategy_wins_and_keeps_the_launch_shape_that_was_measured_for_it() -> None:
    for handle, forced in ((workspace(TELLING), TWO), (workspace(TELLING, strategy=TWO), AUTO)):
        assert choice(handle, 4, 512, forced) == [TWO, *NOTHING]
        assert choice(handle, 8, 512, forced) == [TWO, 4, 0, 0, 0, 0]
    assert choice(workspace(TELLING, strategy=TWO), 4, 512, ONE) == [ONE, 2, 0, 0, 0, 0]
    assert choice(workspace(TELLING), 4, 512) == [ONE, 2, 0, 0, 0, 0]  # left to itself, it differs


@given(launch_shapes, launch_shapes)
def test_what_the_workspace_was_told_wins(told: LaunchShape, measured: LaunchShape) -> None:
    handle = workspace(Table(entries=(Entry(512, 8, TWO, measured),)), launch=told)
    both = zip(astuple(told), astuple(measured), strict=True)
    assert choice(handle, 8, 512)[:5] == [TWO, *(t or m for t, m in both)]


# ---- sizes --------------------------------------------------------------------------------------------------------


def cut_too_small(table: Table, ranks: int, most: int, row_bytes: int, slot_bytes: int) -> list[str]:
    """What a workspace for `most` rows cannot run at once though it should, with slots of `slot_bytes`."""
    handle = workspace(table, ranks, slot_bytes)
    tried = {1, most // 2, most - 1, most, table.one_shot_bytes // row_bytes, *(e.max_tokens for e in table.entries)}
    tried |= {t + 1 for t in tried}
    found = []
    for t in sorted(t for t in tried if 0 < t <= most):
        try:
            if choice(handle, t, row_bytes) != Oracle().choice(table, t, row_bytes):
                found.append(f"{t} tokens do not go as the table has it")
            if pieces(handle, t, row_bytes) != (1, t):
                found.append(f"{t} tokens go in pieces")
            for strategy in (ONE, TWO):
                ops._workspace_choice(handle, t, row_bytes, strategy)
        except RuntimeError as error:
            found.append(f"{t} tokens: {error}")
    return found


@given(tables(), st.integers(1, 72), st.integers(1, 300), st.sampled_from(ROWS[:-1]))
@example(Table(entries=(Entry(512, 4, ONE),)), 8, 300, 512)
@example(Table(entries=(Entry(512, 4, TWO), Entry(512, 64, ONE))), 8, 4, 512)
@example(Table(entries=(Entry(512, 64, ONE),)), 8, 4, 512)
@example(Table(512 * 16), 8, 64, 512)
@example(Table(1 << 30), 1, 1, 16)
def test_a_slot_is_as_large_as_its_calls_need(table: Table, ranks: int, most: int, row_bytes: int) -> None:
    """In what is sized every call goes at once, as the table has it; with one vector less, something does not."""
    exact = table.slot_bytes(ranks, most, row_bytes, own_too=False)
    assert cut_too_small(table, ranks, most, row_bytes, exact) == []
    assert cut_too_small(table, ranks, most, row_bytes, exact - 16) != []


def test_there_is_no_second_stage_where_auto_never_takes_it() -> None:
    assert Table(1 << 30).slot_bytes(2, 300, 512, own_too=False) == 300 * 512
    assert Table(1 << 30).slot_bytes(2, 300, 512, own_too=True) == 2 * 300 * 512
    assert Table(1 << 30).slot_bytes(2, 300, 512, TWO) == 2 * 300 * 512
    assert Table(entries=(Entry(512, 4, ONE),)).slot_bytes(2, 300, 512, own_too=False) == 300 * 512
    assert Table(512 * 299).slot_bytes(8, 300, 512, own_too=False) == 7 * 299 * 512  # more than two-shot's 2 * 300


# ---- pieces -------------------------------------------------------------------------------------------------------


def vectors_a_row(strategy: Strategy, ranks: int, vectors: int) -> int:
    return (ranks - 1) * vectors if strategy == ONE else ranks * -(-vectors // ranks) + vectors


@given(
    st.sampled_from([ONE, TWO]), st.integers(2, 72), st.integers(1, 2048), st.integers(1, 10**6), st.integers(1, 99999)
)
def test_pieces_are_as_few_and_as_even_as_can_be(
    strategy: Strategy, ranks: int, vectors: int, slot_vectors: int, tokens: int
) -> None:
    handle = workspace(Table(), ranks, slot_vectors * 16)
    most = slot_vectors // vectors_a_row(strategy, ranks, vectors)
    assert ops._workspace_fits(
        workspace(Table(), ranks, slot_vectors * 16, strategy=strategy), tokens, vectors * 16
    ) == (most > 0)
    if most == 0:
        with pytest.raises(RuntimeError, match=rf"x: a row of {vectors * 16} bytes needs a slot of .*workspace has"):
            pieces(handle, tokens, vectors * 16, strategy)
        return
    count, rows = pieces(handle, tokens, vectors * 16, strategy)
    assert count == -(-tokens // most)
    assert rows == -(-tokens // count) <= most
    assert 0 < tokens - (count - 1) * rows <= rows


def test_a_piece_has_the_launch_shape_of_its_own_size() -> None:
    """As long as that was measured for the call's strategy."""
    measured = (
        Entry(512, 2, ONE, LaunchShape(cluster=1)),
        Entry(512, 8, TWO, LaunchShape(cluster=2)),
        Entry(512, 64, TWO, LaunchShape(cluster=4)),
    )
    rows = {32: [TWO, 4, 0, 0, 0], 8: [TWO, 2, 0, 0, 0], 2: [TWO, 4, 0, 0, 0]}
    for most, wanted in rows.items():
        handle = workspace(Table(entries=measured), 4, most * 2 * 512)
        assert pieces(handle, 64, 512) == (64 // most, most)
        assert choice(handle, 64, 512)[:5] == wanted


def test_offsets_into_a_piece_fit_32_bits() -> None:
    """A rank alone is sent nothing, so its slot sets no bound."""
    handle = workspace(Table(1 << 40), 1, 32768)
    count, rows = pieces(handle, 300_000, 32768)
    assert count == 3
    assert rows * 32768 < 1 << 32


def test_a_bound_is_kept_and_one_that_is_too_small_is_named() -> None:
    table = Table(1 << 30)
    for bound in (64 << 20, (64 << 20) + 1, 16384 + 3 * 2 * 512):
        slot = table.slot_bytes(2, 99999, 512, max_bytes=bound)
        assert bound - 48 < 16384 + 3 * slot <= bound
        assert slot % 16 == 0
    assert table.slot_bytes(2, 3, 512, max_bytes=64 << 20) == table.slot_bytes(2, 3, 512)
    with pytest.raises(RuntimeError, match=r"max_bytes: is 19455, wanted at least 19456 for a row of 512 bytes of 2"):
        table.slot_bytes(2, 99999, 512, max_bytes=16384 + 3 * 2 * 512 - 1)


COLUMNS = ("row_bytes", "max_tokens", "strategies", "clusters", "max_ctas", "batches", "lags", "pdls")


def columns(one_shot_bytes: int = 0, *entries: tuple[int, ...]) -> dict[str, Any]:
    """A table as the ops take it, of entries that no `Table` would hold; each may end early."""
    full = [(*entry, *(0,) * (len(COLUMNS) - len(entry))) for entry in entries]
    lists = zip(*full, strict=True) if full else [()] * len(COLUMNS)
    named = {f"table_{name}": list(values) for name, values in zip(COLUMNS, lists, strict=True)}
    return {"table_one_shot_bytes": one_shot_bytes, **named}


@pytest.mark.parametrize(
    ("table", "wanted"),
    [
        (columns() | {"table_lags": [0]}, "columns of 0 and of 1 entries"),
        (columns(0, (512, 4)) | {"table_clusters": []}, "columns of 1 and of 0 entries"),
        (columns(-1), "holds -1, wanted 0 or more"),
        (columns(0, (512, -1)), "holds -1, wanted 0 or more"),
        (columns(0, (512, 1 << 31)), "holds 2147483648, wanted 32 bits"),
        (columns(0, (512, 4, 2)), "strategy 2, wanted 0"),
        (columns(0, (512, 4, 0, 0, 0, 0, 0, 3)), "pdl 3, wanted 0"),
        (columns(0, (512, 4), (512, 4)), "rows of 512 bytes, 4 tokens: wanted entries in rising"),
        (columns(0, (512, 4), (496, 5)), "rows of 496 bytes, 5 tokens: wanted entries in rising"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(table: dict[str, Any], wanted: str) -> None:
    with pytest.raises(RuntimeError, match=wanted):
        ops._workspace_slot_bytes(2, 1, 512, AUTO, own_too=True, max_bytes=0, **table)
    assert (
        ops._workspace_slot_bytes(2, 1, 512, AUTO, own_too=True, max_bytes=0, **columns(0, (512, 4), (512, 5, 1))) > 0
    )


def test_the_choice_of_impossible_calls_is_refused() -> None:
    handle = workspace(Table())
    for call, wanted in {(1, 8): "rows of 8 bytes", (-1, 16): "tokens: is -1"}.items():
        with pytest.raises(RuntimeError, match=wanted):
            ops._workspace_choice(handle, *call)
