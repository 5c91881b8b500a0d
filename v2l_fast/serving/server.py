"""One server without HTTP: its parts, and its answers about videos and questions."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from v2l_fast.errors import AdapterError, ConfigError, V2LError
from v2l_fast.generation import SamplingParams
from v2l_fast.model import Video2LoRA
from v2l_fast.serving.engine import Engine
from v2l_fast.serving.gate import AllowedHosts, ApiKeys, MediaSources
from v2l_fast.serving.grammar import ANY_OBJECT, JsonConstraint, JsonGrammars
from v2l_fast.serving.http import ApiError, error_body, to_api_error
from v2l_fast.serving.jobs import Job, Jobs
from v2l_fast.serving.monitoring import Metrics
from v2l_fast.serving.replicas import UNLOAD_SECONDS, Replica, unload_everywhere
from v2l_fast.serving.request import QueueFull, StreamingRequest
from v2l_fast.serving.sandbox import VideoReader
from v2l_fast.serving.schemas import ChatRequest, Deleted, ReplicaDeletion, ServerLimits, VideoBody
from v2l_fast.serving.videos import VideoFolder
from v2l_fast.store.adapter_store import AdapterStore, InternalizeSettings
from v2l_fast.store.folder import StoredAdapter
from v2l_fast.video import Clip
from v2l_fast.vlm import Message, Question

log = logging.getLogger(__name__)


class Conversations(Protocol):
    """Answers chat requests that ask about the person, with a server's engine and adapters."""

    def turn(self, server: Server, body: ChatRequest) -> dict[str, Any]:
        """The response to a request, JSON-ready; blocks until the reply is complete."""


DEFAULT_NEW_TOKENS = 256
# Decoded videos kept in memory for further questions with the video in context.
_CACHED_CLIPS = 4
# Videos decoded for such questions at the same time, and questions that decode or wait for it: each
# holds a thread of the web server.
_DECODING, _CONTEXTS = 2, 8


