"""What HTTP needs around the routes: errors in OpenAI's shape, and safe JSON bodies.

An error message never holds a path of the server or the caller's own input.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from v2l_fast.errors import AdapterError, ConfigError, V2LError, VideoError
from v2l_fast.serving.request import EngineClosed, OtherAdapter, PromptTooLong, QueueFull
from v2l_fast.serving.schemas import ErrorBody, ErrorResponse
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
# int() takes quadratic time, and no number of the interface has more digits.
_MAX_DIGITS = 25
_SURROGATE = re.compile("[\ud800-\udfff]")


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
    """A route whose body is read by :func:`parse_json_body`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_JsonRequest(request.scope, request.receive))

        return handle


class _JsonRequest(Request):
    async def json(self) -> Any:
        return parse_json_body(await self.body())


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
        elif isinstance(item, str) and _SURROGATE.search(item):
            param = printable(name) or None
            message = (
                f"{param or 'the body'}: contains half of a surrogate pair (\\ud800 to \\udfff); "
                "send the whole character"
            )
            raise ApiError(400, message, "invalid_text", param)
