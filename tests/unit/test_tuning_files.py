"""Strategy tables on disk: those that ship are read, and one that makes no sense is refused by name and place."""

import json
from pathlib import Path
from typing import Any

import pytest
from setuptools import Distribution
from setuptools.command.build_py import build_py
from setuptools.config.pyprojecttoml import read_configuration

from common.edits import edited
from common.ranks import ROOT
from mnnvl_ar import MnnvlArError, Pdl, Strategy, tuning
from mnnvl_ar.tuning import Entry, LaunchShape, Table, cost_model, files, machines

ENTRY = {
    "row_bytes": 1024, "max_tokens": 4, "strategy": "one_shot", "cluster": 0, "max_ctas": 0, "batch": 0, "lag": 0
}  # fmt: skip
LAUNCH = {"cluster": 8, "max_ctas": 7, "batch": 6, "lag": 5}
GOOD: dict[str, Any] = {
    "machine": "NVIDIA H200",
    "tp": {
        "2": {"one_shot_bytes": 7},
        "8": {
            "entries": [ENTRY, {**ENTRY, **LAUNCH, "max_tokens": 9, "strategy": "two_shot", "pdl": "early", "us": 3.0}]
        },
    },
}


def read(tmp_path: Path, content: object) -> dict[int, Table]:
    file = tmp_path / "h200.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return files.read(file)


def test_a_good_one_is_read(tmp_path: Path) -> None:
    tables = read(tmp_path, GOOD)
    assert tables[2] == Table(7, source="h200.json")
    launch = LaunchShape(cluster=8, max_ctas=7, batch=6, lag=5)
    entries = (Entry(1024, 4, Strategy.ONE_SHOT), Entry(1024, 9, Strategy.TWO_SHOT, launch, Pdl.EARLY))
    assert tables[8] == Table(entries=entries, source="h200.json")


@pytest.mark.parametrize(
    ("path", "value", "wanted"),
    [
        ((), "{", "cannot be read: Expecting"),
        ((), [], r"content: got \[\], wanted an object"),
        (("machine",), None, "keys: got .*, wanted machine, tp"),
        (("tp",), [], r"tp: got \[\], wanted tables by world size"),
        (("tp", "0"), {"one_shot_bytes": 7}, "tp: got '0', wanted a world size"),
        (("tp", "two"), {"one_shot_bytes": 7}, "tp: got 'two', wanted a world size"),
        (("tp", "2"), 7, "tp 2: got 7, wanted an object"),
        (("tp", "2", "one_shot_bytes"), -1, "tp 2, one_shot_bytes: got -1, wanted a whole number from 0"),
        (("tp", "2", "entries"), [ENTRY], "tp 2 keys: got .*, wanted one_shot_bytes"),
        (("tp", "8", "entries"), [], r"tp 8, entries: got \[\], wanted a list that is not empty"),
        (("tp", "8", "entries", 1), 7, "tp 8, entry 1: got 7, wanted an object"),
        (("tp", "8", "entries", 1, "lag"), None, "tp 8, entry 1 keys: got .*, wanted .*lag"),
        (("tp", "8", "entries", 1, "max_token"), 1, "tp 8, entry 1 keys: got .*max_token'"),
        (("tp", "8", "entries", 1, "strategy"), "auto", "tp 8, entry 1, strategy: got 'auto', wanted one_shot or two"),
        (("tp", "8", "entries", 1, "strategy"), [], r"tp 8, entry 1, strategy: got \[\], wanted one_shot or two"),
        (("tp", "8", "entries", 0, "max_tokens"), 0, "tp 8, entry 0, max_tokens: got 0, wanted .* from 1"),
        (("tp", "8", "entries", 0, "row_bytes"), 32784, "tp 8, entry 0, row_bytes: got 32784, wanted .* to 32768"),
        (("tp", "8", "entries", 0, "cluster"), 16, "tp 8, entry 0, cluster: got 16, wanted .* from 0 to 8"),
        (("tp", "8", "entries", 0, "batch"), 2.0, "tp 8, entry 0, batch: got 2.0, wanted a whole number"),
        (("tp", "8", "entries", 0, "lag"), True, "tp 8, entry 0, lag: got True, wanted a whole number"),
        (("tp", "8", "entries", 0, "lag"), 2**31, "tp 8, entry 0, lag: got 2147483648"),
        (("tp", "8", "entries", 0, "pdl"), "auto", "tp 8, entry 0, pdl: got 'auto', wanted off or late or early"),
        (("tp", "8", "entries", 1, "max_tokens"), 4, r"tp 8, entry 1: got \(1024, 4\), wanted .* beyond \(1024, 4\)"),
        (("tp", "8", "entries", 1, "row_bytes"), 512, r"tp 8, entry 1: got \(512, 9\), wanted .* beyond \(1024, 4\)"),
    ],
)
def test_one_that_makes_no_sense_is_refused(path: tuple[Any, ...], value: object, wanted: str, tmp_path: Path) -> None:
    content = edited(GOOD, path, value)
    with pytest.raises(MnnvlArError, match=rf"strategy table h200.json: {wanted}"):
        read(tmp_path, content)


