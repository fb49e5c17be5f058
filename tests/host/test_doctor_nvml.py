"""What the doctor has from NVML: links, what lies between two GPUs, MIG, fabric, confidential computing; simulated."""

from pathlib import Path
from typing import Any

import pytest

from common.machines import between, gpu, here, report
from common.simulated_nvml import UUIDS, SimulatedNvml, pair
from mnnvl_ar.doctor import libnvml, nvml, show


def seen(library: SimulatedNvml, count: int = 2, **more: Any) -> tuple[dict[str, Any], str]:
    """What NVML says of so many GPUs, and how it is shown."""
    found = nvml.look(UUIDS[:count], library)
    gpus = [gpu(n, **about) for n, about in enumerate(found.pop("gpus"))]
    machine = {**between(count), **found, **more}
    return {**machine, "gpus": gpus}, show.text(report({0: here(*gpus, **machine)}, size=2))


def matrix(text: str) -> list[list[str]]:
    """The cells of the P2P matrix, without its head."""
    lines = text.split("\n  P2P  ")[1].split("\n")[2:]
    return [line.split()[1:] for line in lines if line[:13].strip().isdigit()]


def test_one_gpu_has_no_matrix() -> None:
    _, text = seen(SimulatedNvml(1, switched=18), 1)
    assert "18 NVLinks up" in text
    assert "P2P" not in text
    assert "P2P  " in seen(SimulatedNvml(2, switched=18))[1]


def test_two_gpus_by_a_switch() -> None:
    found, text = seen(SimulatedNvml(2, switched=18))
    assert found["links"] == [[None, "NV18"], ["NV18", None]]
    assert matrix(text) == [["-", "NV18"], ["NV18", "-"]]
    assert "\n             NVn: n NVLinks\n" in text, "what is not in the matrix is not explained"


def test_eight_gpus_fit_a_line() -> None:
    """Of which a pair does not reach each other, another has no atomics, and one GPU has lost a link."""
    library = SimulatedNvml(8, switched={n: 17 if n == 5 else 18 for n in range(8)}, refusals={pair(2, 3): 4})
    p2p = between(8, unreached=((2, 3),))["p2p"]
    atomics = between(8, unreached=((2, 3), (0, 7)))["p2p"]
    found, text = seen(library, 8, p2p=p2p, p2p_atomics=atomics)
    rows = matrix(text)
    assert all(row[n] == "-" and len(row) == 8 for n, row in enumerate(rows))
    assert rows[0] == ["-", "NV18", "NV18", "NV18", "NV18", "NV17", "NV18", "NV18~"]
    assert rows[2] == ["NV18", "NV18", "-", "SYS!", "NV18", "NV17", "NV18", "NV18"]
    assert rows[7][0] == "NV18~"
    assert "SYS: the link between sockets; !: no peer access; ~: no P2P atomics" in text
    assert max(map(len, text.split("\n  P2P  ")[1].split("Outlook")[0].split("\n"))) <= 120
    page = (Path(__file__).parents[2] / "docs/operations.md").read_text()
    assert text[text.index("  P2P  ") : text.index("\n\nOutlook")] in page, "the page's example"
    wrong = report({0: here(*found["gpus"], **{k: found[k] for k in between(8)})}, size=8)["problems"]
    assert wrong == [
        "a: GPUs 2 and 3 cannot reach each other's memory (P2P): a registry key of the driver has switched it off; "
        "keep them apart",
        "a: GPU 5 has 17 NVLinks up, others of its kind 18; look at nvidia-smi nvlink -s",
    ]


def test_gpus_that_are_linked_in_twos() -> None:
    """By bridges: the others go over PCIe, whatever links their GPUs have."""
    library = SimulatedNvml(4, direct={pair(0, 1): 12, pair(2, 3): 12}, pcie=40)
    found, text = seen(library, 4)
    assert found["links"][0] == [None, "NV12", "NODE", "NODE"]
    assert found["links"][3] == ["NODE", "NODE", "NV12", None]
    assert "NODE: one NUMA node's host bridges" in text
    assert report({0: here(*found["gpus"], **{k: found[k] for k in between(4)})}, size=4)["problems"] == []


@pytest.mark.parametrize(("level", "name"), [(10, "PIX"), (20, "PXB"), (30, "PHB"), (40, "NODE"), (50, "SYS")])
def test_pcie(level: int, name: str) -> None:
    found, _ = seen(SimulatedNvml(2, pcie=level))
    assert found["links"][0][1] == name


def test_a_link_whose_far_end_is_not_told() -> None:
    """As in some virtual machines: that the pair is linked, NVML says."""
    without = ("nvmlDeviceGetNvLinkRemoteDeviceType", "nvmlDeviceGetNvLinkRemotePciInfo_v2")
    found, _ = seen(SimulatedNvml(2, switched=6, without=without))
    assert found["links"][0][1] == "NV6"


