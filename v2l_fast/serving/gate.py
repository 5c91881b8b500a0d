"""Limits of the server, and the checks of a request that need only its headers.

Host, origin, key, content type and length are checked before the body is read. Bodies that pass are
bounded in size and in the time a client may stay silent. A response to a body that was not read
closes its connection.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastapi.security import HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from v2l_fast.errors import ConfigError
from v2l_fast.files import read_text
from v2l_fast.serving.http import ApiError, error_response, printable
from v2l_fast.video import Limits

UPLOAD_PATH = "/v1/videos"
CHAT_PATH = "/v1/chat/completions"
JSON_TYPE, FORM_TYPE = "application/json", "multipart/form-data"
_CONTENT_TYPES = {CHAT_PATH: (JSON_TYPE,), UPLOAD_PATH: (FORM_TYPE, JSON_TYPE)}
# Every other path needs the key, if the server has one.
_PUBLIC = ("/", "/health", "/docs", "/docs/oauth2-redirect", "/openapi.json")
_PUBLIC_FOLDER = "/static-offline-docs/"
# Boundaries, part headers and the fields other than the file.
_FORM_OVERHEAD = 64 << 10
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{0,5})?", re.IGNORECASE)
# Declares the key in the OpenAPI document; :class:`Gate` checks it.
api_key_scheme = HTTPBearer(
    auto_error=False, description="The server's API key, if it requires one."
)


@dataclass(frozen=True)
class ServerLimits:
    """Upper bounds; a request that exceeds one is refused with a 4xx that names it.

    Attributes:
        upload_bytes: size of an uploaded video.
        body_bytes: size of any other request body, apart from the videos and images in messages.
        media_bytes: size of the videos and images in one request's messages, together.
        media_seconds: time for downloading one of them.
        duration: length of a video in seconds.
        pixels: width x height of a frame.
        frames: frames sampled from one video.
        longest_edge: size in pixels to which frames may be resized.
        new_tokens: tokens of one answer.
        uploads: files received, or hashed in place, at the same time; further ones wait.
        uploads_waiting: files that may wait for that; further ones get 503.
        jobs: videos waiting or being internalized; further ones get 503.
        kept_video_bytes: uploaded videos kept for questions with the video in context; the least
            recently used are removed first.
        answer_seconds: time for one answer.
        probe_seconds: time for examining one video before it is accepted.
        decode_seconds: time for decoding the frames of one video.
        decode_bytes: memory that a process may take to examine or decode one video on the CPU.
        idle_seconds: longest silence of a client that is sending a body.
        connections: clients connected at the same time; further ones get 503.
        head_seconds: time for a request's line and headers, from its connection or first byte.
        keep_alive_seconds: how long a connection stays open after a response.
        stalled_seconds: how long a client may read nothing of a response.
    """

    upload_bytes: int = 1 << 30
    body_bytes: int = 1 << 20
    media_bytes: int = 64 << 20
    media_seconds: float = 30.0
    duration: float = 2 * 3600.0
    pixels: int = 7680 * 4320
    frames: int = 1024
    longest_edge: int = 2048
    new_tokens: int = 1024
    uploads: int = 64
    uploads_waiting: int = 256
    jobs: int = 64
    kept_video_bytes: int = 20 << 30
    answer_seconds: float = 300.0
    probe_seconds: float = 60.0
    decode_seconds: float = 600.0
    decode_bytes: int = 8 << 30
    idle_seconds: float = 30.0
    connections: int = 4096
    head_seconds: float = 10.0
    keep_alive_seconds: float = 5.0
    stalled_seconds: float = 60.0

    @property
    def chat_bytes(self) -> int:
        """Size of a chat request: its videos and images are base64."""
        return self.body_bytes + self.media_bytes * 4 // 3

    @property
    def probing(self) -> Limits:
        """The bounds for examining a video file."""
        return Limits(
            max_pixels=self.pixels,
            max_duration=self.duration,
            max_frames=self.frames,
            max_seconds=self.probe_seconds,
        )

    @property
    def decoding(self) -> Limits:
        """The bounds for decoding one. Frames take a quarter of the memory: they are copied once,
        and decoders hold some."""
        return replace(
            self.probing, max_seconds=self.decode_seconds, max_bytes=self.decode_bytes // 4
        )


class ApiKeys:
    """The accepted API keys. An empty list accepts every caller."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [key.encode() for key in keys]

    @classmethod
    def read(cls, key: str | None, file: Path | None) -> ApiKeys:
        """A key, and those of a file with one key per line.

        Raises:
            ConfigError: the file cannot be read or contains no key, or a key is malformed.
        """
        keys = [] if key is None else [key]
        if file is not None:
            text = read_text(file, 2**20, ConfigError, missing="write one key per line to it")
            lines = [line.strip() for line in text.splitlines()]
            keys += [line for line in lines if line and not line.startswith("#")]
            if not keys:
                raise ConfigError(f"{file}: contains no key; write one key per line")
        if any(not key.isascii() or not key.isprintable() or " " in key for key in keys):
            raise ConfigError("an API key must be printable ASCII characters without spaces")
        return cls(keys)

    @property
    def required(self) -> bool:
        """Whether callers must send a key."""
        return bool(self._keys)

    def verify(self, authorization: str | None) -> bool:
        """Whether an ``Authorization`` header, decoded as latin-1, grants access.

        Every key is compared, in constant time.
        """
        if not self._keys:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        matches = [hmac.compare_digest(key.encode("latin-1"), valid) for valid in self._keys]
        return scheme.lower() == "bearer" and any(matches)


