"""The routes of OpenAI's interface: models and chat completions, streamed or not."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool

from v2l_fast.errors import V2LError
from v2l_fast.generation.sampling import TokenLogprobs
from v2l_fast.serving import elicit
from v2l_fast.serving.gate import api_key_scheme
from v2l_fast.serving.http import ApiError, JsonRoute, error_body, error_responses, to_api_error
from v2l_fast.serving.media import MediaInbox
from v2l_fast.serving.monitoring import log_event
from v2l_fast.serving.request import Chunk, StreamingRequest
from v2l_fast.serving.schemas import (
    ChatCompletion,
    ChatRequest,
    Choice,
    ChoiceLogprobs,
    CompletionMessage,
    ErrorResponse,
    ModelBody,
    ModelList,
    PromptTokensDetails,
    TokenLogprob,
    TopLogprob,
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
    media: MediaInbox = request.app.state.media
    if body.elicit is not None:
        text_only = body.response_format is None or body.response_format.type == "text"
        if (body.n or 1) > 1 or body.logprobs or not text_only:
            message = "elicit gives one answer as text: leave out n, logprobs and response_format"
            raise ApiError(400, message, "invalid_value", "elicit")
        return await elicit.answer(server, await media.internalize(body))
    completion = Completion(server, body, media)
    try:
        async with _cancel_on_disconnect(request):
            await completion.begin()
        if body.stream:
            return StreamingResponse(
                completion.events(),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
                background=BackgroundTask(completion.close),
            )
        async with _cancel_on_disconnect(request):
            return await completion.whole()
    except _Disconnected:
        # No client reads this response; its status, as proxies use it, appears in the log.
        return JSONResponse(None, _CLIENT_CLOSED_REQUEST)


class _Disconnected(Exception):
    """The client closed the connection."""


class Completion:
    """One chat completion: its pieces, its times, and its metrics when it ends."""

    def __init__(self, server: Server, body: ChatRequest, media: MediaInbox) -> None:
        self._server = server
        self._body = body
        self._media = media
        self._usage_in_chunks = body.stream_options is not None and bool(
            body.stream_options.include_usage
        )
        self._arrived = time.perf_counter()
        self._deadline = self._arrived + server.limits.answer_seconds
        self._first: float | None = None
        self._latest = self._arrived
        self._source = "plain"
        self._requests: list[StreamingRequest] = []
        self._chunks: AsyncIterator[tuple[int, Chunk]] | None = None
        self._opening: tuple[int, Chunk] | None = None
        self._ended = False
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())

    async def begin(self) -> None:
        """Submit the question and wait for the first piece, so that an error has its status."""
        try:
            async with self._in_time():
                self._body = await self._media.internalize(self._body)
                # In a thread: it tokenizes, and may read an adapter or decode a video.
                await run_in_threadpool(self._submit)
            self._chunks = _merge([request.chunks() for request in self._requests])
            self._opening = await self._next()
            self._first = self._latest = time.perf_counter()
        except BaseException as error:
            self._end(error)
            raise

    def _submit(self) -> None:
        request = self._server.question(self._body)
        self._source = request.source
        # Set here: a returned value would be lost if the client left at that moment.
        self._requests = self._server.engine.submit_all(request)
        if self._ended:
            # The client left or time ran out in the meantime.
            self._cancel()

    def _cancel(self) -> None:
        for request in self._requests:
            request.cancel()

    def close(self) -> None:
        """End the completion if it still runs, because its client no longer reads it."""
        self._end(_Disconnected())

    async def whole(self) -> ChatCompletion:
        """The complete answers."""
        answers: list[list[Chunk]] = [[] for _ in self._requests]
        try:
            async for index, piece in self._pieces():
                answers[index].append(piece)
            usage = self._usage()
        except BaseException as error:
            self._end(error)
            raise
        self._end(None, answers[0][-1].finish_reason or "", usage)
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self._body.model,
            choices=[self._choice(index, pieces) for index, pieces in enumerate(answers)],
            usage=usage,
        )

    def _choice(self, index: int, pieces: list[Chunk]) -> Choice:
        logprobs = [token for piece in pieces for token in piece.logprobs]
        return Choice(
            index=index,
            message=CompletionMessage(content="".join(piece.text for piece in pieces)),
            finish_reason=pieces[-1].finish_reason,
            logprobs=self._logprobs(logprobs),
        )

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events; an error in the middle is the last one."""
        try:
            for index in range(len(self._requests)):
                yield self._event(index, {"role": "assistant", "content": ""})
            async for index, piece in self._pieces():
                if piece.text or piece.logprobs:
                    logprobs = self._logprobs(piece.logprobs)
                    yield self._event(index, {"content": piece.text}, logprobs=logprobs)
                if piece.finish_reason is not None:
                    yield self._event(index, {}, piece.finish_reason)
            usage = self._usage()
            self._end(None, piece.finish_reason or "", usage)
            if self._usage_in_chunks:
                yield _data(self._frame([]) | {"usage": usage.model_dump()})
            yield "data: [DONE]\n\n"
        except (V2LError, ApiError, TimeoutError) as error:
            self._end(error)
            yield _data(ErrorResponse(error=error_body(to_api_error(error))).model_dump())
        except BaseException as error:
            self._end(error)
            raise

    async def _pieces(self) -> AsyncIterator[tuple[int, Chunk]]:
        """The pieces of all answers as they come, each with the index of its answer."""
        assert self._opening is not None
        index, piece = self._opening
        latest = {index: self._latest}
        unfinished = len(self._requests)
        while True:
            yield index, piece
            unfinished -= piece.finish_reason is not None
            if not unfinished:
                return
            index, piece = await self._next()
            if piece.text:
                now = time.perf_counter()
                if index in latest:
                    self._server.metrics.observe_next_token(self._source, now - latest[index])
                latest[index] = now

    async def _next(self) -> tuple[int, Chunk]:
        """The next piece; TimeoutError after the answer's time limit."""
        assert self._chunks is not None
        async with self._in_time():
            entry = await anext(self._chunks, None)
        if entry is None or entry[1].finish_reason == "cancelled":
            raise ApiError(503, "the answer was cancelled", "cancelled")
        return entry

    def _in_time(self) -> asyncio.Timeout:
        return asyncio.timeout(self._deadline - time.perf_counter())

    def _event(
        self,
        index: int,
        delta: dict[str, str],
        reason: str | None = None,
        logprobs: ChoiceLogprobs | None = None,
    ) -> str:
        content = None if logprobs is None else logprobs.model_dump()
        choice = {"index": index, "delta": delta, "logprobs": content, "finish_reason": reason}
        return _data(self._frame([choice]))

    def _logprobs(self, tokens: Sequence[TokenLogprobs]) -> ChoiceLogprobs | None:
        """Log probabilities with the tokens' text; None if the request does not ask for them."""
        if not self._body.logprobs:
            return None
        decode = self._server.model.backbone.decode

        def described(token: int, logprob: float) -> dict[str, Any]:
            text = decode([token], strip=False)
            return {
                "token": text,
                "logprob": logprob,
                "bytes": None if "\ufffd" in text else list(text.encode()),
            }

        content = [
            TokenLogprob(
                **described(token.token, token.logprob),
                top_logprobs=[TopLogprob(**described(*pair)) for pair in token.top],
            )
            for token in tokens
        ]
        return ChoiceLogprobs(content=content)

    def _usage(self) -> UsageBody:
        """The token counts of all answers; the prompt is counted once."""
        usages = [request.usage for request in self._requests if request.usage is not None]
        completion = sum(usage.completion_tokens for usage in usages)
        prompt = usages[0].prompt_tokens
        return UsageBody(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(
                visual_tokens=usages[0].visual_tokens, cached_tokens=usages[0].reused_tokens
            ),
            time_to_first_token=min(usage.time_to_first_token for usage in usages),
        )

    def _frame(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        frame = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self._body.model,
            "choices": choices,
        }
        # If the client requests usage, every chunk has the field; only in the last it is not null.
        return frame | {"usage": None} if self._usage_in_chunks else frame

    def _end(
        self, error: BaseException | None, reason: str = "", usage: UsageBody | None = None
    ) -> None:
        """Cancel the requests after an error, and record once how the completion ended."""
        if self._ended:
            return
        # Set before the request is read: the thread in _submit writes first, then reads.
        self._ended = True
        if error is not None:
            self._cancel()
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


async def _merge(
    iterators: Sequence[AsyncIterator[Chunk]],
) -> AsyncGenerator[tuple[int, Chunk], None]:
    """The items of all iterators as they come, each with the index of its iterator."""
    if len(iterators) == 1:
        async for item in iterators[0]:
            yield 0, item
        return
    queue: asyncio.Queue[tuple[int, Chunk | Exception | None]] = asyncio.Queue()

    async def read(index: int, iterator: AsyncIterator[Chunk]) -> None:
        end: Exception | None = None
        try:
            async for item in iterator:
                queue.put_nowait((index, item))
        except Exception as error:
            end = error
        queue.put_nowait((index, end))

    tasks = [asyncio.create_task(read(*pair)) for pair in enumerate(iterators)]
    try:
        running = len(tasks)
        while running:
            index, entry = await queue.get()
            if isinstance(entry, Exception):
                raise entry
            if entry is None:
                running -= 1
            else:
                yield index, entry
    finally:
        for task in tasks:
            task.cancel()


def _data(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
