"""What strangers send: whatever it is, it ends their own connection and nothing else."""

from __future__ import annotations

import array
import gc
import json
import os
import random
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from memory import ranks
from memory.test_allocate import check_shared, make
from mnnvl_ar.memory import connection as module
from mnnvl_ar.memory.connection import STRANGER_LIMIT, Connection, ConnectionClosed
from mnnvl_ar.memory.place import KEY
from mnnvl_ar.memory.rendezvous import Hello, hello_of

TOKEN, SIZE = "c0ffee" * 4, 4
GOOD = {"token": TOKEN, "rank": 2, "seconds_left": 5.0, "who": {"name": "0", "members": [0, 1, 2, 3], "met": ""}}
ODD: list[Any] = [None, True, -1, 0, 1.0, 4, 1e309, float("nan"), 10**400, "", "2", "\ud800", [], [[]], {}, {"a": 1}]


def framed(body: bytes, nbytes: int | None = None) -> bytes:
    return struct.pack("<I", len(body) if nbytes is None else nbytes) + body


def outcome(data: bytes, cuts: list[int], fds: list[int] | None = None) -> Any:
    """What a listener makes of a stranger's bytes that come in parts: a `Hello`, "closed", or None if there is more to
    come. Anything else escapes."""
    ours, theirs = socket.socketpair()
    connection = Connection(ours)
    try:
        for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds and not start else []
            theirs.sendmsg([data[start:end]], ancillary)
            got = connection.poll()
            if got is not None:
                assert got[1] == []
                return hello_of(got[0], TOKEN, SIZE)
        return None
    except ConnectionClosed:
        return "closed"
    finally:
        connection.close()
        theirs.close()


