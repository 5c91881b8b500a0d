"""Chat completions that ask about the person: CPER over adapters, or with the reasoner alone.

A request with ``elicit`` carries the conversation: its messages, the persona, and the counts that
the last response returned. The response carries them back. The server keeps none of it: when the
response is sent, no store, file, log, metric or prefix cache contains a word of it.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Annotated, Any, Literal

from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Histogram
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool

from v2l_fast.conversation.cper import MAX_TURNS, cper_turn
from v2l_fast.conversation.gap import Array
from v2l_fast.conversation.models import ChatModel, Encoder, Message, ModelError, ModelReply
from v2l_fast.conversation.persona import Persona
from v2l_fast.conversation.policy import CperSettings
from v2l_fast.conversation.schema import SHIPPED, Schema
from v2l_fast.conversation.state import Models, Reply, State, Turn
from v2l_fast.errors import ConfigError, V2LError
from v2l_fast.serving.http import ApiError, from_validation
from v2l_fast.serving.monitoring import log_event
from v2l_fast.serving.request import QueueFull
from v2l_fast.serving.schemas import ChatRequest
from v2l_fast.serving.server import Server

# Conversations that are answered at the same time: each holds a thread of the web server.
_TURNS = 8
_GAPS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5)
_NAME = Annotated[str, Field(max_length=160)]


class ElicitFields(BaseModel):
    """The field ``elicit`` of a chat request; ``asked``, ``last_action`` and ``stopped`` come from
    the last response."""

    model_config = ConfigDict(extra="forbid")

    knowledge: Annotated[str | dict[str, Any] | None, Field(alias="schema")] = "viewer"
    policy: Literal["slots", "threshold", "model"] | None = None
    candidates: Annotated[int, Field(ge=1, le=10)] = 5
    max_questions: Annotated[int, Field(ge=0, le=16)] = 3
    asked: Annotated[dict[_NAME, Annotated[int, Field(ge=0, le=1000)]], Field(max_length=64)] = {}
    last_action: Literal["answer", "ask", "both"] | None = None
    stopped: bool = False


class Elicitor:
    """Answers chat requests that have ``elicit``.

    Args:
        reasoner: reads the person and writes replies.
        encoder: encodes facts as vectors.
        registry: registry of the server's metrics.
    """

    def __init__(self, reasoner: ChatModel, encoder: Encoder, registry: CollectorRegistry) -> None:
        self.reasoner, self.encoder = reasoner, encoder
        self._permits = threading.Semaphore(_TURNS)
        self._actions = Counter(
            "v2l_elicit_turns", "Turns of conversations with elicit, by action.", ["action"],
            registry=registry,
        )  # fmt: skip
        self._gap = Histogram(
            "v2l_elicit_gap", "Knowledge gap about the person, by turn.", buckets=_GAPS,
            registry=registry,
        )  # fmt: skip
        self._calls = Histogram(
            "v2l_elicit_calls", "Requests to models in a turn.", buckets=(1, 2, 4, 8, 16, 32),
            registry=registry,
        )  # fmt: skip
        # At the level DEBUG these libraries log what they send.
        for name in ("openai", "httpx", "httpcore"):
            logging.getLogger(name).setLevel(logging.WARNING)

    def turn(self, server: Server, body: ChatRequest) -> dict[str, Any]:
        """The response to a request, JSON-ready; blocks until the reply is complete.

        Raises:
            ApiError: the request is not valid, or the reasoner does not reply.
            QueueFull: too many conversations are being answered.
        """
        start = time.perf_counter()
        fields, schema = _fields(body)
        exchanges, utterance = _exchanges(body)
        try:
            persona = Persona() if body.persona is None else Persona.from_dict(body.persona)
        except ConfigError as error:
            raise ApiError(400, f"persona: {error}", "invalid_value", "persona") from None
        alone = body.model == server.name and not body.video_ids
        answerer = None if alone else _ServerModel(server, body, start)
        settings = CperSettings(
            candidates=fields.candidates, policy=fields.policy, seed=body.seed or 0,
            max_questions=fields.max_questions,
            max_tokens=body.max_completion_tokens or body.max_tokens or CperSettings.max_tokens,
        )  # fmt: skip
        if not self._permits.acquire(blocking=False):
            raise QueueFull("too many conversations are being answered; try again later")
        try:
            state = self._state(persona, exchanges, fields)
            state, reply = cper_turn(
                state, utterance, Models(self.reasoner, self.encoder, answerer), settings, schema
            )
        except ModelError:
            # Its message may quote the conversation.
            raise ApiError(503, "the reasoner gives no reply", "reasoner_failed") from None
        finally:
            self._permits.release()
        self._actions.labels(reply.action).inc()
        self._gap.observe(reply.gap.value)
        self._calls.observe(reply.calls)
        log_event(
            "elicit", action=reply.action, calls=reply.calls, unreadable=len(reply.unreadable),
            seconds=round(time.perf_counter() - start, 6),
        )  # fmt: skip
        return _response(body, state, reply, time.perf_counter() - start)

    def _state(
        self, persona: Persona, exchanges: Sequence[tuple[str, str]], fields: ElicitFields
    ) -> State:
        """The conversation, with the vector of the facts that were known after each turn."""
        recent = exchanges[-MAX_TURNS:]
        first = len(exchanges) - len(recent)
        turns = [
            Turn(user, reply, "ask" if reply.rstrip().endswith("?") else "answer", None)
            for user, reply in recent
        ]
        if turns and fields.last_action is not None:
            turns[-1] = replace(turns[-1], action=fields.last_action)
        texts = [
            ". ".join(
                fact.text for fact in persona.active
                if fact.source != "inferred" and fact.turn <= first + index
            )
            for index in range(len(recent))
        ]  # fmt: skip
        distinct = [text for text in dict.fromkeys(texts) if text]
        encoded: dict[str, Array] = {}
        if distinct:
            encoded = dict(zip(distinct, self.encoder.encode(distinct), strict=True))
        return State(
            persona, tuple(turns), tuple(encoded.get(text) for text in texts),
            dict(fields.asked), len(exchanges), fields.stopped,
        )  # fmt: skip


class _ServerModel:
    """The server's own model with the adapters that a request names."""

    def __init__(self, server: Server, body: ChatRequest, start: float) -> None:
        self._server, self._body = server, body
        self._deadline = start + server.limits.answer_seconds

    def complete(
        self,
        messages: Sequence[Message],
        *,
        n: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_tokens: int = 400,
        seed: int = 0,
        json: bool = False,
    ) -> list[ModelReply]:
        requests = [
            self._server.engine.submit(
                self._server.question(
                    self._request(messages, temperature, top_p, max_tokens, seed + i), private=True
                )
            )
            for i in range(n)
        ]
        try:
            results = [
                request.result(max(self._deadline - time.perf_counter(), 0.0))
                for request in requests
            ]
        except BaseException:
            for request in requests:
                request.cancel()
            raise
        return [
            ModelReply(text, usage.prompt_tokens, usage.completion_tokens)
            for text, _, usage in results
        ]

    def look_again(self, question: str, max_tokens: int) -> ModelReply | None:
        """The answer with the video in context; None if its file is not kept."""
        messages = [{"role": "user", "content": question}]
        chat = self._request(messages, 0.0, 1.0, max_tokens, 0)
        try:
            chat = chat.model_copy(update={"video_mode": "context"})
            request = self._server.question(chat, private=True)
        except (ApiError, V2LError):
            return None
        text, _, usage = self._server.engine.submit(request).result(
            max(self._deadline - time.perf_counter(), 0.0)
        )
        return ModelReply(text, usage.prompt_tokens, usage.completion_tokens)

    def _request(
        self,
        messages: Sequence[Message],
        temperature: float,
        top_p: float,
        max_tokens: int,
        seed: int,
    ) -> ChatRequest:
        return ChatRequest.model_validate(
            {
                "model": self._body.model, "video_ids": self._body.video_ids,
                "messages": [dict(message) for message in messages], "temperature": temperature,
                "top_p": top_p, "max_tokens": min(max_tokens, self._server.limits.new_tokens),
                "seed": seed,
            }
        )  # fmt: skip


