"""A request of the engine, from its submission to the last piece of its answer.

:class:`StreamingRequest` is the one object that the caller, the scheduler and the model runner
share. The engine's thread writes its answer; any other thread or event loop reads it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from v2l_fast.errors import AdapterError, ConfigError, V2LError
from v2l_fast.generation.runner import Request
from v2l_fast.generation.sampling import SamplingParams, TokenConstraint, TokenLogprobs
from v2l_fast.video import Clip
from v2l_fast.vlm import Question

if TYPE_CHECKING:
    from v2l_fast.serving.device_cache import HostAdapter

log = logging.getLogger(__name__)

# Incomplete UTF-8 decodes to this character, once for each byte of at most 3.
_REPLACEMENT = "\ufffd"
_MAX_PENDING = 3
# Ids decoded at a time, so that a token costs the same however long an answer is.
_WINDOW = 64


class QueueFull(V2LError):
    """The limit on waiting requests or jobs is reached; try again later."""


class OtherAdapter(AdapterError):
    """The engine answers only from the adapter merged into its weights, and this is another one."""


class EngineClosed(V2LError):
    """The engine is shutting down."""


def user_facing_error(error: Exception) -> V2LError:
    """The error to report to the user; a bug is logged with its traceback."""
    if isinstance(error, V2LError):
        return error
    log.error("unexpected error in the engine", exc_info=error)
    return V2LError(f"internal error: {type(error).__name__}; see the server's log")


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer.

    Attributes:
        text: the text after the previous piece; text that may begin a stop string is held back.
        finish_reason: "stop", "length" or "cancelled" in the last piece, else None.
        logprobs: those of the tokens since the previous piece, if the request asks for them.
    """

    text: str
    finish_reason: str | None
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Token counts, and seconds from submission to the first token (0 if there is none).

    Attributes:
        visual_tokens: image tokens of the prompt.
        reused_tokens: tokens of the prompt whose keys and values were in the prefix cache.
    """

    prompt_tokens: int
    completion_tokens: int
    visual_tokens: int
    time_to_first_token: float
    reused_tokens: int = 0


class Notifier:
    """A condition that threads and event loops wait for.

    An event loop is woken by one ``call_soon_threadsafe``, however many notifiers change before it
    runs: a decode step changes one for each answer.
    """

    _due: ClassVar[dict[asyncio.AbstractEventLoop, list[asyncio.Event]]] = {}
    _due_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def notify(self) -> None:
        """Wake everything that waits; call with ``condition`` held."""
        self.condition.notify_all()
        waiting, self._waiting = self._waiting, []
        for loop, event in waiting:
            with self._due_lock:
                events = self._due.setdefault(loop, [])
                events.append(event)
                if len(events) > 1:
                    continue
            try:
                loop.call_soon_threadsafe(self._wake, loop)
            except RuntimeError:
                # Nothing waits on a closed loop any more.
                self._due.pop(loop, None)

    @classmethod
    def _wake(cls, loop: asyncio.AbstractEventLoop) -> None:
        with cls._due_lock:
            events = cls._due.pop(loop, [])
        for event in events:
            event.set()

    async def wait_for(self, predicate: Callable[[], bool]) -> None:
        """Wait on the running event loop; ``predicate`` changes only with ``condition`` held."""
        entry = asyncio.get_running_loop(), asyncio.Event()
        while True:
            with self.condition:
                if predicate():
                    return
                self._waiting.append(entry)
            try:
                await entry[1].wait()
            finally:
                with self.condition, suppress(ValueError):
                    self._waiting.remove(entry)
            entry[1].clear()


class StreamingRequest(Request):
    """A question, and its answer as it is generated.

    Iterating, or ``async for chunk in request.chunks()``, yields the pieces of the answer from the
    beginning and raises the error that ended the request, if there is one.

    Args:
        question: a question, or a conversation as :data:`~v2l_fast.vlm.Question`.
        adapters: ids of the adapters to answer from; several are composed in this order, none is
            the plain model.
        clip: answer with this video in context instead (the direct baseline).
        sampling: how tokens are chosen, and how many at most.
        stop: strings that end the answer; they are not part of it.
        new_constraint: makes the constraint of an answer; it is called once for each answer.
        private: do not use or extend the prefix cache, so that no text is kept after the request.

    Attributes:
        submitted: time at which the engine received it (``time.perf_counter``); None before that.
        prompt: token ids, or embeddings [T, D]; None before it is prepared and after it is
            computed.
        prompt_tokens, visual_tokens: tokens of the prompt, and the image tokens among them.
        host_adapter: factors to copy to the device.
        skipped: requests behind it that were scheduled while it waited for an adapter slot.
        first_token: time of its first token; 0 before that.
        cancelled: set by :meth:`cancel`.
        usage: token counts; None until the answer is complete.

    Raises:
        ConfigError: both adapters and a clip, or an empty stop string.
    """

    def __init__(
        self,
        question: Question,
        adapters: Sequence[str] = (),
        clip: Clip | None = None,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        new_constraint: Callable[[], TokenConstraint] | None = None,
        private: bool = False,
    ) -> None:
        super().__init__(sampling or SamplingParams())
        self.new_constraint, self.private = new_constraint, private
        self.question, self.adapters, self.clip = question, tuple(adapters), clip
        self.stop = tuple(stop)
        if clip is not None and self.adapters:
            raise ConfigError("a request takes adapters or a video in context, not both")
        if not all(self.stop):
            raise ConfigError("a stop string must not be empty")
        self.submitted: float | None = None
        self.prompt: Tensor | list[int] | None = None
        self.prompt_tokens = self.visual_tokens = 0
        self.host_adapter: HostAdapter | None = None
        self.text_stream: TextStream | None = None
        self.skipped = 0
        self.first_token = 0.0
        self.cancelled = False
        self.usage: Usage | None = None
        self._notifier = Notifier()
        self._chunks: list[Chunk] = []
        self._failure: V2LError | None = None
        self._reported = 0

    def copy(self, sampling: SamplingParams | None = None) -> StreamingRequest:
        """The same question, not submitted, with its sampling parameters or others."""
        return StreamingRequest(
            self.question, self.adapters, self.clip, sampling or self.sampling, self.stop,
            self.new_constraint, self.private,
        )  # fmt: skip

    @property
    def source(self) -> str:
        """The source of the answer: "adapter", "context" or "plain"."""
        return "context" if self.clip is not None else "adapter" if self.adapters else "plain"

    # --- the reader's side ------------------------------------------------------------------------

    def cancel(self) -> None:
        """End the request at its next token; a complete answer stays as it is."""
        self.cancelled = True

    @property
    def done(self) -> bool:
        """Whether the answer is complete or an error ended the request."""
        return self._failure is not None or self.usage is not None

    def __iter__(self) -> Iterator[Chunk]:
        index = 0
        while True:
            with self._notifier.condition:
                self._notifier.condition.wait_for(partial(self._ready, index))
            if not self._has(index):
                return
            yield self._chunks[index]
            index += 1

    async def chunks(self) -> AsyncIterator[Chunk]:
        """The pieces, for an event loop."""
        index = 0
        while True:
            await self._notifier.wait_for(partial(self._ready, index))
            if not self._has(index):
                return
            yield self._chunks[index]
            index += 1

    def result(self, timeout: float | None = None) -> tuple[str, str, Usage]:
        """Wait for the complete answer: text, finish reason, usage.

        Raises:
            TimeoutError: it is not complete after ``timeout`` seconds.
            V2LError: the error that ended the request.
        """
        with self._notifier.condition:
            if not self._notifier.condition.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"no answer within {timeout} s")
        if self.usage is None:
            raise self._failure or EngineClosed("the engine stopped")
        last = self._chunks[-1].finish_reason or ""
        return "".join(chunk.text for chunk in self._chunks), last, self.usage

    def _ready(self, index: int) -> bool:
        return self.done or len(self._chunks) > index

    def _has(self, index: int) -> bool:
        """Whether chunk ``index`` exists; raises the error that ended the request before it."""
        if len(self._chunks) > index:
            return True
        if self._failure is not None:
            raise self._failure
        return False

    # --- the engine's side ------------------------------------------------------------------------

    def deliver(self, text: str) -> None:
        """Append a piece."""
        with self._notifier.condition:
            self._chunks.append(Chunk(text, None, self._new_logprobs()))
            self._notifier.notify()

    def complete(self, text: str, reason: str, usage: Usage) -> None:
        """Append the last piece."""
        with self._notifier.condition:
            self._chunks.append(Chunk(text, reason, self._new_logprobs()))
            self.usage = usage
            self._notifier.notify()

    def abort(self, error: V2LError) -> None:
        """End the request with an error."""
        with self._notifier.condition:
            self._failure = error
            self._notifier.notify()

    def _new_logprobs(self) -> tuple[TokenLogprobs, ...]:
        first, self._reported = self._reported, len(self.logprobs)
        return tuple(self.logprobs[first:])


class TextStream:
    """Token ids to streamed text: what can be sent now, and where a stop string ends it.

    The pieces add up to the decoded answer, without outer white space and cut at the first stop
    string.

    Args:
        decode: ids to text; keeps white space.
        stop: strings that end the answer.

    Attributes:
        stopped: whether a stop string was reached; nothing follows it.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._decode = decode
        self._stop = tuple(stop)
        self._held = ""
        self._begun = False
        # The last ids that have text, decoded together because spaces between words depend on the
        # words before; how many characters of that text are consumed, and how many ids are read.
        self._window: list[int] = []
        self._text = ""
        self._consumed = self._read = 0

    def push(self, tokens: list[int]) -> str:
        """All ids so far -> the text that can be sent and has not been."""
        self._extend(tokens)
        # Hold back a character whose last bytes are still missing.
        whole = len(self._text)
        pending = whole - len(self._text.rstrip(_REPLACEMENT))
        ready = max(self._consumed, whole - min(pending, _MAX_PENDING))
        new, self._consumed = self._text[self._consumed : ready], ready
        if not pending and new:
            self._shrink(self._window[-1:])
        elif len(self._window) > _WINDOW:
            self._shrink(self._window[-_WINDOW // 2 :])
        return self._add(new)

    def finish(self, tokens: list[int]) -> str:
        """All ids of the complete answer -> the rest of its text."""
        if self.stopped:
            return ""
        self._extend(tokens)
        text = self._add(self._text[self._consumed :])
        return text if self.stopped else text + self._held.rstrip()

    def _extend(self, tokens: list[int]) -> None:
        for token in tokens[self._read :]:
            text = self._decode([*self._window, token])
            # Ids without text, such as special tokens, do not change the text of the next ones.
            if text != self._text or text.endswith(_REPLACEMENT):
                self._window.append(token)
                self._text = text
        self._read = len(tokens)

    def _shrink(self, window: list[int]) -> None:
        """Decode fewer ids from now on; their text ends with what is not consumed yet."""
        rest = len(self._text) - self._consumed
        self._window, self._text = window, self._decode(window)
        self._consumed = max(0, len(self._text) - rest)

    def _add(self, text: str) -> str:
        self._held += text
        if not self._begun:
            self._held = self._held.lstrip()
        starts = [start for s in self._stop if (start := self._held.find(s)) >= 0]
        if starts:
            self.stopped = True
            return self._held[: min(starts)].rstrip()
        # The end of the held text may begin a stop string, and its white space may be the last.
        safe = min((_safe_length(self._held, s) for s in self._stop), default=len(self._held))
        safe = len(self._held[:safe].rstrip())
        ready, self._held = self._held[:safe], self._held[safe:]
        self._begun |= bool(ready)
        return ready


def _safe_length(text: str, stop: str) -> int:
    """Length of ``text`` without its longest end that ``stop`` begins with."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0:
        if stop.startswith(text[start:]):
            return start
        start = text.find(stop[0], start + 1)
    return len(text)
