"""Videos and images in chat messages: ``data:`` URLs, and http(s) URLs that the operator allows.

Every part becomes an adapter of the store, which is looked up by the hash of its content. A URL is
requested with the validators of its last response: a file that has not changed is not downloaded
again, and a changed one never gets answers from its old adapter.

A URL names a machine that the caller chooses and the server reaches, so every connection goes to an
address that was checked just before. The check is part of connecting: neither a redirect nor a name
that resolves differently the second time circumvents it.
"""

from __future__ import annotations

import asyncio
import binascii
import os
import re
import socket
import ssl
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import httpcore
from starlette.concurrency import run_in_threadpool

import v2l_fast
from v2l_fast.errors import VideoError
from v2l_fast.files import file_sha256
from v2l_fast.serving.gate import MediaSources
from v2l_fast.serving.http import ApiError, printable
from v2l_fast.serving.jobs import Admission, Job
from v2l_fast.serving.sandbox import image_format
from v2l_fast.serving.schemas import (
    MAX_COMPOSED,
    ChatRequest,
    InternalizeOptions,
    MediaPart,
    ServerLimits,
)
from v2l_fast.serving.server import Server
from v2l_fast.serving.videos import WRITE_BYTES, HashedFile, ReceivedVideo
from v2l_fast.store.adapter_store import StoreError
from v2l_fast.store.folder import StoredAdapter

# Takes a piece of a file.
Write = Callable[[bytes], Awaitable[object]]

# Downloads at the same time.
_DOWNLOADS = 8
_REDIRECTS = 3
_REDIRECT_STATUSES = (301, 302, 303, 307, 308)
# URLs whose validators are remembered.
_REMEMBERED_URLS = 1024
_MAX_URL = 8192
# Characters of base64 decoded at a time; a multiple of 4.
_SLICE = 1 << 20
_DATA = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w-]+=[\w.+-]*)*)(;base64)?,", re.IGNORECASE)
# Sampled frames as vLLM's clients send them: JPEG files, separated by commas.
_FRAMES_TYPE = "video/jpeg"
_MEDIA_TYPES = ("video/", "image/", "application/octet-stream")


class MediaError(Exception):
    """A URL cannot be used; the message is for the caller and names no address."""


class _CheckedBackend(httpcore.AsyncNetworkBackend):
    """Resolves a name once, checks every address of it, and connects to one of these addresses."""

    def __init__(self, sources: MediaSources) -> None:
        self._sources = sources
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        loop = asyncio.get_running_loop()
        try:
            entries = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise MediaError("the URL's host has no address") from None
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in entries))
        if not addresses or not all(map(self._sources.allows_address, addresses)):
            raise MediaError("the URL's host has an address that this server may not reach")
        for address in addresses:
            try:
                return await self._inner.connect_tcp(
                    address, port, timeout, local_address, socket_options
                )
            except httpcore.ConnectError as error:
                failure = error
        raise failure


@dataclass(frozen=True)
class Validators:
    """Identifiers of the version of a URL's content (RFC 9110, section 8.8).

    Attributes:
        sha256: hash of the video that was made from it.
        etag, modified: ``ETag`` and ``Last-Modified`` of the response.
    """

    sha256: str
    etag: str | None
    modified: str | None


@dataclass(frozen=True)
class Download:
    """The result of a download: whether the content has changed, and its validators if so."""

    changed: bool
    etag: str | None = None
    modified: str | None = None