async def answer(server: Server, body: ChatRequest) -> Any:
    """The response to a chat request with ``elicit``, streamed or not.

    Raises:
        ApiError: the server has no reasoner, or see :meth:`Elicitor.turn`.
    """
    elicitor = server.elicitor
    if elicitor is None:
        message = "this server does not ask about people; start it with --reasoner"
        raise ApiError(400, message, "unsupported_value", "elicit")
    content = await run_in_threadpool(elicitor.turn, server, body)
    if not body.stream:
        return JSONResponse(content)
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    return StreamingResponse(_events(content, bool(include_usage)), media_type="text/event-stream")


def _fields(body: ChatRequest) -> tuple[ElicitFields, Schema | None]:
    try:
        fields = ElicitFields.model_validate(body.elicit)
    except ValidationError as error:
        invalid = from_validation([dict(item) for item in error.errors(include_url=False)])
        param = "elicit" if invalid.param is None else f"elicit.{invalid.param}"
        raise ApiError(400, invalid.message, invalid.code, param) from None
    if fields.knowledge is None:
        return fields, None
    try:
        if isinstance(fields.knowledge, str):
            # A caller may name a shipped schema, but not a file of the server.
            names = sorted(file.stem for file in SHIPPED.glob("*.toml"))
            if fields.knowledge not in names:
                raise ConfigError(f"must be {', '.join(names)}, or a table of slots")
            return fields, Schema.load(fields.knowledge)
        return fields, Schema.from_dict("request", fields.knowledge)
    except ConfigError as error:
        raise ApiError(400, f"schema: {error}", "invalid_value", "elicit.schema") from None