class Server:
    """Engine, store and kept videos of one model under one set of limits.

    Args:
        reader: reads the videos of the server and of its engine.
        name: name of the base model in ``/v1/models``.
        root: folder from which callers may name files; None if they may not.
        peft_base: name of the base in downloaded PEFT adapters.
        hosts: names under which the server may be reached; only this machine's if omitted.
        media: hosts that http(s) URLs in messages may lead to; none if omitted.
        replicas: servers that answer from the published adapters; deletions reach them.
    """

    def __init__(
        self,
        model: Video2LoRA,
        engine: Engine,
        store: AdapterStore,
        reader: VideoReader,
        name: str,
        limits: ServerLimits | None = None,
        keys: ApiKeys | None = None,
        root: Path | None = None,
        peft_base: str | None = None,
        hosts: AllowedHosts | None = None,
        media: MediaSources | None = None,
        replicas: Sequence[Replica] = (),
    ) -> None:
        self.model, self.engine, self.store, self.name = model, engine, store, name
        self.reader = reader
        self.limits = limits or ServerLimits()
        self.keys = keys or ApiKeys([])
        self.hosts = hosts or AllowedHosts()
        self.media_sources = media or MediaSources()
        self._replicas = [replica.with_timeout(UNLOAD_SECONDS) for replica in replicas]
        self.root = root
        self.peft_base = peft_base or model.config.base_model_name_or_path or name
        self.settings = InternalizeSettings.of(model)
        self.metrics = Metrics(engine.stats, lambda: len(self.adapters()))
        self.videos = VideoFolder(
            store.folder / "videos", store.staging, self.limits.kept_video_bytes
        )
        self.jobs = Jobs(
            engine, store, reader, self.videos, self.settings, self.limits, self.metrics
        )
        self.jobs.remove_orphans()
        # Answers chat requests that ask about the person; None without a reasoner.
        self.elicitor: Conversations | None = None
        backbone = model.backbone
        self._grammars = JsonGrammars(backbone.tokenizer, tuple(backbone.stop_ids))
        self._clips: OrderedDict[str, Clip] = OrderedDict()
        self._decoding = threading.Semaphore(_DECODING)
        self._contexts = threading.Semaphore(_CONTEXTS)

    # --- adapters -----------------------------------------------------------------------------

    def adapters(self) -> list[StoredAdapter]:
        """This model's adapters, the newest first; the folder may hold other models'."""
        fingerprint = self.settings.hypernetwork
        return [r for r in self.store.list() if r.hypernetwork in (fingerprint, None)]

    def resolve(self, video_id: str, field: str | None = None) -> str:
        """The adapter's id for an adapter's or a job's id, alone or as ``base:id``.

        Args:
            field: of the request that has the id, for the error.

        Raises:
            ApiError: 404 if there is none, 409 if its job has not ended, failed or was cancelled.
        """
        # "base:adapter", as routers write it.
        video_id = video_id.removeprefix(f"{self.name}:")
        job = self.jobs.get(video_id)
        if job is not None:
            if job.work.state == "failed":
                raise ApiError(409, "internalizing this video failed", "video_failed", field)
            if job.work.state == "cancelled":
                message = "internalizing this video was cancelled"
                raise ApiError(409, message, "video_cancelled", field)
            if job.work.adapter_id is None:
                message = "this video is still being internalized"
                raise ApiError(409, message, "video_not_ready", field)
            video_id = job.work.adapter_id
        if video_id not in self.store:
            raise ApiError(404, "no such video or model", "model_not_found", field)
        return video_id

    def describe(self, video_id: str) -> VideoBody:
        """Describe an adapter or a job.

        Raises:
            ApiError: 404 if there is neither.
        """
        job = self.jobs.get(video_id)
        if job is not None and job.work.adapter_id is None:
            return self.describe_job(job)
        adapter_id = self.resolve(video_id)
        try:
            stored = self.store.describe(adapter_id)
        except AdapterError as error:
            raise to_api_error(error) from None
        return self.describe_adapter(stored, job)

    def describe_adapter(self, record: StoredAdapter, job: Job | None = None) -> VideoBody:
        """Describe an adapter, and the job it came from if that is remembered."""
        return VideoBody(
            id=record.id if job is None else job.id,
            status="completed",
            progress=1.0,
            adapter_id=record.id,
            created=int(record.created),
            name=self.videos.name(record.video) or record.name,
            frames=record.frames,
            duration=record.duration,
            bytes=record.bytes,
            rank=record.rank,
            seconds=None if job is None else dict(job.work.seconds),
            in_context=self.videos.has(record.video),
        )

    def describe_job(self, job: Job) -> VideoBody:
        """Describe a job that has no adapter yet."""
        work = job.work
        error = error_body(to_api_error(work.error)) if work.state == "failed" else None
        return VideoBody(
            id=job.id,
            status="generating" if work.state == "done" else work.state,
            progress=min(max(work.progress, 0.0), 1.0),
            adapter_id=None,
            error=error,
            created=int(job.created),
            name=job.name,
            seconds=dict(work.seconds),
            in_context=False,
        )

    def delete(self, video_id: str) -> Deleted:
        """Cancel a job, or remove an adapter, and its video if it has no other adapter.

        A job that several uploads share loses one of them; the last one cancels it. An adapter is
        removed from the replicas, too; the result says which of them may still have it.

        Raises:
            ApiError: 404 or 409 as :meth:`resolve`.
            StoreError: the folder cannot be written.
        """
        job = self.jobs.get(video_id)
        if job is not None and job.work.state not in ("done", "failed"):
            if self.jobs.withdraw(job):
                return Deleted(id=video_id)
            # Its adapter is being stored, which takes a moment; resolve() reports an error.
            with suppress(V2LError):
                job.work.wait()
        adapter_id = self.resolve(video_id)
        try:
            video = self.store.describe(adapter_id).video
            self.store.delete(adapter_id)
        except AdapterError as error:
            raise to_api_error(error) from None
        self.engine.forget(adapter_id)
        self._clips.pop(adapter_id, None)
        if video is not None:
            self.videos.delete(video, lambda: any(r.video == video for r in self.store.list()))
        return Deleted(id=adapter_id, replicas=self._unload(adapter_id))

    def _unload(self, adapter_id: str) -> list[ReplicaDeletion] | None:
        """Remove an adapter from the replicas; None if there are none."""
        if not self._replicas:
            return None
        results = unload_everywhere(self._replicas, adapter_id)
        for result in results:
            failed = result.error is not None
            self.metrics.count_unload(
                "failed" if failed else "unloaded" if result.unloaded else "absent"
            )
            if failed:
                log.warning("%s: may still have %s: %s", result.url, adapter_id, result.error)
        return [ReplicaDeletion(**asdict(result)) for result in results]

    # --- questions ----------------------------------------------------------------------------

    def question(self, chat: ChatRequest, private: bool = False) -> StreamingRequest:
        """The engine's request for a chat request; decodes the video if it goes into context.

        Args:
            private: see :class:`StreamingRequest`.

        Raises:
            ApiError: the request cannot be answered.
            VideoError: the video cannot be decoded.
            QueueFull: too many videos are being decoded for questions.
        """
        question = conversation(chat)
        ids, stop = list(chat.video_ids or ()), tuple(chat.stop or ())
        if chat.model != self.name:
            if ids:
                raise ApiError(
                    400, f"model must be {self.name} with video_ids", "invalid_value", "model"
                )
            ids = [chat.model]
        field = "video_ids" if chat.video_ids else "model"
        adapters = tuple(self.resolve(i, field) for i in ids)
        sampling, constraint = self._sampling(chat), self._constraint(chat)
        clip = None
        if chat.video_mode == "context":
            if len(adapters) != 1:
                raise ApiError(
                    400, "video_mode context needs exactly one video", "invalid_value", "video_ids"
                )
            clip, adapters = self._clip(adapters[0]), ()
        return StreamingRequest(question, adapters, clip, sampling, stop, constraint, private)

    def _sampling(self, chat: ChatRequest) -> SamplingParams:
        if chat.top_logprobs and not chat.logprobs:
            message = "top_logprobs needs logprobs to be true"
            raise ApiError(400, message, "invalid_value", "top_logprobs")
        limit = self.limits.new_tokens
        max_new_tokens = (
            chat.max_completion_tokens or chat.max_tokens or min(DEFAULT_NEW_TOKENS, limit)
        )
        if max_new_tokens > limit:
            message = f"max_tokens must be at most {limit} here, got {max_new_tokens}"
            raise ApiError(400, message, "invalid_value", "max_tokens")
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=chat.temperature or 0.0,
            top_p=1.0 if chat.top_p is None else chat.top_p,
            top_k=chat.top_k or 0,
            seed=chat.seed or 0,
            n=chat.n or 1,
            logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
        )

    def _constraint(self, chat: ChatRequest) -> Callable[[], JsonConstraint] | None:
        """A function that makes the constraint of one answer; None for text."""
        form = chat.response_format
        if form is None or form.type == "text":
            return None
        schema = ANY_OBJECT
        if form.type == "json_schema" and form.json_schema is not None:
            schema = form.json_schema.definition
        try:
            return self._grammars.constraint(schema)
        except ConfigError as error:
            message = f"response_format: {error}"
            raise ApiError(400, message, "invalid_value", "response_format") from None

    def _clip(self, adapter_id: str) -> Clip:
        """The frames of an adapter's video, decoded again; the last few videos stay in memory."""
        clip = self._clips.get(adapter_id)
        if clip is not None:
            return clip
        gone = ApiError(409, "the video's file is no longer kept; upload it again", "video_gone")
        provenance = self.store.get(adapter_id).provenance
        source = provenance.get("source", {})
        video = self.videos.use(source.get("sha256"))
        if video is None:
            raise gone
        try:
            with try_acquire(self._contexts), self._decoding:
                clip = self.reader.load(
                    video.path,
                    self.model.config.sampling.override(
                        len(source["frame_indices"]),
                        provenance["preprocessing"]["longest_edge"],
                        exact_frames=provenance["preprocessing"]["exact_frames"],
                    ),
                    sha256=video.trusted_sha256,
                )
        finally:
            self.jobs.release(video.sha256)
        if clip.sha256 != video.sha256:
            # A linked file that was replaced.
            raise gone
        self._clips[adapter_id] = clip
        while len(self._clips) > _CACHED_CLIPS:
            self._clips.popitem(last=False)
        return clip


