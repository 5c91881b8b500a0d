"""What the operator allows, and the checks of a request that need only its headers.

Host, origin, key, content type and length are checked before the body is read. Bodies that pass are
bounded in size and in the time a client may stay silent. A response to a body that was not read
closes its connection.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastapi.security import HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from v2l_fast.errors import ConfigError
from v2l_fast.files import read_text
from v2l_fast.serving.http import ApiError, error_response, printable
from v2l_fast.serving.schemas import ServerLimits

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
# NAT64, 6to4 and Teredo addresses contain an IPv4 address that a gateway may reach.
_TRANSLATED = tuple(
    ipaddress.ip_network(n) for n in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")
)
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
# Declares the key in the OpenAPI document; :class:`Gate` checks it.
api_key_scheme = HTTPBearer(
    auto_error=False, description="The server's API key, if it requires one."
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


class MediaSources:
    """Sources of videos and images in messages, besides ``data:`` URLs.

    Args:
        hosts: names of hosts that URLs may name; ``*`` allows every public host. Empty: none.
        networks: networks that may be reached although they are not public, such as 10.0.0.0/8.

    Raises:
        ConfigError: a host or network is malformed.
    """

    def __init__(self, hosts: Iterable[str] = (), networks: Iterable[str] = ()) -> None:
        hosts = list(hosts)
        self._any = "*" in hosts
        self._hosts = frozenset(host_name(h, "--media-host") for h in hosts if h != "*")
        self._networks: list[Network] = []
        for text in networks:
            try:
                self._networks.append(ipaddress.ip_network(text))
            except ValueError as error:
                raise ConfigError(
                    f"--media-network must be a network such as 10.0.0.0/8, got {text!r} ({error})"
                ) from None

    @property
    def enabled(self) -> bool:
        """Whether any http(s) URL is allowed."""
        return self._any or bool(self._hosts)

    def allows_host(self, host: str) -> bool:
        """Whether URLs may name a host; its addresses are checked when it is connected to."""
        return self._any or host.lower().rstrip(".") in self._hosts

    def allows_address(self, address: str) -> bool:
        """Whether an IP address may be connected to: public, or in one of the networks."""
        try:
            parsed: Address = ipaddress.ip_address(address.partition("%")[0])
        except ValueError:
            return False
        if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
            parsed = parsed.ipv4_mapped
        if any(parsed in network for network in self._networks):
            return True
        if any(parsed in network for network in _TRANSLATED):
            return False
        local = parsed.is_multicast or parsed.is_reserved or getattr(parsed, "is_site_local", False)
        return parsed.is_global and not local


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
