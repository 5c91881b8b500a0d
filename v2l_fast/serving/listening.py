"""The listening socket and its connections: answers leave at once, patience and numbers are finite.

uvicorn speaks HTTP. What it leaves open is here: delays of small packets, connections that send no
request or read no answer, more connections than there are file descriptors, and the end of a
connection whose request was refused before its body arrived.
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
from v2l_fast.serving import http_errors, logs
from v2l_fast.serving.limits import ServerLimits

# Connections that the kernel completes before they are accepted. asyncio tries so many at once.
_BACKLOG = 256
# Connections beyond the limit that are told so; more are cut.
_REFUSED = 32
# Descriptors for files: videos and adapters being read and written, processes that decode.
_RESERVED_DESCRIPTORS = 128
_FEWEST_CONNECTIONS = 16
# A refused body is read on for so long, so that its sender gets to read the answer.
_LINGER_SECONDS, _LINGER_BYTES = 2.0, 1 << 20


def bind(host: str, port: int) -> socket.socket:
    """Take an address, IPv4 or IPv6; listening begins with :func:`http_server`.

    Raises:
        ConfigError: it cannot be had.
    """
    bound = None
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # Of a name that has both, IPv4: "localhost" is 127.0.0.1 to most clients.
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


def connection_limit(most: int) -> int:
    """At most so many connections, fewer if this process may not open that many files.

    Raises:
        ConfigError: there are hardly any descriptors.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        return most
    in_use = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 64
    left = allowed - in_use - _RESERVED_DESCRIPTORS - _REFUSED
    if left < _FEWEST_CONNECTIONS:
        raise ConfigError(
            f"this process may open {allowed} files, which leaves none for connections; "
            "raise the limit (ulimit -n 1024)"
        )
    return min(most, left)


def http_server(app: FastAPI, limits: ServerLimits, drain_seconds: float) -> uvicorn.Server:
    """A server for ``app``, of :func:`~v2l_fast.serving.app.create_app`; ``run([socket])`` it."""
    return _Server(
        uvicorn.Config(
            app,
            # uvloop and httptools would bring rules of their own for what is bounded here.
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


class _Server(uvicorn.Server):
    """uvicorn's, for which running out of descriptors is one line of log now and then, and stopping
    takes the application's time for it once."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        full = logs.Occasional("no file descriptor is left for a connection")

        def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            # asyncio reports each of _BACKLOG attempts every second, with a traceback.
            if "socket.accept()" in context["message"]:
                full.event()
            else:
                loop.default_exception_handler(context)

        asyncio.get_running_loop().set_exception_handler(handle)
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # The application ends after the connections have.
        self.config.app.state.drain.begin()
        await super().shutdown(sockets)


_connections_full = logs.Occasional("connections refused")


class _Connection(H11Protocol):
    """A connection whose client may be slow, silent or gone."""

    def __init__(self, *args: Any, limits: ServerLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        connected = transport.get_extra_info("socket")
        if connected.family in (socket.AF_INET, socket.AF_INET6):
            # asyncio does so for sockets that name their protocol alone. Without it every small
            # write waits for the client's delayed acknowledgement of the one before, 40 ms.
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().connection_made(_Transport(transport, self, self._limits.stalled_seconds))
        if len(self.connections) > self._limits.connections:
            _connections_full.event()
            self.app = _full
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
        self.transport.ended()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self._limits.stalled_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()

    def _watch_head(self) -> None:
        """A request's head must be complete some time after its connection or first byte."""
        if self.conn.their_state is h11.IDLE:
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(
                    self._limits.head_seconds, self.timeout_keep_alive_handler
                )
        elif self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class _Transport:
    """A transport that ends well: what is written goes out, to a client that is still sending, too.

    A socket closed with bytes unread resets the connection, and the client may lose the answer. So
    an answer that refuses a body is followed by the end of our side, and the body is read on for
    a moment.
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
        """So many bytes came that nobody wants."""
        self._discarded += count
        if self._discarded > _LINGER_BYTES:
            self._transport.close()

    def ended(self) -> None:
        for timer in self._timers:
            timer.cancel()


async def _full(scope: Scope, receive: Receive, send: Send) -> None:
    """The answer on a connection beyond the limit."""
    error = http_errors.ApiError(503, "too many connections; try again later", "queue_full")
    answer = http_errors.response(error)
    answer.headers["Connection"] = "close"
    await answer(scope, receive, send)
