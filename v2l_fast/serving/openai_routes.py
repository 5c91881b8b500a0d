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
from v2l_fast.serving import logs
from v2l_fast.serving.auth import documented
from v2l_fast.serving.http_errors import ApiError, body, responses, translate
from v2l_fast.serving.json_body import JsonRoute
from v2l_fast.serving.requests import Chunk, Generation, Usage
from v2l_fast.serving.schemas import (
    AnswerMessage,
    ChatCompletion,
    ChatRequest,
    Choice,
    ErrorResponse,
    ModelBody,
    ModelList,
    PromptTokensDetails,
    UsageBody,
)
from v2l_fast.serving.server import Server

router = APIRouter(
    prefix="/v1", tags=["OpenAI"], dependencies=[Depends(documented)], route_class=JsonRoute
)

_CLOSED_BY_CLIENT = 499
_STREAM = {
    200: {
        "description": "The answer; as server-sent events when `stream` is set",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


@router.get("/models", responses=responses(401, 503))
def models(request: Request) -> ModelList:
    """The base model, then every adapter."""
    server: Server = request.app.state.server
    base = ModelBody(id=server.name, created=request.app.state.started, parent=None)
    adapters = [_model(server, record.id, record.created) for record in server.adapters()]
    return ModelList(data=[base, *adapters])


@router.get("/models/{model:path}", responses=responses(401, 404, 409, 503))
def model(model: str, request: Request) -> ModelBody:
    """One of them."""
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
    responses=_STREAM | responses(400, 401, 404, 408, 409, 413, 415, 503),
)
async def chat(chat: ChatRequest, request: Request) -> Any:
    """Answer a question from adapters, from the video in context, or from the plain model."""
    server: Server = request.app.state.server
    answer = _Answer(server, chat)
    try:
        async with _leaving(request, answer):
            await answer.begin()
        if chat.stream:
            usage = chat.stream_options is not None and bool(chat.stream_options.include_usage)
            return StreamingResponse(
                answer.events(usage),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
                background=BackgroundTask(answer.close),
            )
        async with _leaving(request, answer):
            return await answer.whole()
    except _Gone:
        # Nobody reads this; the log line has the status that proxies use for it.
        return JSONResponse(None, _CLOSED_BY_CLIENT)


class _Gone(Exception):
    """The client has closed the connection."""


class _Answer:
    """One answer: its pieces, its times, what is counted when it ends."""

    def __init__(self, server: Server, chat: ChatRequest) -> None:
        self._server = server
        self._chat = chat
        self._arrived = time.perf_counter()
        self._deadline = self._arrived + server.limits.answer_seconds
        self._first: float | None = None
        self._latest = self._arrived
        self._source = "plain"
        self._generation: Generation | None = None
        self._chunks: AsyncIterator[Chunk] | None = None
        self._opening: Chunk | None = None
        self._counted = False
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())

    async def begin(self) -> None:
        """Submit the question and wait for the first piece, so that a refusal has its status."""
        try:
            # Tokenizes, reads an adapter that is not in memory, decodes a video.
            async with self._in_time():
                await run_in_threadpool(self._submit)
            self._chunks = self._generation.chunks()
            self._opening = await self._next()
            self._first = self._latest = time.perf_counter()
        except BaseException as error:
            self._end(error)
            raise

    def _submit(self) -> None:
        asked = self._server.question(self._chat)
        self._source = asked.source
        # Set here and not from a result, which is lost when the client leaves as it is returned.
        self._generation = self._server.engine.submit(asked.request)
        if self._counted:
            # The client left or time ran out meanwhile.
            self._generation.cancel()

    def close(self) -> None:
        """Nobody reads the rest, if there is one."""
        self._end(_Gone())

    async def whole(self) -> ChatCompletion:
        """The complete answer."""
        try:
            pieces = [chunk async for chunk in self._pieces()]
            usage = _usage(self._generation.usage)
        except BaseException as error:
            self._end(error)
            raise
        self._end(None, pieces[-1].finish_reason, usage)
        message = AnswerMessage(content="".join(piece.text for piece in pieces))
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self._chat.model,
            choices=[Choice(message=message, finish_reason=pieces[-1].finish_reason)],
            usage=usage,
        )

    async def events(self, include_usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events; an error on the way is the last one."""
        try:
            yield self._event({"role": "assistant", "content": ""})
            async for piece in self._pieces():
                if piece.text:
                    yield self._event({"content": piece.text})
            yield self._event({}, piece.finish_reason)
            usage = _usage(self._generation.usage)
            self._end(None, piece.finish_reason, usage)
            if include_usage:
                yield _data(self._frame([]) | {"usage": usage.model_dump()})
            yield "data: [DONE]\n\n"
        except (V2LError, ApiError, TimeoutError) as error:
            self._end(error)
            yield _data(ErrorResponse(error=body(translate(error))).model_dump())
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
                self._server.metrics.next_token(self._source, self._latest - before)

    async def _next(self) -> Chunk:
        """The next piece; TimeoutError when the answer's time is over."""
        async with self._in_time():
            piece = await anext(self._chunks, None)
        if piece is None or piece.finish_reason == "cancelled":
            raise ApiError(503, "the answer was stopped", "cancelled")
        return piece

    def _in_time(self) -> asyncio.Timeout:
        return asyncio.timeout(self._deadline - time.perf_counter())

    def _event(self, delta: dict[str, str], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _data(self._frame([choice]))

    def _frame(self, choices: list[dict]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self._chat.model,
            "choices": choices,
        }

    def _end(
        self, error: BaseException | None, reason: str = "", usage: UsageBody | None = None
    ) -> None:
        """Free the engine's row if it still runs, and count once how this ended."""
        if self._counted:
            return
        # Before the look at the generation: the thread that submits it looks the other way round.
        self._counted = True
        if error is not None and self._generation is not None:
            self._generation.cancel()
        if isinstance(error, V2LError | ApiError | TimeoutError):
            reason = translate(error).code or "error"
        elif error is not None:
            reason = "cancelled"
        metrics, now = self._server.metrics, time.perf_counter()
        metrics.answered(self._source, reason)
        fields = {"source": self._source, "end": reason, "seconds": round(now - self._arrived, 6)}
        if usage is not None and self._first is not None:
            first = self._first - self._arrived
            metrics.first_token(self._source, first)
            fields |= {
                "first_token": round(first, 6),
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "visual_tokens": usage.prompt_tokens_details.visual_tokens,
            }
        logs.event("answer", **fields)


@asynccontextmanager
async def _leaving(request: Request, answer: _Answer) -> AsyncIterator[None]:
    """Stop what is done within the block when the client closes the connection."""
    working = asyncio.current_task()
    left = False

    async def watch() -> None:
        nonlocal left
        while (await request.receive())["type"] != "http.disconnect":
            pass
        left = True
        working.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not left:
            raise
    finally:
        watching.cancel()
        # Its end, or the cancellation of a block that was through already.
        with suppress(asyncio.CancelledError):
            await watching
    if left:
        working.uncancel()
        raise _Gone


def _usage(usage: Usage) -> UsageBody:
    return UsageBody(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(visual_tokens=usage.visual_tokens),
        time_to_first_token=usage.time_to_first_token,
    )


def _data(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
