"""A table as the ops take it, and its digest."""

from dataclasses import astuple, replace

from mnnvl_ar import Pdl, Strategy
from mnnvl_ar.tuning import Entry, LaunchShape, Table, link_of

ENTRIES = (
    Entry(1024, 4, Strategy.ONE_SHOT, LaunchShape(cluster=2)),
    Entry(1024, 9, Strategy.TWO_SHOT, LaunchShape(cluster=8, max_ctas=7, batch=6, lag=5), Pdl.EARLY),
)


def test_columns_have_the_names_of_the_ops_arguments() -> None:
    assert Table(entries=ENTRIES, source="here").columns() == {
        "table_one_shot_bytes": 0,
        "table_row_bytes": [1024, 1024],
        "table_max_tokens": [4, 9],
        "table_strategies": [0, 1],
        "table_clusters": [2, 8],
        "table_max_ctas": [0, 7],
        "table_batches": [0, 6],
        "table_lags": [0, 5],
        "table_pdls": [0, 2],
    }
    crossover = Table(230_000).columns()
    assert crossover.pop("table_one_shot_bytes") == 230_000
    assert list(crossover.values()) == [[]] * 8


def test_columns_of_a_table_and_a_link_do_not_clash() -> None:
    assert not Table().columns().keys() & link_of("host").columns().keys()


def test_the_digest_is_of_what_decides() -> None:
    """Of every figure, and of nothing else: where a table is from may differ between ranks."""
    table = Table(entries=ENTRIES)
    assert table.digest() == replace(table, source="elsewhere").digest()
    launch = ENTRIES[1].launch
    changed = [
        Table(),
        Table(1),
        Table(entries=ENTRIES[:1]),
        *(
            Table(entries=(ENTRIES[0], replace(ENTRIES[1], **{name: figure})))
            for name, figure in (
                ("row_bytes", 2048),
                ("max_tokens", 10),
                ("strategy", Strategy.ONE_SHOT),
                ("pdl", Pdl.LATE),
            )
        ),
        *(
            Table(entries=(ENTRIES[0], replace(ENTRIES[1], launch=LaunchShape(*figures))))
            for figures in ([f + (i == place) for i, f in enumerate(astuple(launch))] for place in range(4))
        ),
    ]
    assert len({each.digest() for each in (table, *changed)}) == len(changed) + 1
