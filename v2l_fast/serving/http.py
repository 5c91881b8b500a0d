"""HTTP around the routes: errors in OpenAI's shape, safe JSON bodies, and connections.

An error message never holds a path of the server or the caller's own input. uvicorn speaks HTTP.
Added here are TCP_NODELAY, time limits for connections that send no request or read no response, a
limit on connections below that on file descriptors, and a clean end for connections whose request
was refused before its body arrived.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import resource
import socket
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from v2l_fast.errors import AdapterError, ConfigError, PromptTooLong, V2LError, VideoError
from v2l_fast.serving.monitoring import RateLimitedEvent
from v2l_fast.serving.request import EngineClosed, OtherAdapter, QueueFull
from v2l_fast.serving.schemas import ErrorBody, ErrorResponse, ServerLimits
from v2l_fast.store.adapter_store import StoreError

log = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = "2"
DESCRIPTIONS = {
    400: "The request or the video cannot be used as it is",
    401: "The API key is missing or wrong",
    403: "The Origin of the page that sent the request is not allowed",
    404: "No such video, model or path",
    405: "The path does not accept this method",
    408: "The client stopped sending",
    409: "The video is not ready, failed, was cancelled, or its file is no longer kept",
    413: "The request body is too large",
    415: "The path does not accept this content type",
    421: "The Host of the request is not allowed",
    503: "The server is full, out of disk space, too slow, or shutting down; try again later",
}
# Parsing this many bytes takes about as long as handing them to a thread.
_SMALL_BODY = 1 << 16
# int() takes quadratic time, and no number of the interface has more digits.
_MAX_DIGITS = 25
_SURROGATE = re.compile("[\ud800-\udfff]")
# Connections that the kernel completes before they are accepted; asyncio accepts as many at once.
_BACKLOG = 256
# Connections beyond the limit that get a 503; further ones are aborted.
_REFUSED = 32
# Descriptors kept for videos and adapters being read or written, and for processes that decode.
_RESERVED_DESCRIPTORS = 128
_MIN_CONNECTIONS = 16
# How long, and how much of, a refused body is still read so that its sender can read the response.
_LINGER_SECONDS, _LINGER_BYTES = 2.0, 1 << 20


# --- errors ---------------------------------------------------------------------------------------


class ApiError(HTTPException):
    """An error with the status, code and parameter that the response carries.

    A subclass of HTTPException because FastAPI replaces any other error raised while it reads a
    body.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(status, message)
        self.status, self.message, self.code, self.param = status, message, code, param


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` argument of a route, for the OpenAPI document."""
    return {s: {"model": ErrorResponse, "description": DESCRIPTIONS[s]} for s in statuses}


def to_api_error(error: Exception) -> ApiError:
    """The response to an error of the library.

    Its message is passed on only where it is about the caller's own request.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(503, "the server is full; try again later", "queue_full")
    if isinstance(error, EngineClosed):
        return ApiError(503, "the server is shutting down; try again later", "shutting_down")
    if isinstance(error, TimeoutError):
        return ApiError(503, "the answer exceeded its time limit; try again later", "timeout")
    if isinstance(error, PromptTooLong):
        return ApiError(400, str(error), "context_length_exceeded", "messages")
    if isinstance(error, VideoError):
        # The reason concerns the caller's file; the folder it is kept in does not.
        path, colon, reason = str(error).partition(": ")
        return ApiError(400, reason if colon and "/" in path else str(error), "invalid_video")
    if isinstance(error, ConfigError):
        return ApiError(400, str(error), "invalid_value")
    if isinstance(error, OtherAdapter):
        return ApiError(400, str(error), "other_adapter", "model")
    if isinstance(error, AdapterError):
        log.warning("adapter: %s", error)
        message = "this adapter cannot be used here; internalize its video again"
        return ApiError(404, message, "model_not_found", "model")
    log.error("failed: %s", error)
    if isinstance(error, StoreError):
        return ApiError(503, "the store cannot be used now; try again later", "storage")
    return ApiError(503, "the server cannot answer now; try again later", "unavailable")


def from_validation(errors: Sequence[dict[str, Any]]) -> ApiError:
    """The first error that pydantic found in a request, without the input itself."""
    first = errors[0]
    location = [str(p) for p in first["loc"] if p not in ("body", "query", "path", "header")]
    name = printable(".".join(location)) or None
    message = printable(first["msg"])
    if name is None and first["type"] == "missing":
        message = "the body is empty; send a JSON object"
    elif name is None and first["type"] in ("model_attributes_type", "model_type", "dict_type"):
        message = "the body must be a JSON object"
    return ApiError(400, f"{name}: {message}" if name else message, first["type"], name)


def error_body(error: ApiError) -> ErrorBody:
    """OpenAI's error object."""
    kind = "invalid_request_error"
    if error.status == 401:
        kind = "authentication_error"
    elif error.status == 403:
        kind = "permission_error"
    elif error.status >= 500:
        kind = "server_error"
    return ErrorBody(message=error.message, type=kind, param=error.param, code=error.code)


def error_response(error: ApiError) -> JSONResponse:
    """The response, with the headers that its status calls for."""
    headers = {}
    if error.status == 503:
        headers["Retry-After"] = RETRY_AFTER_SECONDS
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    content = ErrorResponse(error=error_body(error)).model_dump()
    return JSONResponse(content, error.status, headers)


def install_error_handlers(app: FastAPI) -> None:
    """Give every error of the application OpenAI's shape."""

    @app.exception_handler(ApiError)
    @app.exception_handler(V2LError)
    @app.exception_handler(TimeoutError)
    async def on_error(request: Request, error: Exception) -> JSONResponse:
        return error_response(to_api_error(error))

    @app.exception_handler(HTTPException)
    async def on_http_exception(request: Request, error: HTTPException) -> JSONResponse:
        response = error_response(ApiError(error.status_code, str(error.detail)))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RequestValidationError)
    async def on_invalid_request(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(from_validation(error.errors()))

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> JSONResponse:
        # Starlette logs the traceback after this.
        message = "internal error; the server's log has the reason"
        return error_response(ApiError(500, message, "internal"))


def printable(text: str) -> str:
    """At most 200 characters of a caller's text, as ASCII."""
    return text[:200].encode("ascii", "backslashreplace").decode()


# --- JSON -----------------------------------------------------------------------------------------


class JsonRoute(APIRoute):
    """A route whose body is read by :func:`parse_json_body`.

    A body that is larger than text needs waits for room, and is parsed in a thread.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            inner, state = _JsonRequest(request.scope, request.receive), request.app.state
            limits: ServerLimits = state.server.limits
            size = int(request.headers.get("content-length", limits.chat_bytes))
            if size <= limits.body_bytes:
                return await handler(inner)
            async with state.large_bodies.hold(size):
                return await handler(inner)

        return handle


class _JsonRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        if len(body) < _SMALL_BODY:
            return parse_json_body(body)
        limit = self.app.state.server.limits.body_bytes
        # Small values take many times their text in memory; only strings may be large.
        if len(body) > limit and sum(body.count(mark) for mark in b",[{") > limit:
            raise ApiError(413, f"the request has more than {limit} values", "too_large")
        return await run_in_threadpool(parse_json_body, body)


def parse_json_body(body: bytes) -> Any:
    """The value of a JSON text.

    A string with half of a surrogate pair is refused wherever it stands: it would pass through
    Python until something encodes it.

    Raises:
        ApiError: 400 that says where the text is wrong.
    """
    try:
        value = _DECODER.decode(body.decode(json.detect_encoding(body)))
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at line {error.lineno}, column {error.colno}"
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is not {error.encoding.upper()} text"
    except RecursionError:
        reason = "it is nested too deeply"
    except _NotJson as error:
        reason = f"{error} is not a JSON number"
    else:
        _refuse_surrogates(value)
        return value
    raise ApiError(400, f"the body is not JSON: {reason}", "invalid_json")


class _NotJson(ValueError):
    """A number that Python's JSON accepts and the standard does not: NaN or an infinity."""


def _refuse_constant(name: str) -> Any:
    raise _NotJson(name)


_DECODER = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_int=lambda digits: int(digits[:_MAX_DIGITS])
)


def _refuse_surrogates(value: Any) -> None:
    pending = [("", value)]
    while pending:
        name, item = pending.pop()
        prefix = f"{name}." if name else ""
        if isinstance(item, dict):
            pending += [(f"{prefix}{key}", inner) for key, inner in item.items()]
            pending += [(f"{prefix}{key}", key) for key in item]
        elif isinstance(item, list):
            pending += [(f"{prefix}{index}", inner) for index, inner in enumerate(item)]
        elif isinstance(item, str) and not item.isascii() and _SURROGATE.search(item):
            param = printable(name) or None
            message = (
                f"{param or 'the body'}: contains half of a surrogate pair (\\ud800 to \\udfff); "
                "send the whole character"
            )
            raise ApiError(400, message, "invalid_text", param)


# --- connections ----------------------------------------------------------------------------------


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
            # asyncio reports each of _BACKLOG attempts every second, with a traceback, and resumes
            # each a second later, by when a server that shuts down has closed the socket.
            if "socket.accept()" in context["message"]:
                exhausted.record()
            elif not (self.should_exit and "_start_serving" in context["message"]):
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
        sock = transport.get_extra_info("socket")
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            # asyncio sets it only for sockets that name their protocol. Without it every small
            # write waits up to 40 ms for the client's delayed acknowledgement of the one before.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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
    """The ASGI application of a connection beyond the limit."""
    error = ApiError(503, "too many connections; try again later", "queue_full")
    response = error_response(error)
    response.headers["Connection"] = "close"
    await response(scope, receive, send)
