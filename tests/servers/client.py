"""An asynchronous HTTP client that keeps so many requests under way and finds those that are never answered.

    results = run(port, path, bodies, tokens_of, wanted, concurrency=128, patience=60.0)

HTTP/1.1 by the standard library, a connection a request; bodies come whole, in chunks, or as server-sent events, each
of which holds all tokens so far.

Every connection is closed by whoever made it. What is left to the garbage collector, which may run in another thread,
closes its descriptor first and its transport, by the number of that descriptor, afterwards: in between the number may
be another connection's, which then is read no more.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

TokensOf = Callable[[dict[str, Any]], list[int]]


@dataclass(frozen=True)
class Result:
    """Of a request: `why_not` is empty if it was answered with as many tokens as were wanted."""

    tokens: list[int]
    seconds: float
    why_not: str = ""


def run(
    port: int,
    path: str,
    bodies: Sequence[dict[str, Any]],
    tokens_of: TokensOf,
    wanted: Sequence[int],
    *,
    concurrency: int,
    patience: float,
) -> list[Result]:
    """`patience`: seconds for each request, from when it is sent."""

    async def all_of_them() -> list[Result]:
        room = asyncio.Semaphore(concurrency)

        async def one(body: dict[str, Any], count: int) -> Result:
            async with room:
                return await _answered(port, path, body, tokens_of, count, patience)

        return await asyncio.gather(*(one(body, count) for body, count in zip(bodies, wanted, strict=True)))

    return asyncio.run(all_of_them())


def get(port: int, path: str, patience: float = 5.0) -> int:
    """The status of a GET; 0 if there is none."""

    async def ask() -> int:
        async with _exchange(port, path, None) as (status, _):
            return status

    try:
        return asyncio.run(asyncio.wait_for(ask(), patience))
    except (OSError, ValueError, asyncio.TimeoutError, asyncio.IncompleteReadError):
        return 0


async def _answered(
    port: int, path: str, body: dict[str, Any], tokens_of: TokensOf, count: int, patience: float
) -> Result:
    began = time.monotonic()
    tokens: list[int] = []

    async def ask() -> str:
        async with _exchange(port, path, body) as (status, lines):
            if status != 200:
                text = b" ".join([line async for line in lines])
                return f"status {status}: {text[:200].decode(errors='replace')}"
            async for line in lines:
                if event := _event(line):
                    tokens[:] = tokens_of(event)
        return "" if len(tokens) == count else f"{len(tokens)} tokens, wanted {count}"

    try:
        why_not = await asyncio.wait_for(ask(), patience)
    except asyncio.TimeoutError:
        why_not = f"not answered within {patience:g} s, {len(tokens)} of {count} tokens"
    except (OSError, ValueError, KeyError, asyncio.IncompleteReadError) as error:
        why_not = f"{type(error).__name__}: {error}"
    return Result(tokens, time.monotonic() - began, why_not)


def _event(line: bytes) -> dict[str, Any] | None:
    """What a line of events, or a whole body, says; None if nothing."""
    text = line.removeprefix(b"data:").strip()
    if not text or text == b"[DONE]":
        return None
    found = json.loads(text)
    if not isinstance(found, dict) or "error" in found:
        raise ValueError(str(found)[:200])
    return found


@asynccontextmanager
async def _exchange(
    port: int, path: str, body: dict[str, Any] | None
) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
    """Status and the lines of the answer's body, over a connection that ends with the context."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=64 << 20)
    try:
        content = b"" if body is None else json.dumps(body).encode()
        verb = "GET" if body is None else "POST"
        head = f"{verb} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        await writer.drain()
        words = (await reader.readline()).split()
        if len(words) < 2:
            raise ConnectionResetError("no answer")
        chunked = False
        while (line := await reader.readline()).strip():
            chunked |= line.lower().replace(b" ", b"").startswith(b"transfer-encoding:chunked")
        yield int(words[1]), _lines(reader, chunked)
    finally:
        writer.close()


async def _lines(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    left = b""
    async for piece in _pieces(reader, chunked):
        *whole, left = (left + piece).split(b"\n")
        for each in whole:
            yield each
    if left:
        yield left


async def _pieces(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    while chunked:
        size = int((await reader.readline()).split(b";")[0], 16)  # of a connection that was closed: a ValueError
        piece = await reader.readexactly(size + 2)
        if size == 0:
            return
        yield piece[:-2]
    while piece := await reader.read(1 << 16):
        yield piece
