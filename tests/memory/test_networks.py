"""How ranks reach each other: which sockets work between them decides, not what their hosts are called."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from memory import ranks
from memory.simulated_driver import SimulatedDriver
from memory.test_allocate import make
from memory.test_rendezvous import one
from mnnvl_ar.errors import BringUpError
from mnnvl_ar.memory import hosts


def names_body(rank: int, size: int, store: dist.Store, same: bool) -> Any:
    """Each rank has another name for its host; of kernel and network namespace the same, or not."""
    group = ranks.group(store, "first", rank, size)
    rest = hosts.identity().split("/", 1)[1] if same else f"kernel {rank}/1"
    with mock.patch.object(hosts, "identity", return_value=f"name{rank}/{rest}"):
        try:
            memory = make(group)
        except BringUpError as error:
            return error.rank, error.step, error.cause
    memory.close()
    return memory.transport


def test_hosts_with_two_names_are_one_if_sockets_work() -> None:
    assert one(ranks.values(ranks.launch(3, names_body, True))) == "host"


def test_control_other_kernels_are_other_hosts() -> None:
    rank, step, cause = one(ranks.values(ranks.launch(3, names_body, False)))
    assert (rank, step) == (1, "probe")
    assert "rank 1 is not on the host of rank 0" in cause


def clones_body(rank: int, size: int, store: dist.Store) -> Any:
    """As of two virtual machines of one snapshot: kernel and namespace look the same, but sockets do not work."""
    group = ranks.group(store, "first", rank, size)
    rest, connect = hosts.identity().split("/", 1)[1], socket.socket.connect

    def refused(self: socket.socket, at: Any) -> None:
        if self.family == socket.AF_UNIX and rank == 1:
            raise ConnectionRefusedError(111, "Connection refused")
        connect(self, at)

    with (
        mock.patch.object(hosts, "identity", return_value=f"name{rank}/{rest}"),
        mock.patch.object(socket.socket, "connect", refused),
    ):
        memory = make(
            group, device=torch.device("cuda", 0), transport="unicast", driver=SimulatedDriver(rank, host=f"h{rank}")
        )
    memory.close()
    return memory.handle_kind, memory.reason


def test_clones_find_each_other_by_tcp() -> None:
    kind, reason = one(ranks.values(ranks.launch(2, clones_body)))
    assert kind == "fabric"
    assert "rank 1 is not on the host of rank 0" in reason


def wrong_address_body(rank: int, size: int, store: dist.Store) -> Any:
    group = ranks.group(store, "first", rank, size)
    rest = {"identity": mock.Mock(return_value=f"host{rank}/kernel {rank}/1")}
    with mock.patch.multiple(hosts, **rest), mock.patch.dict(os.environ, {"MNNVL_AR_HOST_ADDRESS": "127.0.0.2"}):
        if rank == 0:  # nobody listens there: rank 0 does, on another port
            with mock.patch.object(hosts, "addresses", return_value=["127.0.0.9"]):
                return error_of(group, close=True)
        return error_of(group)


def error_of(group: Any, close: bool = False) -> str:
    from mnnvl_ar.memory.rendezvous import Listener

    listen = Listener._listen

    def deaf(self: Any, sock: socket.socket) -> None:
        """A firewall: nobody gets through by TCP."""
        if sock.family == socket.AF_UNIX:
            listen(self, sock)

    with mock.patch.object(Listener, "_listen", deaf if close else listen), pytest.raises(BringUpError) as caught:
        make(group, timeout=5.0)
    return str(caught.value)


def test_an_address_out_of_reach_names_the_variable_that_sets_it() -> None:
    told = one(ranks.values(ranks.launch(2, wrong_address_body)))
    assert "rank 1 at step 'rendezvous': cannot reach rank 0 on host0, at 127.0.0.9 port" in told
    assert "set MNNVL_AR_HOST_ADDRESS on rank 0" in told


def test_the_variable_wins() -> None:
    with mock.patch.dict(os.environ, {"MNNVL_AR_HOST_ADDRESS": "fd00::7"}):
        assert hosts.addresses() == ["fd00::7"]
    with mock.patch.object(
        hosts, "_of_interfaces", return_value=["127.0.0.1", "fe80::1", "::1", "fd00::9", "10.0.0.1"]
    ):
        found = hosts.addresses()
    assert {"fd00::9", "10.0.0.1"} <= set(found)
    assert not {"127.0.0.1", "fe80::1", "::1"} & set(found)


_CAN = os.geteuid() == 0 and shutil.which("ip") is not None


def namespace_body(rank: int, size: int, store: dist.Store, version: int) -> Any:
    """Rank 1 has a network of its own, with one link to rank 0's, and on it addresses of one version only; rank 0 has
    other interfaces beside."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x40000000):  # CLONE_NEWNET: every rank, so that nothing is left behind
        return "skipped: " + os.strerror(ctypes.get_errno())
    ip("link set lo up")
    store.set(f"pid{rank}", str(os.getpid()))
    if rank == 0:
        ip("link add name aside type veth peer name aside2")
        ip("addr add 10.7.7.1/24 dev aside")
        ip("link set aside up")
        ip(f"link add va type veth peer name vb netns {int(store.get('pid1'))}")
    ranks.meet(store, "linked", size)
    address = ("10.9.0.{}/24", "fd00:1::{}/64")[version == 6].format(rank + 1)
    ip(f"addr add {address} dev v{'ab'[rank]}" + (" nodad" if version == 6 else ""))
    ip(f"link set v{'ab'[rank]} up")
    ranks.meet(store, "up", size)
    group = dist.ProcessGroup(dist.PrefixStore("first", store), rank, size)
    driver = SimulatedDriver(rank, host=f"h{rank}")
    began = time.monotonic()
    try:
        make(group, device=torch.device("cuda", 0), transport="unicast", driver=driver, timeout=40.0).close()
    except BringUpError as error:
        return str(error)
    return f"made in {time.monotonic() - began < 30.0}"


def ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True)


@pytest.mark.skipif(not _CAN, reason="needs root and iproute2, to make networks")
@pytest.mark.parametrize("version", [4, 6])
def test_networks_of_one_version(version: int) -> None:
    told = one(ranks.values(ranks.launch(2, namespace_body, version)))
    if told.startswith("skipped"):
        pytest.skip(told)
    assert told == "made in True"
