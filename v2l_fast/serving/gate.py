"""What the head of a request decides before its body is read: who asks, from where, how much.

A request is refused here for its Host, Origin, key, content type or length; what comes later is
bounded in size and silence. The answer to a body that was not read closes its connection.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from v2l_fast.errors import ConfigError
from v2l_fast.serving import http_errors
from v2l_fast.serving.auth import Keys
from v2l_fast.serving.http_errors import ApiError, printable
from v2l_fast.serving.limits import ServerLimits

UPLOAD_PATH = "/v1/videos"
CHAT_PATH = "/v1/chat/completions"
# Everything else needs the key, if there is one.
_PUBLIC = ("/", "/health", "/docs", "/docs/oauth2-redirect", "/openapi.json")
_PUBLIC_FOLDER = "/static-offline-docs/"
JSON, FORM = "application/json", "multipart/form-data"
_KINDS = {CHAT_PATH: (JSON,), UPLOAD_PATH: (FORM, JSON)}
# Boundaries, part headers and the fields beside the file.
_FORM_OVERHEAD = 64 << 10
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{0,5})?", re.IGNORECASE)


class AllowedHosts:
    """The names under which the server may be reached.

    A page of another site must not use the server of the person who looks at it: neither by
    sending it a form (``Origin`` is the page's) nor by a domain name that resolves to this machine
    (``Host`` is the page's). Always allowed are localhost and loopback addresses, on any port.

    Args:
        names: further host names and addresses.
        bound: the address the server listens on. One that stands for all of the machine's
            addresses allows every address as ``Host``, since only names can be rebound.

    Raises:
        ConfigError: a name is none.
    """

    def __init__(self, names: Sequence[str] = (), bound: str = "127.0.0.1") -> None:
        address = _address(bound)
        self._any_address = address is not None and address.is_unspecified
        self._names = {_host(_bracketed(bound))}
        for name in names:
            host = _host(_bracketed(name))
            if host is None or host != _bracketed(name).lower().rstrip("."):
                raise ConfigError(
                    f"--allowed-host {name!r} must be a host name or an address without scheme "
                    "and port, such as example.com"
                )
            self._names.add(host)

    def refusal(self, method: str, headers: Headers) -> ApiError | None:
        """Why a request is refused for its ``Host`` or ``Origin``, if it is."""
        authority = headers.get("host")
        if authority is not None:
            host = _host(authority)
            literal = self._any_address and host is not None and _address(host) is not None
            if not literal and not self._allows(host):
                return _refused(421, "Host", authority, host)
        for origin in headers.getlist("origin"):
            if origin == "null":
                if method not in _SAFE_METHODS:
                    return ApiError(
                        403,
                        "Origin is 'null': a page without an origin of its own (a local file, a "
                        "sandboxed frame) may not change anything here",
                        "origin_not_allowed",
                    )
                continue
            _, _, sent_from = origin.partition("://")
            same = authority is not None and sent_from.lower() == authority.lower()
            host = _host(sent_from)
            if not same and not self._allows(host):
                return _refused(403, "Origin", origin, host)
        return None

    def _allows(self, host: str | None) -> bool:
        if host is None:
            return False
        address = _address(host)
        if address is not None:
            address = getattr(address, "ipv4_mapped", None) or address
            return address.is_loopback or host in self._names
        return host in self._names or host == "localhost" or host.endswith(".localhost")


def _bracketed(name: str) -> str:
    return f"[{name}]" if name.count(":") > 1 and not name.startswith("[") else name


def _host(authority: str) -> str | None:
    """The host of ``host[:port]`` in lower case; None when it is neither."""
    match = _AUTHORITY.fullmatch(authority)
    return None if match is None else match[1].lower().rstrip(".")


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def _refused(status: int, header: str, value: str, host: str | None) -> ApiError:
    remedy = "" if host is None else f"; start the server with --allowed-host {host[:200]}"
    return ApiError(
        status,
        f"{header} {printable(value)!r} is not allowed here{remedy}",
        f"{header.lower()}_not_allowed",
    )


class Gate:
    """ASGI middleware, outside of everything that reads a body.

    Args:
        limits: of bodies, :class:`ServerLimits`.
    """

    def __init__(self, app: ASGIApp, hosts: AllowedHosts, keys: Keys, limits: ServerLimits) -> None:
        self._app, self._hosts, self._keys, self._limits = app, hosts, keys, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        complete = "transfer-encoding" not in headers and headers.get("content-length", "0") == "0"
        received, limit, idle = 0, self._body_limit(scope, headers), self._limits.idle_seconds

        async def bounded() -> Message:
            nonlocal received, complete
            if complete:
                # What still comes is the news that the client has left.
                return await receive()
            try:
                async with asyncio.timeout(idle):
                    message = await receive()
            except TimeoutError:
                message = f"nothing came for {idle:g} s; send it again"
                raise ApiError(408, message, "timeout") from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > limit:
                raise ApiError(413, _too_large(limit), "too_large")
            return message

        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start" and not complete:
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        error = self._refusal(scope, headers, limit)
        if error is not None:
            await http_errors.response(error)(scope, receive, closing)
            return
        inner = scope
        if scope["method"] == "HEAD":
            # Answered as GET; the protocol leaves the body out.
            inner = {**scope, "method": "GET"}
        await self._app(inner, bounded, closing)
        scope["route"] = inner.get("route")

    def _body_limit(self, scope: Scope, headers: Headers) -> int:
        if scope["path"] == UPLOAD_PATH and content_type(headers) == FORM:
            return self._limits.upload_bytes + _FORM_OVERHEAD
        return self._limits.body_bytes

    def _refusal(self, scope: Scope, headers: Headers, limit: int) -> ApiError | None:
        method, path = scope["method"], scope["path"]
        error = self._hosts.refusal(method, headers)
        if error is not None:
            return error
        public = path in _PUBLIC or path.startswith(_PUBLIC_FOLDER)
        if not public and not self._keys.accept(headers.get("authorization")):
            return ApiError(
                401, "the API key is missing or wrong (Authorization: Bearer KEY)",
                "invalid_api_key",
            )  # fmt: skip
        kinds = _KINDS.get(path)
        if method == "POST" and kinds is not None and content_type(headers) not in kinds:
            sent = printable(content_type(headers))
            return ApiError(
                415,
                f"send Content-Type: {' or '.join(kinds)}; "
                + (f"this request has {sent!r}" if sent else "this request has none"),
                "unsupported_content_type",
            )
        if int(headers.get("content-length", "0")) > limit:
            return ApiError(413, _too_large(limit), "too_large")
        return None


def _too_large(limit: int) -> str:
    return f"the request body is larger than {limit} bytes"


def content_type(headers: Headers) -> str:
    """The type of a body, without parameters, in lower case."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()
