"""JSON bodies: read once, with errors that say where, before anything looks into them.

A string that is no Unicode text (half of a surrogate pair) would pass through Python until
something writes it: it is refused here, wherever it stands.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from v2l_fast.serving.http_errors import ApiError, printable

# Longer integers have no meaning here, and int() takes quadratic time for them.
_DIGITS = 25


class JsonRoute(APIRoute):
    """A route whose body is read by :func:`parse`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_Request(request.scope, request.receive))

        return handle


class _Request(Request):
    async def json(self) -> Any:
        return parse(await self.body())


def parse(body: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ApiError: 400 that says where it is wrong.
    """
    try:
        value = _DECODER.decode(body.decode(json.detect_encoding(body)))
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at line {error.lineno}, column {error.colno}"
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is not {error.encoding.upper()} text"
    except RecursionError:
        reason = "it is nested too deeply"
    except _Constant as error:
        reason = f"{error} is no JSON number"
    else:
        _refuse_surrogates(value)
        return value
    raise ApiError(400, f"the body is not JSON: {reason}", "invalid_json")


class _Constant(ValueError):
    """A number that Python's JSON knows and JSON does not."""


def _constant(name: str) -> Any:
    raise _Constant(name)


_DECODER = json.JSONDecoder(
    parse_constant=_constant, parse_int=lambda digits: int(digits[:_DIGITS])
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
            pending += [(f"{prefix}{place}", inner) for place, inner in enumerate(item)]
        elif isinstance(item, str) and not _is_text(item):
            shown = printable(name) or None
            message = (
                f"{shown or 'the body'}: holds half of a surrogate pair (\\ud800 to \\udfff); "
                "send the whole character"
            )
            raise ApiError(400, message, "invalid_text", shown)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