@contextmanager
def try_acquire(permits: threading.Semaphore) -> Iterator[None]:
    """Hold a permit; raise QueueFull instead of blocking a thread if there is none."""
    if not permits.acquire(blocking=False):
        raise QueueFull("too many videos are being read; try again later")
    try:
        yield
    finally:
        permits.release()


def conversation(chat: ChatRequest) -> Question:
    """The question, or the conversation that ends with it; empty system messages are left out.

    Raises:
        ApiError: a message that cannot be answered or has no text.
    """
    messages: list[Message] = []
    for number, message in enumerate(chat.messages):
        role = "system" if message.role == "developer" else message.role
        if role not in ("system", "user", "assistant"):
            raise _unsupported(
                f"message {number} has the role {role}: tools are not supported; send system, user "
                "and assistant messages, or one user message"
            )
        if role == "assistant" and message.content is None:
            raise _unsupported(
                f"assistant message {number} has no content: tool calls are not supported; send "
                "its text, or one user message without earlier turns"
            )
        if message.text or role != "system":
            messages.append({"role": role, "content": message.text})
    last = chat.messages[-1]
    if last.role != "user":
        raise _unsupported("the last message must be the user's question; end with a user message")
    if not last.text.strip():
        raise ApiError(400, "the question is empty", "invalid_value", "messages")
    return last.text if len(messages) == 1 else messages


def _unsupported(message: str) -> ApiError:
    return ApiError(400, message, "unsupported_conversation", "messages")