def test_links_that_are_not_between_the_two() -> None:
    """The control: GPUs with links to a third one, and none to each other."""
    found, _ = seen(SimulatedNvml(3, direct={pair(0, 2): 4, pair(1, 2): 4}, pcie=10), 3)
    assert found["links"][0] == [None, "PIX", "NV4"]


def test_mig() -> None:
    """A GPU in parts: they have no links, also where the driver names the part."""
    found, text = seen(SimulatedNvml(1, switched=18, divided=(0,), parts=(UUIDS[1],)))
    assert [g["mig"] for g in found["gpus"]] == [True, True]
    assert found["links"] == [[None, None], [None, None]]
    assert text.count("MIG, so no links to others") == 2
    assert "MIG" not in seen(SimulatedNvml(2, switched=18))[1]


def test_links_unknown() -> None:
    """Without NVML the driver still says who reaches whom."""
    p2p = between(3, unreached=((0, 2),))
    _, text = seen(SimulatedNvml(3, start=9), 3, p2p=p2p["p2p"], p2p_atomics=p2p["p2p_atomics"])
    assert "NVML does not start: nvmlInit_v2: error 9, it says" in text
    assert matrix(text) == [["-", "P2P", "-!"], ["P2P", "-", "P2P"], ["-!", "P2P", "-"]]
    assert "!: no peer access; P2P: peer access, by what link is unknown; -: link unknown" in text


def test_without_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libnvml, "NAME", "libnvidia-ml-that-is-not.so.1")
    found = nvml.look(UUIDS[:2])
    assert found["nvml_error"].startswith("NVML does not start: libnvidia-ml-that-is-not.so.1 cannot be loaded: ")
    assert found["gpus"] == [{"nvlinks": None, "fabric": None, "mig": None}] * 2
    assert found["links"] == [[None, None], [None, None]]
    assert nvml.look([])["nvml_error"] == "", "nothing to ask"


@pytest.mark.parametrize(
    ("settings", "state", "wanted", "shown"),
    [
        (1, None, {"on": True, "multi_gpu": "protected PCIe"}, "conf. computing: ON, multi-GPU mode: protected PCIe"),
        (0, None, {"on": False, "multi_gpu": "protected PCIe"}, "conf. computing: off\n"),
        (None, 1, {"on": True, "multi_gpu": None}, "conf. computing: ON\n"),
        (None, None, None, "conf. computing: unknown"),
    ],
)
def test_confidential_computing(settings: int | None, state: int | None, wanted: Any, shown: str) -> None:
    found, text = seen(SimulatedNvml(2, switched=4, fabric=2, settings=settings, state=state))
    assert found["confidential_computing"] == wanted
    assert shown in text
    assert found["gpus"][1]["fabric"] == {"state": "in progress", "status": 0, "cluster": "00" * 16, "clique": 7}
    assert "4 NVLinks up, fabric in progress" in text


def test_an_older_driver() -> None:
    newer = (
        "nvmlSystemGetConfComputeSettings",
        "nvmlSystemGetConfComputeState",
        "nvmlDeviceGetGpuFabricInfo",
        "nvmlDeviceGetMigMode",
        "nvmlDeviceGetP2PStatus",
    )
    found, text = seen(SimulatedNvml(2, switched=4, settings=1, state=1, fabric=3, without=newer))
    assert found["confidential_computing"] is None
    assert [(g["nvlinks"], g["fabric"], g["mig"]) for g in found["gpus"]] == [(4, None, False)] * 2
    assert found["links"][0][1] is None, "whether the two are linked was not said"
    assert "4 NVLinks up\n" in text


def test_a_gpu_that_nvml_does_not_know() -> None:
    found = nvml.look([UUIDS[0], UUIDS[5]], SimulatedNvml(1, switched=4))
    assert [g["nvlinks"] for g in found["gpus"]] == [4, None]
    assert found["links"] == [[None, None], [None, None]]


def test_a_call_that_this_nvml_has_not_is_named() -> None:
    library = libnvml.Nvml(SimulatedNvml(1, without=("nvmlDeviceGetMigMode",)))
    with pytest.raises(libnvml.NvmlError, match="nvmlDeviceGetMigMode: not in this driver's NVML"):
        library.is_divided(library.gpu_of("GPU-00000000-0000-0000-0000-000000000000"))
    with pytest.raises(libnvml.NvmlError, match="nvmlDeviceGetHandleByUUID: error 6, it says"):
        library.gpu_of("GPU-00000000-0000-0000-0000-000000000001")
