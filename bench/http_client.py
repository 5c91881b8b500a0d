"""Clients of ``bench.serve_http``, in processes of their own: what a user of the server sees.

Ordinary clients ask without pause, most over plain sockets, some with OpenAI's own client, and
compare every answer. Odd ones read slowly, send extreme parameters or what is no video, leave, send
one file many times, and one 8K clip. Nothing here imports the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench.latency import Latencies

# What no answer takes: it counts as lost.
LOST_SECONDS, LARGE_SECONDS = 120.0, 900.0
SLOW_READERS, EXTREME_CLIENTS, LEAVING_CLIENTS = 4, 4, 2
SLOW_BYTES, SLOW_PAUSE = 64, 0.05
BAD_PAUSE = 0.25
EQUAL_UPLOADS, EQUAL_PAUSE = 10, 5.0


@dataclass(frozen=True)
class Ask:
    """A request's body and its right answer; None where any answer will do."""

    body: dict[str, Any]
    answer: str | None


@dataclass
class Seen:
    """What clients of one process saw."""

    seconds: float = 0.0
    started: int = 0
    answered: int = 0
    tokens: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    first: Latencies = field(default_factory=Latencies)
    between: Latencies = field(default_factory=Latencies)
    odd: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    clip: dict[str, Any] | None = None