class MediaDownloader:
    """Reads http(s) URLs within limits of size, time, redirects and addresses."""

    def __init__(self, sources: MediaSources, limits: ServerLimits) -> None:
        self._sources, self._limits = sources, limits
        self._tls = ssl.create_default_context()
        self._running = asyncio.Semaphore(_DOWNLOADS)

    async def download(
        self, url: str, write: Write, previous: Validators | None = None
    ) -> Download:
        """Pass the content of a URL to ``write``, in pieces.

        Args:
            previous: validators of the previous response; nothing is written if the content is
                still the same.

        Raises:
            MediaError: the URL is not allowed, cannot be read or exceeds a limit.
        """
        seconds = self._limits.media_seconds
        try:
            async with self._running, asyncio.timeout(seconds):
                return await self._follow(url, write, previous)
        except TimeoutError:
            raise MediaError(f"the download takes more than {seconds:g} s") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError):
            # The error must not reveal whether a port is closed or filtered.
            raise MediaError("the URL cannot be downloaded") from None

    async def _follow(self, url: str, write: Write, previous: Validators | None) -> Download:
        # A new pool: a connection that another request opened was checked for another name.
        backend = _CheckedBackend(self._sources)
        async with httpcore.AsyncConnectionPool(self._tls, network_backend=backend) as pool:
            for _ in range(_REDIRECTS + 1):
                self._check(url)
                async with pool.stream("GET", _ascii(url), headers=_headers(previous)) as response:
                    target = _header(response, b"location")
                    if response.status in _REDIRECT_STATUSES and target is not None:
                        url = urljoin(url, target)
                        continue
                    return await self._read(response, write, previous)
        raise MediaError(f"the URL redirects more than {_REDIRECTS} times")

    async def _read(
        self,
        response: httpcore.Response,
        write: Write,
        previous: Validators | None,
    ) -> Download:
        if response.status == 304 and previous is not None:
            return Download(changed=False)
        if response.status != 200:
            raise MediaError(f"the URL's server responds with status {response.status}")
        if (_header(response, b"content-encoding") or "identity").lower() != "identity":
            raise MediaError("the URL's server compresses the response; serve the file as it is")
        limit, length = self._limits.media_bytes, _header(response, b"content-length") or "0"
        received = int(length) if length.isdigit() else 0
        if received <= limit:
            received, pending = 0, bytearray()
            async for piece in response.aiter_stream():
                received += len(piece)
                if received > limit:
                    break
                pending += piece
                if len(pending) >= WRITE_BYTES:
                    await write(bytes(pending))
                    pending.clear()
            await write(bytes(pending))
        if received > limit:
            raise MediaError(f"the file is larger than {limit} bytes")
        return Download(True, _header(response, b"etag"), _header(response, b"last-modified"))

    def _check(self, url: str) -> None:
        """Raise MediaError unless the URL may be connected to."""
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            raise MediaError("the URL is malformed") from None
        if len(url) > _MAX_URL or any(c <= " " or c == "\x7f" for c in url):
            raise MediaError("the URL is malformed")
        if parts.scheme.lower() not in ("http", "https") or host is None:
            raise MediaError("the URL must begin with data:, http://HOST or https://HOST")
        if parts.username is not None or parts.password is not None:
            raise MediaError("the URL must not contain a user name or password")
        if not self._sources.enabled:
            raise MediaError(
                "this server downloads no URLs; send the file as a data: URL, or upload it to "
                "POST /v1/videos"
            )
        if not self._sources.allows_host(host):
            raise MediaError("the URL's host is not one that this server downloads from")


def _headers(previous: Validators | None) -> list[tuple[bytes, bytes]]:
    headers = [
        (b"User-Agent", f"v2l_fast/{v2l_fast.__version__}".encode()),
        (b"Accept", b"video/*, image/*, */*;q=0.1"),
        # Compressed content could expand beyond any limit.
        (b"Accept-Encoding", b"identity"),
    ]
    if previous is not None and previous.etag is not None:
        headers.append((b"If-None-Match", previous.etag.encode("latin-1")))
    elif previous is not None and previous.modified is not None:
        headers.append((b"If-Modified-Since", previous.modified.encode("latin-1")))
    return headers


def _header(response: httpcore.Response, name: bytes) -> str | None:
    value = next((v for key, v in response.headers if key.lower() == name), None)
    return None if value is None else value.decode("latin-1")


def _ascii(url: str) -> str:
    """A URL with its host in IDNA and every other character beyond ASCII percent-encoded."""
    parts = urlsplit(url)
    try:
        host = (parts.hostname or "").encode("idna").decode()
    except UnicodeError:
        raise MediaError("the URL is malformed") from None
    host = f"[{host}]" if ":" in host else host
    netloc = host if parts.port is None else f"{host}:{parts.port}"
    path = "".join(c if c.isascii() else "".join(f"%{b:02X}" for b in c.encode()) for c in
                   parts.path + (f"?{parts.query}" if parts.query else ""))  # fmt: skip
    return f"{parts.scheme}://{netloc}{path or '/'}"


