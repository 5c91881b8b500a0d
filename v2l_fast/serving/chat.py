"""OpenAI's part of the interface: models and chat completions, streamed or not."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool

from v2l_fast.errors import V2LError
from v2l_fast.serving import elicit
from v2l_fast.serving.gate import api_key_scheme
from v2l_fast.serving.http import ApiError, JsonRoute, error_body, error_responses, to_api_error
from v2l_fast.serving.monitoring import log_event
from v2l_fast.serving.request import Chunk, StreamingRequest, Usage
from v2l_fast.serving.schemas import (
    ChatCompletion,
    ChatRequest,
    Choice,
    CompletionMessage,
    ErrorResponse,
    ModelBody,
    ModelList,
    PromptTokensDetails,
    UsageBody,
)
from v2l_fast.serving.server import Server

router = APIRouter(
    prefix="/v1", tags=["OpenAI"], dependencies=[Depends(api_key_scheme)], route_class=JsonRoute
)

_CLIENT_CLOSED_REQUEST = 499
_STREAM_RESPONSE = {
    200: {
        "description": "The answer; as server-sent events when `stream` is set",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


@router.get("/models", responses=error_responses(401, 503))
def models(request: Request) -> ModelList:
    """The base model, then every adapter."""
    server: Server = request.app.state.server
    base = ModelBody(id=server.name, created=request.app.state.started, parent=None)
    adapters = [_model(server, record.id, record.created) for record in server.adapters()]
    return ModelList(data=[base, *adapters])


@router.get("/models/{model:path}", responses=error_responses(401, 404, 409, 503))
def model(model: str, request: Request) -> ModelBody:
    """The base model or one adapter."""
    server: Server = request.app.state.server
    if model == server.name:
        return ModelBody(id=server.name, created=request.app.state.started, parent=None)
    record = server.describe(server.resolve(model, "model"))
    return _model(server, record.id, record.created)


def _model(server: Server, adapter_id: str, created: float) -> ModelBody:
    return ModelBody(id=adapter_id, created=int(created), parent=server.name)


@router.post(
    "/chat/completions",
    response_model=ChatCompletion,
    responses=_STREAM_RESPONSE | error_responses(400, 401, 404, 408, 409, 413, 415, 503),
)
async def chat(body: ChatRequest, request: Request) -> Any:
    """Answer a question from adapters, from the video in context, or from the plain model."""
    server: Server = request.app.state.server
    if body.elicit is not None:
        return await elicit.answer(server, body)
    completion = Completion(server, body)
    try:
        async with _cancel_on_disconnect(request):
            await completion.begin()
        if body.stream:
            usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            return StreamingResponse(
                completion.events(usage),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
                background=BackgroundTask(completion.close),
            )
        async with _cancel_on_disconnect(request):
            return await completion.whole()
    except _Disconnected:
        # Nobody reads this; the log line gets the status that proxies use for it.
        return JSONResponse(None, _CLIENT_CLOSED_REQUEST)


class _Disconnected(Exception):
    """The client closed the connection."""


class Completion:
    """One chat completion: its pieces, its times, and what is counted when it ends."""

    def __init__(self, server: Server, body: ChatRequest) -> None:
        self._server = server
        self._body = body
        self._arrived = time.perf_counter()
        self._deadline = self._arrived + server.limits.answer_seconds
        self._first: float | None = None
        self._latest = self._arrived
        self._source = "plain"
        self._request: StreamingRequest | None = None
        self._chunks: AsyncIterator[Chunk] | None = None
        self._opening: Chunk | None = None
        self._ended = False
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())

    async def begin(self) -> None:
        """Submit the question and wait for the first piece, so that an error has its status."""
        try:
            # In a thread: it tokenizes, reads an adapter that is not in memory, decodes a video.
            async with self._in_time():
                await run_in_threadpool(self._submit)
            self._chunks = self._request.chunks()
            self._opening = await self._next()
            self._first = self._latest = time.perf_counter()
        except BaseException as error:
            self._end(error)
            raise

    def _submit(self) -> None:
        request = self._server.question(self._body)
        self._source = request.source
        # Set here and not from a result: the result is lost if the client leaves as it is returned.
        self._request = self._server.engine.submit(request)
        if self._ended:
            # The client left or time ran out meanwhile.
            self._request.cancel()

    def close(self) -> None:
        """Nobody reads the rest, if there is one."""
        self._end(_Disconnected())

    async def whole(self) -> ChatCompletion:
        """The complete answer."""
        try:
            pieces = [chunk async for chunk in self._pieces()]
            usage = _usage(self._request.usage)
        except BaseException as error:
            self._end(error)
            raise
        self._end(None, pieces[-1].finish_reason, usage)
        message = CompletionMessage(content="".join(piece.text for piece in pieces))
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self._body.model,
            choices=[Choice(message=message, finish_reason=pieces[-1].finish_reason)],
            usage=usage,
        )

    async def events(self, include_usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events; an error in the middle is the last one."""
        try:
            yield self._event({"role": "assistant", "content": ""})
            async for piece in self._pieces():
                if piece.text:
                    yield self._event({"content": piece.text})
            yield self._event({}, piece.finish_reason)
            usage = _usage(self._request.usage)
            self._end(None, piece.finish_reason, usage)
            if include_usage:
                yield _data(self._frame([]) | {"usage": usage.model_dump()})
            yield "data: [DONE]\n\n"
        except (V2LError, ApiError, TimeoutError) as error:
            self._end(error)
            yield _data(ErrorResponse(error=error_body(to_api_error(error))).model_dump())
        except BaseException as error:
            self._end(error)
            raise

    async def _pieces(self) -> AsyncIterator[Chunk]:
        piece = self._opening
        while piece is not None:
            yield piece
            if piece.finish_reason is not None:
                return
            piece = await self._next()
            if piece.text:
                before, self._latest = self._latest, time.perf_counter()
                self._server.metrics.observe_next_token(self._source, self._latest - before)

    async def _next(self) -> Chunk:
        """The next piece; TimeoutError after the answer's time limit."""
        async with self._in_time():
            piece = await anext(self._chunks, None)
        if piece is None or piece.finish_reason == "cancelled":
            raise ApiError(503, "the answer was cancelled", "cancelled")
        return piece

    def _in_time(self) -> asyncio.Timeout:
        return asyncio.timeout(self._deadline - time.perf_counter())

    def _event(self, delta: dict[str, str], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _data(self._frame([choice]))

    def _frame(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self._body.model,
            "choices": choices,
        }

    def _end(
        self, error: BaseException | None, reason: str = "", usage: UsageBody | None = None
    ) -> None:
        """Free the engine's row if the answer still runs; count once how the completion ended."""
        if self._ended:
            return
        # Set before the request is read: the thread in _submit writes first, then reads.
        self._ended = True
        if error is not None and self._request is not None:
            self._request.cancel()
        if isinstance(error, V2LError | ApiError | TimeoutError):
            reason = to_api_error(error).code or "error"
        elif error is not None:
            reason = "cancelled"
        metrics, now = self._server.metrics, time.perf_counter()
        metrics.count_answer(self._source, reason)
        fields = {"source": self._source, "end": reason, "seconds": round(now - self._arrived, 6)}
        if usage is not None and self._first is not None:
            first = self._first - self._arrived
            metrics.observe_first_token(self._source, first)
            fields |= {
                "first_token": round(first, 6),
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "visual_tokens": usage.prompt_tokens_details.visual_tokens,
            }
        log_event("answer", **fields)


@asynccontextmanager
async def _cancel_on_disconnect(request: Request) -> AsyncIterator[None]:
    """Cancel the work in the block when the client closes the connection.

    Raises:
        _Disconnected: the client closed the connection.
    """
    working = asyncio.current_task()
    disconnected = False

    async def watch() -> None:
        nonlocal disconnected
        while (await request.receive())["type"] != "http.disconnect":
            pass
        disconnected = True
        working.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not disconnected:
            raise
    finally:
        watching.cancel()
        # Either its own cancellation, or that of a block which had already finished.
        with suppress(asyncio.CancelledError):
            await watching
    if disconnected:
        working.uncancel()
        raise _Disconnected


def _usage(usage: Usage) -> UsageBody:
    return UsageBody(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(
            visual_tokens=usage.visual_tokens, cached_tokens=usage.reused_tokens
        ),
        time_to_first_token=usage.time_to_first_token,
    )


def _data(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