def test_all_that_ship_are_read() -> None:
    found = {file.stem: files.read(file) for file in files.FOLDER.glob("*.json") if file != machines.FILE}
    assert found
    assert all(tables for tables in found.values())
    for name, tables in found.items():
        machine = json.loads((files.FOLDER / f"{name}.json").read_text())["machine"]
        assert machines.machine_class(machine) == name
        assert all(tuning.table_of(machine, size) == table for size, table in tables.items())


def test_the_measured_crossovers_of_h200() -> None:
    """Measured ones hold until entries do; the model is near them where both are, and takes over elsewhere."""
    h200 = machines.machine_of("NVIDIA H200")
    for size, measured in {4: 230_000, 8: 90_000}.items():
        table = tuning.table_of("NVIDIA H200", size)
        assert table.entries or table == Table(measured, source="h200.json")
        assert cost_model.one_shot_bytes(h200, size) == pytest.approx(measured, rel=0.25)
    of_two = tuning.table_of("NVIDIA H200", 2)
    assert {entry.strategy for entry in of_two.entries} == {Strategy.ONE_SHOT}, "as the model has it at any size"
    assert cost_model.one_shot_bytes(h200, 2) == cost_model.ANY_BYTES
    assert tuning.table_of("NVIDIA H200", 3).source == "cost model"
    elsewhere = tuning.table_of("NVIDIA H100 80GB HBM3", 8)
    assert elsewhere == Table(cost_model.one_shot_bytes(h200, 8), source="cost model")


@pytest.mark.parametrize(
    ("machine", "name"), [("NVIDIA H200", "h200"), ("NVIDIA GB200", "gb200"), ("NVIDIA H200 NVL", "h200nvl")]
)
def test_machine_classes(machine: str, name: str) -> None:
    assert machines.machine_class(machine) == name


def test_the_tables_are_package_data() -> None:
    """As setuptools finds them; without the pattern in pyproject.toml a wheel would go by the cost model alone."""

    def shipped(patterns: list[str]) -> set[str]:
        command = build_py(Distribution({"packages": ["mnnvl_ar"], "package_data": {"mnnvl_ar": patterns}}))
        command.finalize_options()
        command.manifest_files = {}
        return {Path(name).name for name in command.find_data_files("mnnvl_ar", str(ROOT / "mnnvl_ar"))}

    project = read_configuration(ROOT / "pyproject.toml", expand=False)
    tables = {file.name for file in files.FOLDER.glob("*.json") if file != machines.FILE}
    assert tables <= shipped(project["tool"]["setuptools"]["package-data"]["mnnvl_ar"])
    assert not tables & shipped(["py.typed"])
