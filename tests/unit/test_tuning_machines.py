"""The file of machines: what it says today, and that one that makes no sense is refused by name and place."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.edits import edited
from mnnvl_ar import MnnvlArError
from mnnvl_ar.tuning import Link, link_for, link_of, machines
from mnnvl_ar.tuning.machines import Machine

H200 = Machine(
    launch_us=0.40,
    hop_us=0.61,
    stage_us=0.30,
    read_l2_us=0.14,
    read_dram_us=0.33,
    reduction_us=0.10,
    write_us=0.14,
    egress_bytes_per_us=450e3,
    ingress_bytes_per_us=450e3,
    crossover_bytes_per_us=450e3,
    link=Link(
        hop_clocks=900,
        queued_hop_clocks=1800,
        burst_bytes_per_clock=195,
        paced_bytes_per_clock=183,
        paced_from_bytes=200 << 10,
    ),
)
BLACKWELL = replace(
    H200,
    egress_bytes_per_us=900e3,
    ingress_bytes_per_us=900e3,
    crossover_bytes_per_us=690e3,
    link=replace(H200.link, burst_bytes_per_clock=390, paced_bytes_per_clock=340),
)


def test_the_figures_of_today() -> None:
    blackwell = dict.fromkeys(("b200", "b300", "gb200", "gb300"), BLACKWELL)
    assert machines.shipped() == {"h200": H200, **blackwell}


@pytest.mark.parametrize("name", ["host", "", "NVIDIA H100 80GB HBM3", "NVIDIA H200 NVL", "NVIDIA RTX PRO 6000"])
def test_an_unknown_machine_counts_as_h200(name: str) -> None:
    assert machines.known(name) is None
    assert machines.machine_of(name) == H200
    assert link_of(name) == H200.link


def test_a_device_has_the_link_of_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert link_for(torch.device("cpu")) == H200.link
    devices = [("NVIDIA H200", 9), ("NVIDIA GB200", 10), ("NVIDIA H20", 9), ("NVIDIA B300 SXM6 AC", 10)]
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: devices[device.index][0])
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (devices[device.index][1], 0))
    links = [link_for(torch.device("cuda", index)) for index in range(4)]
    assert links == [H200.link, BLACKWELL.link, H200.link, BLACKWELL.link], "a name that is not known: by generation"


def test_a_links_columns_have_the_names_of_the_ops_arguments() -> None:
    assert link_of("NVIDIA B200").columns() == {
        "link_hop_clocks": 900,
        "link_queued_hop_clocks": 1800,
        "link_burst_bytes_per_clock": 390,
        "link_paced_bytes_per_clock": 340,
        "link_paced_from_bytes": 204800,
    }


def test_a_figure_that_is_not_a_classs_own_is_that_of_the_class_it_names(tmp_path: Path) -> None:
    content = json.loads(machines.FILE.read_text())
    content["h200"]["hop_us"]["is"] = 7
    content["b200"]["write_us"] = {"is": 8, "source": "here"}
    found = read(tmp_path, content)
    assert {name: (machine.hop_us, machine.write_us) for name, machine in found.items()} == {
        "h200": (7.0, 0.14), "b200": (7.0, 8.0), "b300": (7.0, 8.0), "gb200": (7.0, 8.0), "gb300": (7.0, 8.0)
    }  # fmt: skip


def read(tmp_path: Path, content: object) -> dict[str, Machine]:
    file = tmp_path / "machines.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return machines.read(file)


FIGURE = {"is": 1, "source": "here"}


@pytest.mark.parametrize(
    ("path", "value", "wanted"),
    [
        ((), "{", "cannot be read: Expecting"),
        ((), [], r"content: got \[\], wanted an object"),
        ((), {}, r"content: got \[\], wanted h200 among the classes"),
        (("H100",), {}, "content: got 'H100', wanted a class of machine, such as h200"),
        (("",), {}, "content: got '', wanted a class of machine"),
        (("b200",), 7, "b200: got 7, wanted an object"),
        (("h200", "hop_us"), None, "h200 keys: got .*, wanted .*hop_us"),
        (("h200", "link_hop_clocks"), None, "h200 keys: got .*, wanted .*link_hop_clocks"),
        (("b200", "hop"), FIGURE, "b200 keys: got .*'hop'.*, wanted otherwise, .*perhaps hop_us"),
        (("h200", "hop_us"), 0.61, "h200, hop_us: got 0.61, wanted an object"),
        (("h200", "hop_us", "source"), None, r"h200, hop_us keys: got \['is'\], wanted is, source"),
        (("h200", "hop_us", "source"), " ", "h200, hop_us, source: got ' ', wanted where it is from"),
        (("h200", "hop_us", "source"), 1, "h200, hop_us, source: got 1, wanted where it is from"),
        (("h200", "hop_us", "is"), 0, "h200, hop_us: got 0, wanted a number above 0"),
        (("h200", "hop_us", "is"), float("nan"), "h200, hop_us: got nan, wanted a number above 0"),
        (("h200", "hop_us", "is"), float("inf"), "h200, hop_us: got inf, wanted a number above 0"),
        (("h200", "hop_us", "is"), True, "h200, hop_us: got True, wanted a number above 0"),
        (("h200", "hop_us", "is"), "0.61", "h200, hop_us: got '0.61', wanted a number above 0"),
        (("b200", "link_paced_bytes_per_clock", "is"), 0, "b200, link_paced_bytes_per_clock: got 0, wanted .* from 1"),
        (
            ("b200", "link_paced_bytes_per_clock", "is"),
            1.5,
            "b200, link_paced_bytes_per_clock: got 1.5, wanted a whole",
        ),
        (("h200", "link_hop_clocks", "is"), 2**32, "h200, link_hop_clocks: got 4294967296, wanted .* to 4294967295"),
        (("b200", "otherwise", "is"), "b300", "b200, otherwise: got 'b300', wanted a class above it in the file"),
        (("b200", "otherwise", "is"), "b200", "b200, otherwise: got 'b200', wanted a class above it in the file"),
        (("b200", "otherwise", "is"), [], r"b200, otherwise: got \[\], wanted a class above it in the file"),
    ],
)
def test_one_that_makes_no_sense_is_refused(path: tuple[Any, ...], value: object, wanted: str, tmp_path: Path) -> None:
    content = edited(json.loads(machines.FILE.read_text()), path, value)
    with pytest.raises(MnnvlArError, match=rf"file of machines machines.json: {wanted}"):
        read(tmp_path, content)
