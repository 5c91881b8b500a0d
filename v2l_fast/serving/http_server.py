"""uvicorn with bounded connections: their number, their silence, and the delay of small writes.

uvicorn speaks HTTP. Added here are TCP_NODELAY, time limits for connections that send no request or
read no response, a limit on connections below that on file descriptors, and a clean end for
connections whose request was refused before its body arrived.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from functools import partial
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from v2l_fast.errors import ConfigError
from v2l_fast.serving.http import ApiError, error_response
from v2l_fast.serving.limits import ServerLimits
from v2l_fast.serving.monitoring import RateLimitedEvent

# Connections that the kernel completes before they are accepted; asyncio accepts as many at once.
_BACKLOG = 256
# Connections beyond the limit that get a 503; further ones are aborted.
_REFUSED = 32
# Descriptors kept for videos and adapters being read or written, and for processes that decode.
_RESERVED_DESCRIPTORS = 128
_MIN_CONNECTIONS = 16
# How long, and how much of, a refused body is still read so that its sender can read the response.
_LINGER_SECONDS, _LINGER_BYTES = 2.0, 1 << 20


def bind(host: str, port: int) -> socket.socket:
    """Bind an IPv4 or IPv6 address; :func:`http_server` listens on it.

    Raises:
        ConfigError: the address cannot be bound.
    """
    bound = None
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # IPv4 first: "localhost" is 127.0.0.1 to most clients.
        addresses.sort(key=lambda entry: entry[0] != socket.AF_INET)
        family, kind, protocol, _, address = addresses[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        if bound is not None:
            bound.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"--host {host} --port {port}: {reason}; choose another address"
        ) from None
    return bound


def connection_limit(maximum: int) -> int:
    """``maximum``, or fewer connections if this process may not open that many files.

    Raises:
        ConfigError: the limit on open files leaves no room for connections.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        return maximum
    in_use = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 64
    available = allowed - in_use - _RESERVED_DESCRIPTORS - _REFUSED
    if available < _MIN_CONNECTIONS:
        raise ConfigError(
            f"this process may open {allowed} files, which leaves none for connections; "
            "raise the limit (ulimit -n 1024)"
        )
    return min(maximum, available)


def http_server(app: FastAPI, limits: ServerLimits, drain_seconds: float) -> uvicorn.Server:
    """A server for an application of :func:`~v2l_fast.serving.api.create_app`; call its
    ``run([socket])``."""
    return _UvicornServer(
        uvicorn.Config(
            app,
            # uvloop and httptools have rules of their own for what is bounded here.
            loop="asyncio",
            http=partial(_Connection, limits=limits),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=limits.keep_alive_seconds,
            timeout_graceful_shutdown=max(1, round(drain_seconds)),
        )
    )


class _UvicornServer(uvicorn.Server):
    """Rate-limits the log when descriptors run out, and starts the application's drain time when it
    shuts down."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        exhausted = RateLimitedEvent("no file descriptor is left for a connection")

        def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            # asyncio reports each of _BACKLOG attempts every second, with a traceback.
            if "socket.accept()" in context["message"]:
                exhausted.record()
            else:
                loop.default_exception_handler(context)

        asyncio.get_running_loop().set_exception_handler(handle)
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # The application shuts down after the connections have.
        self.config.app.state.drain.begin()
        await super().shutdown(sockets)


_refused_connections = RateLimitedEvent("connections refused")


class _Connection(H11Protocol):
    """A connection with time limits for a client that is slow, silent or gone."""

    def __init__(self, *args: Any, limits: ServerLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        connected = transport.get_extra_info("socket")
        if connected.family in (socket.AF_INET, socket.AF_INET6):
            # asyncio sets it only for sockets that name their protocol. Without it every small
            # write waits up to 40 ms for the client's delayed acknowledgement of the one before.
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().connection_made(_Transport(transport, self, self._limits.stalled_seconds))
        if len(self.connections) > self._limits.connections:
            _refused_connections.record()
            self.app = _respond_full
            if len(self.connections) > self._limits.connections + _REFUSED:
                transport.abort()
                return
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            self.transport.discard(len(data))
            return
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        for timer in (self._head_timer, self._stall_timer, self.timeout_keep_alive_task):
            if timer is not None:
                timer.cancel()
        self.transport.cancel_timers()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self._limits.stalled_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()

    def _watch_head(self) -> None:
        """Limit the time from the connection, or a request's first byte, to the end of its head."""
        if self.conn.their_state is h11.IDLE:
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(
                    self._limits.head_seconds, self.timeout_keep_alive_handler
                )
        elif self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class _Transport:
    """A transport that delivers what was written before it closes, even if the client still sends.

    Closing a socket with unread bytes resets the connection, and the client may lose the response.
    So after a response that refuses a body this side is shut down, and the body is read and
    discarded for a moment.
    """

    def __init__(
        self, transport: asyncio.Transport, connection: _Connection, stalled_seconds: float
    ) -> None:
        self._transport = transport
        self._connection = connection
        self._stalled_seconds = stalled_seconds
        self._closing = False
        self._discarded = 0
        self._timers: list[asyncio.TimerHandle] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._closing or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        if not self._closing:
            self._transport.write(data)

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        loop = self._connection.loop
        self._timers.append(loop.call_later(self._stalled_seconds, self._transport.abort))
        if self._connection.conn.their_state is h11.SEND_BODY and not self._transport.is_closing():
            self._transport.write_eof()
            self._transport.resume_reading()
            self._timers.append(loop.call_later(_LINGER_SECONDS, self._transport.close))
        else:
            self._transport.close()

    def discard(self, count: int) -> None:
        """Bytes arrived after the response."""
        self._discarded += count
        if self._discarded > _LINGER_BYTES:
            self._transport.close()

    def cancel_timers(self) -> None:
        for timer in self._timers:
            timer.cancel()


async def _respond_full(scope: Scope, receive: Receive, send: Send) -> None:
    """The application of a connection beyond the limit."""
    error = ApiError(503, "too many connections; try again later", "queue_full")
    response = error_response(error)
    response.headers["Connection"] = "close"
    await response(scope, receive, send)
