"""The client against a stand-in server: streams, whole bodies, errors, requests that are never answered."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import warnings
from typing import Any

import pytest

from servers import client, sglang_server, vllm_server


class StandIn:
    """A server that does with each request what its prompt's first token says."""

    FINE, SILENT, SHORT, REFUSED, CUT, WHOLE, BROKEN = range(7)

    def __init__(self) -> None:
        self.most = self._now = self.port = 0
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._run, daemon=True).start()
        assert self._ready.wait(30)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            return writer.close()
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        self._now += 1
        self.most = max(self.most, self._now)
        await asyncio.sleep(0)  # others may begin
        what, count = body["input_ids"][0], body["sampling_params"]["max_new_tokens"]
        if what == self.SILENT:
            self._now -= 1  # it holds no room here, and never answers
            await reader.read()  # to the client's end
            return writer.close()
        await self._answer(writer, what, list(range(count)))
        self._now -= 1
        return writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, what: int, tokens: list[int]) -> None:
        if what == self.REFUSED:
            return writer.write(b'HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\n"no"')
        if what == self.WHOLE:
            text = json.dumps({"output_ids": tokens}).encode()
            return writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text))
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for n in range(1, len(tokens) + (what != self.SHORT)):
            event = b"data: " + json.dumps({"output_ids": tokens[:n]}).encode() + b"\n\n"
            for part in (event[:7], event[7:]):  # an event in two chunks
                writer.write(b"%x\r\n%s\r\n" % (len(part), part))
            await writer.drain()
            if what == self.CUT:
                return None
        if what == self.BROKEN:
            writer.write(b'26\r\ndata: {"error": {"message": "dead"}}\n\n\r\n')
        return writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


@pytest.fixture(scope="module")
def stand_in() -> StandIn:
    return StandIn()


def results(server: StandIn, kinds: list[int], concurrency: int, patience: float) -> list[client.Result]:
    bodies = [sglang_server.request([kind, 7], 5) for kind in kinds]
    return client.run(
        *(server.port, sglang_server.GENERATE, bodies, sglang_server.tokens_of, [5] * len(kinds)),
        concurrency=concurrency,
        patience=patience,
    )


def test_all_are_answered_and_no_more_at_once_than_asked(stand_in: StandIn) -> None:
    found = results(stand_in, [StandIn.FINE, StandIn.WHOLE] * 100, 16, 120.0)
    assert {each.why_not for each in found} == {""}
    assert {tuple(each.tokens) for each in found} == {(0, 1, 2, 3, 4)}
    assert 1 < stand_in.most <= 16


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (StandIn.SILENT, "not answered within 2 s, 0 of 5"),
        (StandIn.SHORT, "4 tokens, wanted 5"),
        (StandIn.REFUSED, "status 503"),
        (StandIn.CUT, "Error"),
        (StandIn.BROKEN, "dead"),
    ],
)
def test_one_that_is_not_is_found_among_others(stand_in: StandIn, kind: int, says: str) -> None:
    kinds = [StandIn.FINE] * 6
    kinds[3] = kind
    found = results(stand_in, kinds, 3, 2.0 if kind == StandIn.SILENT else 120.0)
    assert says in found[3].why_not
    if kind != StandIn.SILENT:  # on a machine as busy as this, 2 s may be short for the others
        assert [each.why_not for i, each in enumerate(found) if i != 3] == [""] * 5


@pytest.mark.parametrize("kind", range(7))
def test_no_connection_is_left_to_the_garbage_collector(kind: int) -> None:
    gc.collect()  # what other tests have left
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", ResourceWarning)
        results(StandIn(), [StandIn.FINE, kind], 2, 0.2 if kind == StandIn.SILENT else 120.0)
        gc.collect()
    assert [str(each.message) for each in seen if "unclosed" in str(each.message)] == []


def test_nobody_listens() -> None:
    (found,) = client.run(1, "/", [{}], vllm_server.tokens_of, [1], concurrency=1, patience=20.0)
    assert "Error" in found.why_not
    assert client.get(1, "/health") == 0


def test_health(stand_in: StandIn) -> None:
    assert client.get(stand_in.port, "/health", 60.0) == 200


def test_both_servers_bodies() -> None:
    body: dict[str, Any] = vllm_server.request([5, 6], 3)
    assert body["token_ids"] == [5, 6]
    assert vllm_server.tokens_of({"choices": [{"token_ids": [1, 2]}]}) == [1, 2]
    assert sglang_server.request([5, 6], 3)["stream"] is True