def _exchanges(body: ChatRequest) -> tuple[list[tuple[str, str]], str]:
    """Earlier (person, assistant) pairs, and the person's current utterance. System messages are
    ignored: they come from the operator."""
    messages = [m for m in body.messages if m.role in ("user", "assistant")]
    if not messages or messages[-1].role != "user" or not messages[-1].text.strip():
        raise ApiError(400, "the last message must be the person's", "invalid_value", "messages")
    exchanges: list[tuple[str, str]] = []
    user = ""
    for message in messages[:-1]:
        if message.role == "user":
            user = f"{user}\n{message.text}".strip()
        elif user:
            exchanges.append((user, message.text))
            user = ""
    return exchanges, f"{user}\n{messages[-1].text}".strip()


def _response(body: ChatRequest, state: State, reply: Reply, seconds: float) -> dict[str, Any]:
    looked_again = reply.video is not None and reply.video.looked_again
    message = {"role": "assistant", "content": reply.text}
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion",
        "created": int(time.time()), "model": body.model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
        "usage": {
            "prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.new_tokens,
            "total_tokens": reply.prompt_tokens + reply.new_tokens,
            "time_to_first_token": seconds,
        },
        "persona": state.persona.to_dict(),
        "gap": asdict(reply.gap),
        "elicit": {
            "action": reply.action, "target": reply.target,
            "facts": [fact.id for fact in reply.facts], "selected": list(reply.selected),
            "looked_again": looked_again, "calls": reply.calls,
            "asked": dict(state.asked), "last_action": reply.action, "stopped": state.stopped,
        },
    }  # fmt: skip


def _events(content: dict[str, Any], include_usage: bool) -> Iterator[str]:
    """The response as server-sent events: the whole text, then a last one with the state."""
    (choice,) = content["choices"]
    frame = {
        name: content[name] for name in ("id", "created", "model")
    } | {"object": "chat.completion.chunk"}  # fmt: skip
    for delta, reason in ((choice["message"], None), ({}, "stop")):
        piece = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        extra = {n: content[n] for n in ("persona", "gap", "elicit")} if reason else {}
        extra |= {"usage": None} if include_usage else {}
        yield f"data: {json.dumps({**frame, 'choices': [piece], **extra})}\n\n"
    if include_usage:
        yield f"data: {json.dumps({**frame, 'choices': [], 'usage': content['usage']})}\n\n"
    yield "data: [DONE]\n\n"