def mutants(seed: int) -> Iterator[tuple[bytes, list[int]]]:
    """Messages that are nearly right, or nothing at all, without end."""
    draw = random.Random(seed)
    good = json.dumps(GOOD).encode()
    while True:
        kind, body, nbytes = draw.randrange(8), bytearray(good), None
        if kind == 0:
            body = bytearray(draw.randbytes(draw.randrange(64)))
        elif kind == 1:
            for _ in range(draw.randrange(1, 4)):
                body[draw.randrange(len(body))] = draw.randrange(256)
        elif kind == 2:
            hello = {**GOOD, draw.choice([*GOOD]): draw.choice(ODD)}
            body = bytearray(json.dumps(hello).encode())
        elif kind == 3:
            opens = draw.choice([b"[", b'{"a":', b'"\\u'])
            body = bytearray(opens * draw.randrange(1, 1 + STRANGER_LIMIT // len(opens)))
        elif kind == 4:
            hello = {name: value for name, value in GOOD.items() if draw.random() < 0.6}
            body = bytearray(json.dumps(draw.choice([hello, [hello], [*hello], 7])).encode())
        elif kind == 5:
            nbytes = draw.choice([0, 1, len(body) - 1, len(body) + 1, STRANGER_LIMIT + 1, 1 << 31, (1 << 32) - 1])
        elif kind == 6:
            body = bytearray(good.decode().encode(draw.choice(["utf-16", "utf-32", "utf-8-sig"])))
        data = framed(bytes(body), nbytes)
        if kind == 7 and draw.random() < 0.9:
            data = data[: draw.randrange(len(data))]
        yield data, sorted(draw.sample(range(1, max(2, len(data))), min(draw.randrange(3), max(0, len(data) - 1))))


def fuzz(seed: int, messages: int, seconds: float) -> dict[str, int]:
    """How many messages came to what."""
    found = {"heard": 0, "closed": 0, "unfinished": 0}
    gc.collect()  # what other tests have left must not go meanwhile
    before, until = len(os.listdir("/proc/self/fd")), time.monotonic() + seconds
    for number, (data, cuts) in enumerate(mutants(seed)):
        if number == messages or time.monotonic() > until:
            break
        got = outcome(data, cuts)
        name = "heard" if isinstance(got, Hello) else got or "unfinished"
        found[name] += 1
        if isinstance(got, Hello):
            assert type(got.rank) is int
            assert 0 < got.rank < SIZE
            assert 0 < got.seconds_left < 1e10
    assert len(os.listdir("/proc/self/fd")) == before
    return found


def test_some_seconds_of_fuzz() -> None:
    found = fuzz(7, 1_000_000, 4.0)
    assert min(found.values()) > 0, found  # it is of use: all three happen


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_a_million_messages() -> None:
    found = fuzz(8, 1_000_000, 3000.0)
    print(f"fuzz: {sum(found.values())} messages, {found}, nothing else escaped")
    assert sum(found.values()) == 1_000_000


def test_the_good_one_is_heard_in_parts() -> None:
    data = framed(json.dumps(GOOD).encode())
    assert outcome(data, [*range(1, len(data), 3)]) == Hello(2, 5.0, GOOD["who"])


@pytest.mark.parametrize("name", GOOD)
def test_each_part_is_wanted(name: str) -> None:
    fine = {"who": lambda odd: isinstance(odd, dict), "seconds_left": lambda odd: odd in (True, 1.0, 4)}
    for odd in ODD:
        if fine.get(name, lambda odd: odd == GOOD[name])(odd):
            continue
        assert outcome(framed(json.dumps({**GOOD, name: odd}).encode()), []) == "closed", odd
    without = {key: value for key, value in GOOD.items() if key != name}
    assert outcome(framed(json.dumps(without).encode()), []) == "closed"


def test_strangers_send_no_descriptors_and_little() -> None:
    good = json.dumps(GOOD).encode()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    assert outcome(framed(good), [], fds=[0, 1]) == "closed"
    assert outcome(framed(good + b" " * (STRANGER_LIMIT - len(good))), []) == Hello(2, 5.0, GOOD["who"])
    assert outcome(framed(good + b" " * (STRANGER_LIMIT - len(good) + 1)), []) == "closed"
    assert len(os.listdir("/proc/self/fd")) == before


def test_control_the_fuzz_sees_what_escapes() -> None:
    """As it was: a message that is nested too deeply."""

    def loads(text: bytes) -> Any:
        try:
            return json.loads(text)
        except RecursionError:
            raise KeyError("escaped") from None

    with mock.patch.object(module, "json", mock.Mock(loads=loads)), pytest.raises(KeyError, match="escaped"):
        fuzz(7, 1_000_000, 60.0)


def nested_body(rank: int, size: int, store: dist.Store) -> None:
    """Rank 1 plays strangers first: one that nests, and more than there is room for that say nothing."""
    group = ranks.group(store, "first", rank, size)
    notes, mute = group.get_group_store(), list[socket.socket]()
    if rank == 1:
        while not notes.check([KEY]):
            time.sleep(0.005)
        name = json.loads(notes.get(KEY))["name"]
        for body in (b"[" * 1000, b"[" * 100_000 + b"]" * 100_000, b'{"token":{"token":[]}}'):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(f"\0mnnvl_ar-{name}")
                with_head = framed(body)
                sock.settimeout(30)
                try:
                    sock.sendall(with_head)
                    assert sock.recv(1) == b""
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the door was shut before all of it had come
        for _ in range(100):
            mute.append(socket.socket(socket.AF_UNIX))
            mute[-1].connect(f"\0mnnvl_ar-{name}")
    memory = make(group)
    check_shared(memory, group)
    memory.close()


def test_a_bring_up_outlives_strangers() -> None:
    ranks.values(ranks.launch(3, nested_body))


def other_user_body(rank: int, size: int, store: dist.Store) -> Any:
    """Rank 1 is another user's process: it is not heard on the socket, and all are told why descriptors are not
    passed."""
    if rank == 0:  # a FileStore's file is root's
        own = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        store.set("port", str(own.port))
    else:
        own = dist.TCPStore("127.0.0.1", int(store.get("port")), is_master=False)
    group = dist.ProcessGroup(own, rank, size)
    ranks.meet(store, "made", size)
    if rank == 1:
        os.seteuid(65534)
    try:
        make(group)
    except Exception as error:
        return str(error)
    finally:
        os.seteuid(0)
        ranks.meet(store, "end", size)  # rank 0 hosts the store


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_other_users_are_refused() -> None:
    told = ranks.values(ranks.launch(3, other_user_body))
    assert len(set(told)) == 1, told
    assert "no file descriptors to other users, and rank 1 is user 65534, rank 0 0" in told[0]