# --- parts of a request ---------------------------------------------------------------------------


class MediaInbox:
    """Turns the videos and images of chat requests into adapters; used by one event loop.

    Args:
        admission: of the server's videos; parts count as uploads.
        sources: hosts and networks that URLs may lead to.
    """

    def __init__(self, server: Server, admission: Admission, sources: MediaSources) -> None:
        self._server, self._admission = server, admission
        self._limits = server.limits
        self._downloader = MediaDownloader(sources, server.limits)
        self._validators: OrderedDict[tuple[str, str], Validators] = OrderedDict()

    async def internalize(self, chat: ChatRequest) -> ChatRequest:
        """The request with the adapters of its videos and images as further ``video_ids``.

        The URLs are removed from it: they may be large. If the caller leaves or an error occurs,
        the jobs that no other request waits for are cancelled.

        Raises:
            ApiError: a part cannot be used.
            V2LError: internalizing a part failed.
        """
        parts = [
            (f"messages.{i}.content.{j}", part)
            for i, message in enumerate(chat.messages)
            for j, part in message.media.items()
        ]
        if sum(len(message.text) for message in chat.messages) > self._limits.body_bytes:
            message = f"the text of the messages is larger than {self._limits.body_bytes} bytes"
            raise ApiError(413, message, "too_large", "messages")
        if not parts:
            return chat
        if chat.model != self._server.name:
            message = (
                f"{parts[0][0]} is a video or image: messages to an adapter have only text parts, "
                f"so model must be {self._server.name}"
            )
            raise ApiError(400, message, "invalid_value", "model")
        if len(parts) > MAX_COMPOSED:
            message = f"at most {MAX_COMPOSED} videos and images are composed, got {len(parts)}"
            raise ApiError(400, message, "invalid_value", "messages")
        video = chat.media_io_kwargs and chat.media_io_kwargs.video
        options = InternalizeOptions(max_frames=video.num_frames if video else None)
        jobs: list[Job | StoredAdapter] = []
        try:
            for name, part in parts:
                try:
                    jobs.append(await self._receive(part, options))
                except (MediaError, VideoError) as error:
                    raise _refusal(name, part, error) from None
            ids = [
                await self._adapter_id(job, name, part)
                for job, (name, part) in zip(jobs, parts, strict=True)
            ]
        except BaseException:
            running = [job for job in jobs if isinstance(job, Job)]
            loop = asyncio.get_running_loop()
            loop.run_in_executor(None, lambda: [self._server.jobs.withdraw(j) for j in running])
            raise
        return chat.model_copy(update={"video_ids": [*(chat.video_ids or ()), *ids]})

    async def _adapter_id(self, job: Job | StoredAdapter, name: str, part: MediaPart) -> str:
        if isinstance(job, StoredAdapter):
            return job.id
        await job.work.ended()
        if job.work.adapter_id is not None:
            return job.work.adapter_id
        if isinstance(job.work.error, VideoError):
            raise _refusal(name, part, job.work.error)
        if job.work.state == "failed" and job.work.error is not None:
            raise job.work.error
        raise ApiError(409, "internalizing this video was cancelled", "video_cancelled", name)

    async def _receive(self, part: MediaPart, options: InternalizeOptions) -> Job | StoredAdapter:
        url, part.where.url = part.where.url, ""
        path = self._server.store.staging.new_path()
        try:
            if url[:5].lower() != "data:":
                return await self._download(url, part.kind, path, options)
            async with self._admission.receiving(len(url)):
                video = await run_in_threadpool(self._decode, url, part.kind, path)
            return await self._admission.start(video, options)
        finally:
            self._server.store.staging.remove(path)

    def _decode(self, url: str, kind: str, path: Path) -> ReceivedVideo:
        """Write the content of a ``data:`` URL to ``path``."""
        head = _DATA.match(url, 0, 1024)
        if head is None or head[3] is None:
            raise MediaError("a data: URL must have the form data:video/mp4;base64,...")
        media_type = (head[1] or "").lower()
        if not media_type.startswith(_MEDIA_TYPES):
            raise MediaError(
                f"the data: URL has the type {printable(media_type) or 'text/plain'}, which is "
                "neither a video nor an image"
            )
        if (len(url) - head.end()) // 4 * 3 > self._limits.media_bytes + 2:
            raise MediaError(f"the file is larger than {self._limits.media_bytes} bytes")
        frames = media_type == _FRAMES_TYPE
        ranges = _fields(url, head.end()) if frames else [(head.end(), len(url))]
        ends: list[int] = []
        try:
            with HashedFile(path) as file:
                for start, end in ranges:
                    _write_base64(url, start, end, file)
                    ends.append(file.tell())
        except OSError as error:
            raise _not_written(path, error) from None
        return self._as_video(path, file.sha256, kind, ends, frames)

    def _as_video(
        self, path: Path, sha256: str, name: str, ends: Sequence[int], frames: bool = False
    ) -> ReceivedVideo:
        """A received file as a video: images become the frames of one, at one a second.

        Equal images give equal bytes, so the store finds their adapter, too.
        """
        with open(path, "rb") as file:
            head = file.read(12)
        if not frames and image_format(head) is None:
            return ReceivedVideo(sha256, path, name)
        target = self._server.store.staging.new_path()
        try:
            self._server.reader.write_frames(path, ends, target)
            os.replace(target, path)
        except OSError as error:
            raise _not_written(path, error) from None
        finally:
            self._server.store.staging.remove(target)
        return ReceivedVideo(file_sha256(path), path, name)

    async def _download(
        self, url: str, kind: str, path: Path, options: InternalizeOptions
    ) -> Job | StoredAdapter:
        previous, stored = self._validators.get((kind, url)), None
        if previous is not None:
            stored = await run_in_threadpool(self._server.jobs.find, previous.sha256, options)
        async with self._admission.receiving(self._limits.media_bytes):
            with HashedFile(path) as file:

                async def write(piece: bytes) -> None:
                    try:
                        await run_in_threadpool(file.write, piece)
                    except OSError as error:
                        raise _not_written(path, error) from None

                download = await self._downloader.download(
                    url, write, None if stored is None else previous
                )
            if stored is not None and not download.changed:
                self._server.metrics.count_video("cached", {})
                return stored
            name, size = unquote(urlsplit(url).path) or kind, path.stat().st_size
            video = await run_in_threadpool(self._as_video, path, file.sha256, name, [size])
        if download.etag is not None or download.modified is not None:
            validators = Validators(video.sha256, download.etag, download.modified)
            self._validators[kind, url] = validators
            self._validators.move_to_end((kind, url))
            while len(self._validators) > _REMEMBERED_URLS:
                self._validators.popitem(last=False)
        return await self._admission.start(video, options)


def _not_written(path: Path, error: OSError) -> StoreError:
    return StoreError(f"{path.parent}: the file was not written ({error.strerror})")


def _fields(text: str, start: int) -> Iterator[tuple[int, int]]:
    """Where the fields between commas begin and end."""
    while (end := text.find(",", start)) >= 0:
        yield start, end
        start = end + 1
    yield start, len(text)


def _write_base64(text: str, start: int, end: int, file: HashedFile) -> None:
    """Decode base64 in slices: one call for a large file would hold the interpreter's lock."""
    try:
        for first in range(start, end, _SLICE):
            part = text[first : min(first + _SLICE, end)]
            if "=" in part and first + _SLICE < end:
                raise ValueError
            file.write(binascii.a2b_base64(part, strict_mode=True))
    except ValueError:
        raise MediaError("the data: URL is not valid base64") from None


def _refusal(name: str, part: MediaPart, error: Exception) -> ApiError:
    # The reason concerns the caller's file; the path of the server's copy does not.
    reason = str(error)
    path, colon, rest = reason.partition(": ")
    if isinstance(error, VideoError) and colon and "/" in path:
        reason = rest
    return ApiError(400, reason, f"invalid_{part.kind}_url", f"{name}.{part.kind}_url.url")