class Refused(Exception):
    """An answer other than 2xx."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"{status} {body[:200].decode(errors='replace')}")
        self.status = status


class Http:
    """One HTTP/1.1 connection, kept open; as little work for a token as can be."""

    def __init__(self, host: str, port: int, slow: bool = False) -> None:
        self._host, self._port, self._slow = host, port, slow
        self._writer: asyncio.StreamWriter | None = None

    async def _open(self) -> None:
        connection = socket.socket()
        if self._slow:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, (self._host, self._port))
        limit = SLOW_BYTES if self._slow else 1 << 16
        self._reader, self._writer = await asyncio.open_connection(sock=connection, limit=limit)

    def close(self) -> None:
        """End the connection, whatever is under way."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    async def _send(self, method: str, path: str, body: bytes, kind: str) -> tuple[int, int | None]:
        if self._writer is None:
            await self._open()
        self._writer.write(
            f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        status = int((await self._line()).split()[1])
        length: int | None = None
        while line := (await self._line()).strip().lower():
            if line.startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
            if line == b"connection: close":
                self._closing = True
        return status, length

    _closing = False

    async def _line(self) -> bytes:
        """A line, in pieces of any size."""
        line = b""
        while not line.endswith(b"\n"):
            piece = await self._read(1) if self._slow else await self._reader.readline()
            if not piece:
                raise ConnectionError("the server closed the connection")
            line += piece
        return line

    async def _read(self, count: int) -> bytes:
        if not self._slow:
            return await self._reader.readexactly(count)
        data = b""
        while len(data) < count:
            piece = await self._reader.read(min(count - len(data), SLOW_BYTES))
            if not piece:
                raise ConnectionError("the server closed the connection")
            data += piece
        return data

    async def call(
        self, method: str, path: str, body: bytes = b"", kind: str = "application/json"
    ) -> Any:
        """A whole answer, as JSON."""
        status, length = await self._send(method, path, body, kind)
        data = await self._read(length or 0)
        if self._closing:
            self.close()
            self._closing = False
        if status >= 300:
            raise Refused(status, data)
        return json.loads(data)

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The events of a streamed answer, as they come."""
        complete = False
        try:
            status, length = await self._send(
                "POST", "/v1/chat/completions", json.dumps(body).encode(), "application/json"
            )
            if status != 200:
                raise Refused(status, await self._read(length or 0))
            pending = b""
            while size := int(await self._line(), 16):
                pending += (await self._read(size + 2))[:-2]
                if self._slow:
                    await asyncio.sleep(SLOW_PAUSE * size / SLOW_BYTES)
                *events, pending = pending.split(b"\n\n")
                for event in events:
                    if event.startswith(b'data: {"error"'):
                        raise Refused(status, event)
                    if event != b"data: [DONE]":
                        yield json.loads(event[6:])
            await self._line()
            complete = True
        finally:
            if not complete:
                # What is left of an answer must not be taken for the next one.
                self.close()


def work(
    connection: Connection, ordinary: bool, url: tuple[str, int], options: dict[str, Any]
) -> None:
    """A client process: runs, and sends what it saw."""
    if options.get("official"):
        # Takes seconds, which are not the server's.
        import openai  # noqa: F401
    connection.send("ready")
    connection.recv()
    seen = Seen()
    run = _ordinary if ordinary else _odd
    start = time.perf_counter()
    asyncio.run(run(*url, seen, start + options["seconds"], options))
    seen.seconds = time.perf_counter() - start
    connection.send(seen)


# --- ordinary clients ---------------------------------------------------------------------------


async def _ordinary(host: str, port: int, seen: Seen, end: float, options: dict[str, Any]) -> None:
    async with contextlib.AsyncExitStack() as stack:
        official = None
        if options["official"]:
            import openai

            official = await stack.enter_async_context(
                openai.AsyncOpenAI(base_url=f"http://{host}:{port}/v1", api_key="-", max_retries=0)
            )
        clients = []
        for number in range(options["clients"]):
            rng = random.Random(f"{options['seed']}/{number}")
            if number < options["official"]:
                pieces = _official(official)
            else:
                pieces = Http(host, port).stream
            clients.append(_ask_on(pieces, rng, options["asks"], seen, end))
        await asyncio.gather(*clients)


def _official(client: Any) -> Callable[[dict[str, Any]], AsyncIterator[dict[str, Any]]]:
    async def pieces(body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        extra = {name: body[name] for name in ("video_ids",) if name in body}
        known = {name: value for name, value in body.items() if name not in extra}
        async for chunk in await client.chat.completions.create(**known, extra_body=extra):
            yield chunk.model_dump()

    return pieces


async def _ask_on(
    pieces: Callable[[dict[str, Any]], AsyncIterator[dict[str, Any]]],
    rng: random.Random,
    asks: list[Ask],
    seen: Seen,
    end: float,
) -> None:
    # Once at least, however short the run.
    while not seen.started or time.perf_counter() < end:
        ask = rng.choice(asks)
        seen.started += 1
        try:
            async with asyncio.timeout(LOST_SECONDS):
                text = await _timed(pieces(ask.body), seen)
        except Exception as error:
            seen.errors.append(f"{type(error).__name__}: {error}")
            continue
        seen.answered += 1
        seen.wrong += text != ask.answer


async def _timed(events: AsyncIterator[dict[str, Any]], seen: Seen) -> str:
    last, pieces = time.perf_counter(), []
    async for event in events:
        for choice in event["choices"]:
            if text := choice["delta"].get("content"):
                now = time.perf_counter()
                (seen.between if pieces else seen.first).add(now - last)
                pieces.append(text)
                last = now
        if event.get("usage"):
            seen.tokens += event["usage"]["completion_tokens"]
    return "".join(pieces)


# --- odd clients --------------------------------------------------------------------------------


async def _odd(host: str, port: int, seen: Seen, end: float, options: dict[str, Any]) -> None:
    rng = random.Random(options["seed"])
    asks, clip = options["asks"], Path(options["clip"]).read_bytes()

    async def repeated(name: str, once: Callable[[], Awaitable[None]], pause: float) -> None:
        while True:
            try:
                async with asyncio.timeout(LOST_SECONDS):
                    await once()
                seen.odd[name] += 1
            except Exception as error:
                seen.problems.append(f"{name}: {type(error).__name__}: {error}")
            if time.perf_counter() >= end:
                return
            await asyncio.sleep(pause)

    async def checked(client: Http, ask: Ask) -> None:
        text = await _timed(client.stream(ask.body), Seen())
        if ask.answer is not None and text != ask.answer:
            raise ValueError(f"{ask.body}: {text!r}, not {ask.answer!r}")

    def slow() -> Awaitable[None]:
        client = Http(host, port, slow=True)
        return _closing(client, checked(client, rng.choice(asks)))

    def extreme() -> Awaitable[None]:
        client = Http(host, port)
        return _closing(client, checked(client, rng.choice(options["extreme"])))

    async def leave() -> None:
        client = Http(host, port)
        with contextlib.closing(client):
            async for _ in client.stream(rng.choice(asks).body):
                return

    async def bad() -> None:
        client = Http(host, port)
        kind, body = rng.choice(_bad_uploads(clip, rng))
        with contextlib.closing(client):
            try:
                await client.call("POST", "/v1/videos", body, kind)
            except Refused as error:
                if 400 <= error.status < 500:
                    return
                raise
            raise ValueError(f"accepted: {body[:100]!r}")

    async def equal() -> None:
        # Another content each time: a box that players skip.
        data = clip + (16).to_bytes(4) + b"free" + rng.randbytes(8)
        clients = [Http(host, port) for _ in range(EQUAL_UPLOADS)]
        sent = [c.call("POST", "/v1/videos", *_form(data)[::-1]) for c in clients]
        videos = await asyncio.gather(*sent)
        ids = {video["id"] for video in videos if not video["cached"]}
        if len(ids) != 1:
            raise ValueError(f"{EQUAL_UPLOADS} equal uploads became {len(ids)} jobs")
        video = await _internalized(clients[0], videos[0])
        await clients[0].call("DELETE", f"/v1/videos/{video['adapter_id']}")
        for client in clients:
            client.close()

    async def large() -> None:
        """One clip of 8K in the middle."""
        await asyncio.sleep((end - time.perf_counter()) / 3)
        client, start = Http(host, port), time.perf_counter()
        data = await asyncio.to_thread(Path(options["large"]).read_bytes)
        try:
            async with asyncio.timeout(LARGE_SECONDS):
                video = await client.call("POST", "/v1/videos", *_form(data)[::-1])
                await _internalized(client, video)
            seen.clip = {"seconds": time.perf_counter() - start, "bytes": len(data)}
        except Exception as error:
            seen.problems.append(f"8K: {type(error).__name__}: {error}")

    await asyncio.gather(
        *(repeated("slow readers", slow, 0.0) for _ in range(SLOW_READERS)),
        *(repeated("extreme parameters", extreme, 0.0) for _ in range(EXTREME_CLIENTS)),
        *(repeated("answers left", leave, 0.1) for _ in range(LEAVING_CLIENTS)),
        repeated("bad uploads", bad, BAD_PAUSE),
        repeated("equal uploads", equal, EQUAL_PAUSE),
        large(),
    )


async def _closing(client: Http, task: Awaitable[None]) -> None:
    with contextlib.closing(client):
        await task


async def _internalized(client: Http, video: dict[str, Any]) -> dict[str, Any]:
    while video["status"] not in ("completed", "failed"):
        await asyncio.sleep(0.1)
        video = await client.call("GET", f"/v1/videos/{video['id']}")
    if video["status"] == "failed":
        raise ValueError(f"failed: {video['error']}")
    return video


def _form(data: bytes, name: str = "file", fields: bytes = b"") -> tuple[str, bytes]:
    """Content type and body of an upload."""
    head = f'--b\r\nContent-Disposition: form-data; name="{name}"; filename="a.mp4"\r\n\r\n'
    return "multipart/form-data; boundary=b", fields + head.encode() + data + b"\r\n--b--\r\n"


def _bad_uploads(clip: bytes, rng: random.Random) -> list[tuple[str, bytes]]:
    frames = b'--b\r\nContent-Disposition: form-data; name="max_frames"\r\n\r\n0\r\n'
    return [
        _form(b""),
        _form(rng.randbytes(1000)),
        _form(clip[: len(clip) * 2 // 3]),
        _form(clip, "video"),
        _form(clip, fields=frames),
        ("multipart/form-data; boundary=b", b"no form"),
        ("application/json", b'{"path": "/etc/passwd"}'),
        ("application/json", b'{"path": "\\ud800"}'),
        ("video/mp4", clip),
    ]