class AllowedHosts:
    """Names under which the server may be reached.

    A page of another site must not use the server of the person who views it: neither by posting a
    form (its ``Origin`` is the page's) nor through a domain name that resolves to this machine (its
    ``Host`` is the page's). Localhost and loopback addresses are always allowed, on any port.

    Args:
        names: further host names and addresses.
        bound: the address the server listens on. A wildcard such as 0.0.0.0 allows every address
            as ``Host``, because only names can be rebound.

    Raises:
        ConfigError: a name is not a host name or address.
    """

    def __init__(self, names: Sequence[str] = (), bound: str = "127.0.0.1") -> None:
        address = _address(bound)
        self._any_address = address is not None and address.is_unspecified
        self._names = {_host(_bracketed(bound))}
        self._names.update(host_name(name, "--allowed-host") for name in names)

    def refusal(self, method: str, headers: Headers) -> ApiError | None:
        """The error for a request whose ``Host`` or ``Origin`` is not allowed."""
        authority = headers.get("host")
        if authority is not None:
            host = _host(authority)
            literal = self._any_address and host is not None and _address(host) is not None
            if not literal and not self._allows(host):
                return _not_allowed(421, "Host", authority, host)
        for origin in headers.getlist("origin"):
            if origin == "null":
                if method not in _SAFE_METHODS:
                    return ApiError(
                        403,
                        "Origin is 'null': a page without an origin (a local file, a sandboxed "
                        "frame) may only read",
                        "origin_not_allowed",
                    )
                continue
            _, _, sender = origin.partition("://")
            same = authority is not None and sender.lower() == authority.lower()
            host = _host(sender)
            if not same and not self._allows(host):
                return _not_allowed(403, "Origin", origin, host)
        return None

    def _allows(self, host: str | None) -> bool:
        if host is None:
            return False
        address = _address(host)
        if address is not None:
            address = getattr(address, "ipv4_mapped", None) or address
            return address.is_loopback or host in self._names
        return host in self._names or host == "localhost" or host.endswith(".localhost")


def host_name(name: str, option: str) -> str:
    """A host name or address of an option, in lower case; IPv6 in brackets.

    Raises:
        ConfigError: it is something else, such as a URL.
    """
    host = _host(_bracketed(name))
    if host is None or host != _bracketed(name).lower().rstrip("."):
        raise ConfigError(
            f"{option} must be a host name or address without scheme and port, such as "
            f"example.com, got {name!r}"
        )
    return host


def _bracketed(name: str) -> str:
    return f"[{name}]" if name.count(":") > 1 and not name.startswith("[") else name


def _host(authority: str) -> str | None:
    """The host of ``host[:port]`` in lower case; None if it is malformed."""
    match = _AUTHORITY.fullmatch(authority)
    return None if match is None else match[1].lower().rstrip(".")


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def _not_allowed(status: int, header: str, value: str, host: str | None) -> ApiError:
    remedy = "" if host is None else f"; start the server with --allowed-host {host[:200]}"
    return ApiError(
        status,
        f"{header} {printable(value)!r} is not allowed{remedy}",
        f"{header.lower()}_not_allowed",
    )


class Gate:
    """ASGI middleware in front of everything that reads a body.

    Args:
        limits: limits of bodies and of the time a client may stay silent.
    """

    def __init__(
        self, app: ASGIApp, hosts: AllowedHosts, keys: ApiKeys, limits: ServerLimits
    ) -> None:
        self._app, self._hosts, self._keys, self._limits = app, hosts, keys, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        complete = "transfer-encoding" not in headers and headers.get("content-length", "0") == "0"
        received, limit, idle = 0, self._body_limit(scope, headers), self._limits.idle_seconds

        async def bounded_receive() -> Message:
            nonlocal received, complete
            if complete:
                # The only message that can follow is that the client disconnected.
                return await receive()
            try:
                async with asyncio.timeout(idle):
                    message = await receive()
            except TimeoutError:
                reason = f"the client sent nothing for {idle:g} s; send the request again"
                raise ApiError(408, reason, "timeout") from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > limit:
                raise _too_large(limit)
            return message

        async def closing_send(message: Message) -> None:
            if message["type"] == "http.response.start" and not complete:
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        error = self._refusal(scope, headers, limit)
        if error is not None:
            await error_response(error)(scope, receive, closing_send)
            return
        inner = scope
        if scope["method"] == "HEAD":
            # Answered as GET; the protocol leaves out the body.
            inner = {**scope, "method": "GET"}
        await self._app(inner, bounded_receive, closing_send)
        scope["route"] = inner.get("route")

    def _body_limit(self, scope: Scope, headers: Headers) -> int:
        if scope["path"] == UPLOAD_PATH and content_type(headers) == FORM_TYPE:
            return self._limits.upload_bytes + _FORM_OVERHEAD
        if scope["path"] == CHAT_PATH:
            return self._limits.chat_bytes
        return self._limits.body_bytes

    def _refusal(self, scope: Scope, headers: Headers, limit: int) -> ApiError | None:
        method, path = scope["method"], scope["path"]
        error = self._hosts.refusal(method, headers)
        if error is not None:
            return error
        public = path in _PUBLIC or path.startswith(_PUBLIC_FOLDER)
        if not public and not self._keys.verify(headers.get("authorization")):
            message = "the API key is missing or wrong; send Authorization: Bearer KEY"
            return ApiError(401, message, "invalid_api_key")
        types = _CONTENT_TYPES.get(path)
        if method == "POST" and types is not None and content_type(headers) not in types:
            sent = printable(content_type(headers))
            return ApiError(
                415,
                f"Content-Type must be {' or '.join(types)}, got {repr(sent) if sent else 'none'}",
                "unsupported_content_type",
            )
        if int(headers.get("content-length", "0")) > limit:
            return _too_large(limit)
        return None


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the request body is larger than {limit} bytes", "too_large")


def content_type(headers: Headers) -> str:
    """The media type of a body in lower case, without parameters."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()
