"""What the doctor concludes from machines that are not here: several hosts, containers."""

from typing import Any

import pytest

from common.machines import MACHINE, between, gpu, here, report
from common.simulated_nvml import UUIDS
from mnnvl_ar.doctor import show

BOTH = (gpu(0), gpu(1))


@pytest.mark.parametrize(
    ("about", "transport", "why", "problem"),
    [
        (here(*BOTH), "multicast if", "fabric handles first, else file descriptors", ""),
        (here(*BOTH, multicast_refusal="NCCL_NVLS_ENABLE=0"), "unicast", "off on rank 0 by NCCL_NVLS_ENABLE=0", ""),
        (here(gpu(0), gpu(1, multicast=False)), "unicast", "the device of rank 1 (G) has no multicast", ""),
        (here(gpu(0), gpu(1, fabric_handles=False)), "multicast if", "; file descriptors", ""),
        (here(), "host", "no GPU can be used", ""),
        (here(*BOTH, **between(2, unreached=((0, 1),))), "multicast if", "", "cannot reach"),
        (here(*BOTH, library={"path": "", "architectures": []}), "multicast if", "", "no GPU code"),
        (here(gpu(0, capability="8.0"), gpu(1)), "multicast if", "", "GPU 0 is 8.0"),
        (here(*BOTH, torch={**MACHINE["torch"], "cuda": None}, uses=None), "host", "", "a build without CUDA"),
        (here(*BOTH, confidential_computing={"on": True, "multi_gpu": "none"}), "multicast if", "confidential", ""),
    ],
)
def test_one_process(about: dict[str, Any], transport: str, why: str, problem: str) -> None:
    found = report({0: about}, size=2)
    assert found["outlook"]["transport"].startswith(transport)
    assert why in found["outlook"]["why"]
    assert bool(found["problems"]) == bool(problem)
    assert problem in " ".join(found["problems"])


def test_more_ranks_than_gpus_have_no_multicast() -> None:
    """As bring-up has it, which is asked itself."""
    plan = report({0: here(*BOTH)}, size=3)["outlook"]
    assert plan["transport"] == "unicast"
    assert plan["why"].startswith("ranks 0 and 2 share a device, which multicast cannot")
    plan = report({0: here(gpu(0)), 1: here(gpu(0))})["outlook"]
    assert plan["why"].startswith("ranks 0 and 1 share a device, which multicast cannot")


def test_one_rank_has_no_multicast() -> None:
    assert report({0: here(gpu(0))})["outlook"]["transport"] == "unicast"


def test_a_switch_on_one_rank_only() -> None:
    found = report({0: here(gpu(0)), 1: here(gpu(1), multicast_refusal="NCCL_NVLS_ENABLE=0")})
    assert "switched off on rank 1 by" in found["outlook"]["why"]
    assert "multicast  switched off by NCCL_NVLS_ENABLE=0" in show.text(found)


def test_containers_with_a_gpu_each_are_one_host() -> None:
    machines = {
        rank: here(gpu(rank), environment={"NVIDIA_VISIBLE_DEVICES": str(rank), "NCCL_CUMEM_ENABLE": "1"})
        for rank in range(3)
    }
    found = report(machines)
    (host,) = found["hosts"]
    assert [(g["index"], g["uuid"], g["ranks"]) for g in host["gpus"]] == [(n, UUIDS[n], [n]) for n in range(3)]
    assert host["p2p"] == [[True, None, None], [None, True, None], [None, None, True]]
    text = show.text(found)
    assert "Host a (ranks 0, 1 and 2)" in text
    assert "GPU 2 (rank 2): G" in text
    assert "0  1  2\n          0  -  ?  ?\n" in text
    assert "NVIDIA_VISIBLE_DEVICES=0 on rank 0; 1 on rank 1; 2 on rank 2" in text
    assert "NCCL_CUMEM_ENABLE=1\n" in text


def test_ranks_that_see_all_gpus_are_one_host() -> None:
    found = report({rank: here(*BOTH, uses=rank) for rank in range(2)})
    (host,) = found["hosts"]
    assert [g["ranks"] for g in host["gpus"]] == [[0], [1]]
    assert host["p2p"] == [[True, True], [True, True]]
    assert found["outlook"]["transport"].startswith("multicast")
    assert "     0     -  NV18\n" in show.text(found)


def test_containers_of_one_host_may_have_names_of_their_own() -> None:
    """Over one network: bring-up joins them, with file descriptors."""
    found = report({0: here(gpu(0)), 1: here(gpu(1), host="b", identity="b/boot-a/1")})
    assert [host["ranks"] for host in found["hosts"]] == [[0, 1]]
    assert "fabric handles only" not in found["outlook"]["why"]


def test_one_name_is_not_one_host() -> None:
    found = report({0: here(gpu(0)), 1: here(gpu(1), identity="a/boot-a/2")})
    assert [host["ranks"] for host in found["hosts"]] == [[0], [1]]
    assert "fabric handles only" in found["outlook"]["why"]


def test_several_hosts_without_imex() -> None:
    without = {"channels": [], "config": False}
    found = report({0: here(gpu(0)), 1: here(gpu(1), host="b", imex=without)})
    (line,) = found["problems"]
    assert line.startswith("b: no IMEX channel")
    assert "/dev/nvidia-caps-imex-channels/channel0" in line
    assert report({0: here(*BOTH, imex=without)})["problems"] == []
    one_container = {0: here(gpu(0)), 1: here(gpu(1), imex=without), 2: here(gpu(2), host="b")}
    assert [line[:18] for line in report(one_container)["problems"]] == ["a: no IMEX channel"]


@pytest.mark.parametrize(
    ("second", "why"),
    [
        (here(host="b"), "rank 1 can use no GPU, others can"),
        (here(gpu(1, fabric_handles=False), host="b"), "which the GPU of rank 1 does not have"),
    ],
)
def test_hosts_that_cannot_form_a_group(second: dict[str, Any], why: str) -> None:
    found = report({0: here(gpu(0)), 1: second})
    assert found["outlook"]["transport"] == "none"
    assert why in " ".join(found["problems"])
    assert f"Outlook: no group of 2 ranks: {found['outlook']['why']}." in show.text(found)


def test_hosts_without_gpus_cannot_form_a_group() -> None:
    found = report({0: here(), 1: here(host="b")})
    assert "joins processes of one host only" in " ".join(found["problems"])


def test_nobody_was_heard_of() -> None:
    """Not even rank 0, which did not get so far as to look at its machine."""
    found = report({}, size=2)
    assert found["outlook"]["transport"] == "none"
    assert "no rank was heard of" in show.text(found)
