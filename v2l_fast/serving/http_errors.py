"""Errors as HTTP answers in OpenAI's shape, without server paths or the caller's own input."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from v2l_fast.errors import AdapterError, ConfigError, V2LError, VideoError
from v2l_fast.serving.requests import EngineClosed, OtherAdapter, PromptTooLong, QueueFull
from v2l_fast.serving.schemas import ErrorBody, ErrorResponse
from v2l_fast.store.adapter_store import StoreError

log = logging.getLogger(__name__)

RETRY_AFTER = {"Retry-After": "2"}
DESCRIPTIONS = {
    400: "The request cannot be answered as it is",
    401: "The API key is missing or wrong",
    403: "The page that asks is not this server's",
    404: "There is no such thing here",
    405: "The path does not accept this method",
    408: "The client sent nothing for too long",
    409: "It is not ready yet",
    413: "The request body is too large",
    415: "The body is of another kind than this path takes",
    421: "The server is not reached under this name",
    503: "Full, out of disk space, or shutting down; try again later",
}


class ApiError(HTTPException):
    """A refusal that a route decides on.

    An HTTPException, since FastAPI lets no other error out while it reads a body.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(status, message)
        self.status, self.message, self.code, self.param = status, message, code, param


def responses(*statuses: int) -> dict[int | str, dict]:
    """Declaration of a route's errors for the OpenAPI document."""
    return {s: {"model": ErrorResponse, "description": DESCRIPTIONS[s]} for s in statuses}


def translate(error: Exception) -> ApiError:
    """What a caller is told about an error of the library.

    A message goes out only where it is about the caller's own request.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(503, "the server is full, try again later", "queue_full")
    if isinstance(error, EngineClosed):
        return ApiError(503, "the server is shutting down", "shutting_down")
    if isinstance(error, TimeoutError):
        return ApiError(503, "the answer took too long and was stopped", "timeout")
    if isinstance(error, PromptTooLong):
        return ApiError(400, str(error), "context_length_exceeded", "messages")
    if isinstance(error, VideoError):
        # Its file is the caller's; the folder it lies in is not.
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
        return ApiError(503, "the store cannot be used now, try again later", "storage")
    return ApiError(503, "the server cannot answer now, try again later", "unavailable")


def body(error: ApiError) -> ErrorBody:
    """OpenAI's error object."""
    kind = "invalid_request_error"
    if error.status == 401:
        kind = "authentication_error"
    elif error.status == 403:
        kind = "permission_error"
    elif error.status >= 500:
        kind = "server_error"
    return ErrorBody(message=error.message, type=kind, param=error.param, code=error.code)


def response(error: ApiError) -> JSONResponse:
    """The whole HTTP answer."""
    headers = {}
    if error.status == 503:
        headers |= RETRY_AFTER
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    content = ErrorResponse(error=body(error)).model_dump()
    return JSONResponse(content, error.status, headers)


def install(app: FastAPI) -> None:
    """Register the handlers: whatever fails, the answer has this shape."""

    @app.exception_handler(ApiError)
    @app.exception_handler(V2LError)
    @app.exception_handler(TimeoutError)
    async def refused(request: Request, error: Exception) -> JSONResponse:
        return response(translate(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        answer = response(ApiError(error.status_code, str(error.detail)))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return response(from_validation(error.errors()))

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        # Starlette logs the traceback after this.
        return JSONResponse(
            ErrorResponse(
                error=ErrorBody(
                    message="the server failed; its log has the reason",
                    type="server_error",
                    param=None,
                    code="internal",
                )
            ).model_dump(),
            500,
        )


def from_validation(errors: Sequence[dict]) -> ApiError:
    """The first thing that is wrong with a body; the input itself is not repeated."""
    first = errors[0]
    place = [str(p) for p in first["loc"] if p not in ("body", "query", "path", "header")]
    name = printable(".".join(place)) or None
    message = printable(first["msg"])
    if name is None and first["type"] == "missing":
        message = "the body is empty; send a JSON object"
    elif name is None and first["type"] in _NO_OBJECT:
        message = "the body must be a JSON object"
    text = f"{name}: {message}" if name else message
    return ApiError(400, text, first["type"], name)


_NO_OBJECT = ("model_attributes_type", "model_type", "dict_type")


def printable(text: str) -> str:
    """At most 200 characters of what a caller sent, in ASCII."""
    return text[:200].encode("ascii", "backslashreplace").decode()
