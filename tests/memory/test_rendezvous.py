"""How ranks meet: several hosts, bad requests, strangers, a store that is stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import time
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from memory import faults, ranks
from memory.simulated_driver import SimulatedDriver
from memory.test_allocate import check_content, check_shared, make
from mnnvl_ar.errors import BringUpError
from mnnvl_ar.memory import Fill, Request, agree, allocate, hosts, rendezvous
from mnnvl_ar.memory.place import KEY

WELCOMED = rendezvous._Guest._welcomed


def on_host(name: str) -> Any:
    """Makes this process believe, and tell, that it runs on another host."""
    return mock.patch.object(hosts, "identity", return_value=f"{name}/boot of {name}/1")


def hosts_body(rank: int, size: int, store: dist.Store, names: list[str], kind: str, fail: dict[str, str]) -> Any:
    group = ranks.group(store, "first", rank, size)
    driver = SimulatedDriver(rank, fail=fail)
    with on_host(names[rank]):
        try:
            if kind == "host":
                memory = make(group)
            else:
                memory = make(group, device=torch.device("cuda", 0), transport="unicast", driver=driver)
        except BringUpError as error:
            return error.rank, error.step, error.cause
    check_content(memory)
    check_shared(memory, group)
    memory.close()
    assert not driver.held()
    return memory.transport, memory.handle_kind, memory.reason


def one(told: list[Any]) -> Any:
    assert len(set(told)) == 1, told
    return told[0]


def test_fabric_handles_across_hosts() -> None:
    told = one(ranks.values(ranks.launch(4, hosts_body, ["a", "a", "b", "c"], "cuda", {})))
    assert told[:2] == ("unicast", "fabric")
    assert told[2].startswith("unicast over fabric, 4 ranks on 3 hosts")


def test_no_file_descriptors_across_hosts() -> None:
    fail = {"create fabric": "CUDA_ERROR_NOT_PERMITTED"}
    rank, step, cause = one(ranks.values(ranks.launch(3, hosts_body, ["a", "a", "b"], "cuda", fail)))
    assert (rank, step) == (0, "allocate")
    assert "CUDA_ERROR_NOT_PERMITTED" in cause
    assert "rank 2 is not on the host of rank 0" in cause


def test_the_host_transport_joins_one_host() -> None:
    rank, step, cause = one(ranks.values(ranks.launch(3, hosts_body, ["a", "b", "a"], "host", {})))
    assert (rank, step) == (1, "probe")
    assert "rank 1 is not on the host of rank 0" in cause


def remote_kill_body(rank: int, size: int, store: dist.Store, victim: int) -> Any:
    group = ranks.group(store, "first", rank, size)
    with on_host(f"host{rank}"):
        return faults.attempt(group, "cuda", 20.0, {"import": "kill"} if rank == victim else {})


@pytest.mark.parametrize("victim", [0, 2])
def test_a_kill_is_noticed_across_hosts(victim: int) -> None:
    ends = ranks.launch(3, remote_kill_body, victim)
    told = [ends[rank].value for rank in range(3) if rank != victim]
    assert one([answer for answer, _ in told])[:2] == (victim, "import")
    assert max(seconds for _, seconds in told) < 10, "noticed, not waited for"


def late_body(rank: int, size: int, store: dist.Store, comes_again: bool) -> Any:
    """Rank 0 stands still while ranks of other hosts introduce themselves, who give up and come again."""
    group, look, stood = ranks.group(store, "first", rank, size), rendezvous.Listener._look, list[bool]()

    def stands_still(listener: rendezvous.Listener) -> None:
        look(listener)
        if len(listener._listeners) == 2 and not stood:
            stood.append(True)
            time.sleep(2.5)

    with (
        on_host(f"host{rank}"),
        mock.patch.object(rendezvous.Listener, "_look", stands_still),
        mock.patch.object(rendezvous, "_HEARD_SECONDS", 1.0),
        mock.patch.object(rendezvous, "_COMES_AGAIN", 3.0 if comes_again else -1.0),
    ):
        began = time.monotonic()
        try:
            agree(group, 1, step="meets", timeout=40.0 if comes_again else 10.0)
        except BringUpError as error:
            return error.cause, time.monotonic() - began
        return "", time.monotonic() - began


def test_a_rank_0_that_stands_still_takes_nobody_for_dead() -> None:
    for cause, took in ranks.values(ranks.launch(3, late_body, True)):
        assert cause == ""
        assert took < 20.0


def test_control_who_comes_again_would_be_taken_for_dead() -> None:
    causes = [cause for cause, _ in ranks.values(ranks.launch(3, late_body, False))]
    assert any("died" in cause for cause in causes), causes


def met_and_gone_body(rank: int, size: int, store: dist.Store, victims: list[int]) -> Any:
    """Ranks of other hosts are killed when rank 0 has heard them, while the last one is still to come."""
    group = ranks.group(store, "first", rank, size)

    def killed(guest: Any, connection: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    welcomed = killed if rank in victims else WELCOMED
    with on_host(f"host{rank}"), mock.patch.object(rendezvous._Guest, "_welcomed", welcomed):
        if rank == size - 1:
            time.sleep(1.0)
        began = time.monotonic()
        with pytest.raises(BringUpError) as caught:
            agree(group, 1, step="meets", timeout=40.0)
        return caught.value.rank, time.monotonic() - began


@pytest.mark.parametrize("victims", [[1], [1, 2]], ids=["a rank", "a node of two"])
def test_who_is_killed_in_the_meeting_is_named(victims: list[int]) -> None:
    ends = ranks.launch(4, met_and_gone_body, victims)
    for rank in {0, 1, 2, 3}.difference(victims):
        named, took = ends[rank].value
        assert named in victims
        assert took < 20.0, "noticed, not waited for"


def remote_loop_body(rank: int, size: int, store: dist.Store, mode: str, cases: list[tuple[str, int]]) -> Any:
    with on_host(f"host{rank}"):
        return faults.loop_body(rank, size, store, "cuda", mode, cases, 20.0)


@pytest.mark.parametrize("mode", ["failure", "exception"])
def test_a_failure_is_agreed_on_across_hosts(mode: str) -> None:
    cases = [(step, victim) for step in ("rendezvous", "allocate", "import", "ready") for victim in range(3)]
    told = ranks.values(ranks.launch(3, remote_loop_body, mode, cases))
    for number, (step, victim) in enumerate(cases):
        assert one([results[number][0] for results in told])[:2] == (victim, step)


def requests_body(rank: int, size: int, store: dist.Store) -> list[str]:
    group = ranks.group(store, "first", rank, size)
    good: dict[str, Any] = {"nbytes": 4096, "fills": [Fill(0, 64, 0)], "probe_offset": 0, "transport": "auto"}
    good["alike"] = {"purpose of it": "a"}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("nbytes differs: rank 1 has 8192, rank 0 has 4096", {"nbytes": 8192}),
        ("fills differs", {"fills": [Fill(0, 64, 1)]}),
        ("probe_offset differs", {"probe_offset": 64}),
        ("transport differs", {"transport": "host"}),
        ("purpose of it differs: rank 1 has 'b', rank 0 has 'a'", {"alike": {"purpose of it": "b"}}),
        ("purpose of it differs: rank 1 has None, rank 0 has 'a'", {"alike": {}}),
        ("more differs: rank 1 has 'c', rank 0 has None", {"alike": {"purpose of it": "a", "more": "c"}}),
        ("transport: got 'unicast' for device cpu, wanted one of auto, host", {"transport": "unicast"}),
        ("nbytes: got 0", {"nbytes": 0}),
        ("probe_offset: got 4080, wanted a multiple of 16 from 0 to 4048", {"probe_offset": 4080}),
        ("probe_offset: got 8,", {"probe_offset": 8}),
        ("fills: got Fill(offset=4090", {"fills": [Fill(4090, 64, 0)]}),
        ("fills: got", {"fills": [Fill(0, 64, 1 << 32)]}),
    ]
    told = []
    for wanted, odd in cases:
        asked = good | (odd if rank == 1 else {})
        with pytest.raises(BringUpError) as caught:
            allocate(group, Request(device=torch.device("cpu"), **asked), timeout=20.0)
        assert (caught.value.rank, caught.value.step) == (1, "rendezvous")
        assert wanted in caught.value.cause, caught.value.cause
        told.append(str(caught.value))
    allocate(group, Request(device=torch.device("cpu"), **good), timeout=20.0).close()
    return told


def test_what_one_rank_asks_wrongly_all_hear_of() -> None:
    told = ranks.values(ranks.launch(3, requests_body))
    assert told[0] == told[1] == told[2]


def capturing_body(rank: int, size: int, store: dist.Store) -> Any:
    group = ranks.group(store, "first", rank, size)
    driver = SimulatedDriver(rank)
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.is_current_stream_capturing", return_value=rank == 1),
        pytest.raises(BringUpError, match="capturing") as caught,
    ):
        make(group, device=torch.device("cuda", 0), driver=driver)
    assert not driver.calls
    return caught.value.rank, caught.value.step


def test_refused_while_a_stream_captures() -> None:
    assert one(ranks.values(ranks.launch(2, capturing_body))) == (1, "rendezvous")


def stranger_body(rank: int, size: int, store: dist.Store) -> None:
    group = ranks.group(store, "first", rank, size)
    notes = group.get_group_store()
    if rank == 1:  # plays the stranger first, then its part
        while not notes.check([KEY]):
            time.sleep(0.005)
        about = json.loads(notes.get(KEY))
        hellos = [{"token": "guess", "rank": 2, "seconds_left": 1.0}, {"token": about["token"], "rank": 9}, [], 7]
        bodies = [json.dumps(hello).encode() for hello in hellos] + [b"\xff\xfe", b""]
        for body in bodies:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(f"\0mnnvl_ar-{about['name']}")
                sock.sendall(struct.pack("<I", len(body)) + body)
                sock.settimeout(30)
                assert sock.recv(1) == b""  # shown the door
        mute = socket.socket(socket.AF_UNIX)  # and one that never says a word must not hold anyone up
        mute.connect(f"\0mnnvl_ar-{about['name']}")
    memory = make(group)
    check_shared(memory, group)
    memory.close()


def test_strangers_are_shown_the_door() -> None:
    ranks.values(ranks.launch(3, stranger_body))


def stopped_store_body(rank: int, size: int, store: dist.Store) -> Any:
    """Rank 0 hosts the group's store itself, as with init_method="tcp://", and is stopped before it says a word."""
    if rank == 0:
        own = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        store.set("port", str(own.port))
        store.set("pid", str(os.getpid()))
    else:
        own = dist.TCPStore("127.0.0.1", int(store.get("port")), is_master=False, timeout=timedelta(seconds=60))
    group = ranks.group(own, "first", rank, size)
    ranks.meet(store, "made", size)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
        return None
    time.sleep(0.3)
    start = time.monotonic()
    with pytest.raises(BringUpError, match="store does not answer") as caught:
        make(group, timeout=1.0)
    seconds = time.monotonic() - start
    os.kill(int(store.get("pid")), signal.SIGCONT)
    return caught.value.rank, caught.value.step, seconds


def test_a_stopped_store_does_not_block_for_ever() -> None:
    _, (rank, step, seconds) = ranks.values(ranks.launch(2, stopped_store_body))
    assert (rank, step) == (-1, "rendezvous")
    assert seconds < 10, "nobody waits for the store's own timeout of 60 s"
