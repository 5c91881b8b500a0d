"""Clients of ``bench.runs.serve``, in processes of their own: what a user of the server sees.

Ordinary clients ask without pause, most over plain sockets and some with OpenAI's client, and
compare every answer. Odd clients read slowly, send extreme parameters or invalid videos, leave in
the middle, send one file many times, and send one 8K clip. Nothing here imports the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import numpy as np

# An answer that takes longer counts as lost.
LOST_SECONDS, LARGE_SECONDS = 120.0, 900.0
SLOW_READERS, EXTREME_CLIENTS, LEAVING_CLIENTS = 4, 4, 2
# Pause of a slow reader after each event, and its receive buffer, smaller than an answer.
SLOW_PAUSE, SLOW_BUFFER = 0.25, 2048
BAD_PAUSE = 0.25
EQUAL_UPLOADS, EQUAL_PAUSE = 10, 5.0
CHAT, VIDEOS = "/v1/chat/completions", "/v1/videos"

Event = dict[str, Any]


class Latencies:
    """A histogram of seconds in bins 1% wide, from a microsecond to twenty minutes.

    Its memory does not grow with the length of the run.
    """

    LEAST, RATIO, BINS = 1e-6, 1.01, 2100

    def __init__(self) -> None:
        self.counts = np.zeros(self.BINS, dtype=np.int64)

    def add(self, seconds: float) -> None:
        index = math.log(max(seconds, self.LEAST) / self.LEAST) / math.log(self.RATIO)
        self.counts[min(int(index), self.BINS - 1)] += 1

    def percentile(self, share: float) -> float:
        """Upper edge of the bin below which a ``share`` (0 to 1) of all values lies."""
        if not self.counts.any():
            return 0.0
        index = int(np.searchsorted(self.counts.cumsum(), share * self.counts.sum()))
        return self.LEAST * self.RATIO ** (index + 1)

    def summary(self) -> dict[str, float]:
        """Count and percentiles in seconds."""
        shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
        percentiles = {name: self.percentile(share) for name, share in shares.items()}
        return {"count": int(self.counts.sum()), **percentiles}


@dataclass(frozen=True)
class CheckedRequest:
    """The body of a request and its right answer; None if any answer will do."""

    body: dict[str, Any]
    answer: str | None


@dataclass
class Observations:
    """What the clients of one process saw."""

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


class StreamConnection:
    """A kept-alive HTTP/1.1 connection for streamed answers, with little work for each token."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._writer: asyncio.StreamWriter | None = None

    def close(self) -> None:
        """Close the connection, also in the middle of an answer."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    async def events(self, body: dict[str, Any]) -> AsyncIterator[Event]:
        """The events of a streamed answer as they arrive."""
        complete = False
        try:
            if self._writer is None:
                self._reader, self._writer = await asyncio.open_connection(*self._address)
            content = json.dumps(body).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            self._writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            status = int((await self._reader.readline()).split()[1])
            while (await self._reader.readline()).strip():
                pass
            if status != 200:
                raise ConnectionError(f"status {status}")
            pending = b""
            while size := int(await self._reader.readline(), 16):
                pending += (await self._reader.readexactly(size + 2))[:-2]
                *events, pending = pending.split(b"\n\n")
                for event in events:
                    if (parsed := _event(event.decode())) is not None:
                        yield parsed
            await self._reader.readline()
            complete = True
        finally:
            if not complete:
                # The rest of this answer must not be read as the next one.
                self.close()


def _event(line: str) -> Event | None:
    """The content of a server-sent event; None for the end and for blank lines."""
    if line.startswith('data: {"error"'):
        raise ConnectionError(line)
    return json.loads(line[6:]) if line.startswith("data: {") else None


def work(
    connection: Connection, ordinary: bool, url: tuple[str, int], options: dict[str, Any]
) -> None:
    """The main function of a client process: runs its clients and sends what they saw."""
    if options.get("official"):
        # The import takes seconds that are not the server's.
        import openai  # noqa: F401
    connection.send("ready")
    connection.recv()
    seen = Observations()
    run = _ordinary if ordinary else _odd
    start = time.perf_counter()
    asyncio.run(run(*url, seen, start + options["seconds"], options))
    seen.seconds = time.perf_counter() - start
    connection.send(seen)


# --- ordinary clients ---------------------------------------------------------------------------


async def _ordinary(
    host: str, port: int, seen: Observations, end: float, options: dict[str, Any]
) -> None:
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
                events = _official(official)
            else:
                events = StreamConnection(host, port).events
            clients.append(_ask_repeatedly(events, rng, options["requests"], seen, end))
        await asyncio.gather(*clients)


def _official(client: Any) -> Callable[[dict[str, Any]], AsyncIterator[Event]]:
    async def events(body: dict[str, Any]) -> AsyncIterator[Event]:
        extra = {name: body[name] for name in ("video_ids",) if name in body}
        known = {name: value for name, value in body.items() if name not in extra}
        async for chunk in await client.chat.completions.create(**known, extra_body=extra):
            yield chunk.model_dump()

    return events


async def _ask_repeatedly(
    events: Callable[[dict[str, Any]], AsyncIterator[Event]],
    rng: random.Random,
    requests: list[CheckedRequest],
    seen: Observations,
    end: float,
) -> None:
    # At least once, however short the run.
    while not seen.started or time.perf_counter() < end:
        request = rng.choice(requests)
        seen.started += 1
        try:
            async with asyncio.timeout(LOST_SECONDS):
                text = await _timed_text(events(request.body), seen)
        except Exception as error:
            seen.errors.append(f"{type(error).__name__}: {error}")
            continue
        seen.answered += 1
        seen.wrong += text != request.answer


async def _timed_text(events: AsyncIterator[Event], seen: Observations) -> str:
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


async def _odd(
    host: str, port: int, seen: Observations, end: float, options: dict[str, Any]
) -> None:
    rng = random.Random(options["seed"])
    requests, clip = options["requests"], Path(options["clip"]).read_bytes()

    def http(**transport: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=f"http://{host}:{port}",
            timeout=LARGE_SECONDS,
            transport=httpx.AsyncHTTPTransport(**transport),
        )

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

    async def check(request: CheckedRequest, events: AsyncIterator[Event]) -> None:
        text = await _timed_text(events, Observations())
        if request.answer is not None and text != request.answer:
            raise ValueError(f"{request.body}: {text!r}, not {request.answer!r}")

    async def slow() -> None:
        request = rng.choice(requests)
        small = [(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_BUFFER)]
        async with (
            http(socket_options=small) as client,
            client.stream("POST", CHAT, json=request.body) as response,
        ):
            response.raise_for_status()

            async def events() -> AsyncIterator[Event]:
                async for line in response.aiter_lines():
                    if (event := _event(line)) is not None:
                        yield event
                        await asyncio.sleep(SLOW_PAUSE)

            await check(request, events())

    async def extreme() -> None:
        request = rng.choice(options["extreme"])
        with contextlib.closing(StreamConnection(host, port)) as client:
            await check(request, client.events(request.body))

    async def leave() -> None:
        with contextlib.closing(StreamConnection(host, port)) as client:
            async for _ in client.events(rng.choice(requests).body):
                return

    async def bad() -> None:
        async with http() as client:
            upload = rng.choice(_bad_uploads(clip, rng))
            response = await client.post(VIDEOS, **upload)
            if not response.is_client_error:
                raise ValueError(f"status {response.status_code}: {str(upload)[:100]}")

    async def equal() -> None:
        # New content each time: a box that players skip.
        data = clip + (16).to_bytes(4) + b"free" + rng.randbytes(8)
        async with http() as client:
            sent = [_upload(client, data) for _ in range(EQUAL_UPLOADS)]
            videos = await asyncio.gather(*sent)
            ids = {video["id"] for video in videos if not video["cached"]}
            if len(ids) != 1:
                raise ValueError(f"{EQUAL_UPLOADS} equal uploads became {len(ids)} jobs")
            video = await _finished(client, videos[0])
            response = await client.delete(f"{VIDEOS}/{video['adapter_id']}")
            response.raise_for_status()

    async def large() -> None:
        """One 8K clip a third into the run."""
        await asyncio.sleep((end - time.perf_counter()) / 3)
        start = time.perf_counter()
        data = await asyncio.to_thread(Path(options["large"]).read_bytes)
        try:
            async with asyncio.timeout(LARGE_SECONDS), http() as client:
                await _finished(client, await _upload(client, data))
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


async def _upload(client: httpx.AsyncClient, data: bytes) -> dict[str, Any]:
    response = await client.post(VIDEOS, files={"file": ("a.mp4", data)})
    return response.raise_for_status().json()


async def _finished(client: httpx.AsyncClient, video: dict[str, Any]) -> dict[str, Any]:
    while video["status"] not in ("completed", "failed"):
        await asyncio.sleep(0.1)
        response = await client.get(f"{VIDEOS}/{video['id']}")
        video = response.raise_for_status().json()
    if video["status"] == "failed":
        raise ValueError(f"failed: {video['error']}")
    return video


def _bad_uploads(clip: bytes, rng: random.Random) -> list[dict[str, Any]]:
    """Arguments of requests that the server must refuse."""

    def form(data: bytes, name: str = "file", **fields: str) -> dict[str, Any]:
        return {"files": {name: ("a.mp4", data)}, "data": fields}

    def content(kind: str, data: bytes) -> dict[str, Any]:
        return {"content": data, "headers": {"Content-Type": kind}}

    return [
        form(b""),
        form(rng.randbytes(1000)),
        form(clip[: len(clip) * 2 // 3]),
        form(clip, "video"),
        form(clip, max_frames="0"),
        content("multipart/form-data; boundary=b", b"no form"),
        content("application/json", b'{"path": "/etc/passwd"}'),
        content("application/json", b'{"path": "\\ud800"}'),
        content("video/mp4", clip),
    ]
