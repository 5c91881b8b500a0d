"""What goes into the engine and what comes out: requests, streamed text, jobs and their errors.

Data and waiting only: this file knows nothing about models, tensors or scheduling. The engine's
thread feeds a :class:`Generation` or :class:`InternalizeJob`, any other thread or event loop reads
it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

from v2l_fast.errors import AdapterError, ConfigError, V2LError
from v2l_fast.generation import SamplingParams
from v2l_fast.video import Clip

log = logging.getLogger(__name__)


class QueueFull(V2LError):
    """More requests or jobs are waiting than the engine was told to hold; try again later."""


class PromptTooLong(ConfigError):
    """Prompt and answer limit together do not fit the engine's context."""


class OtherAdapter(AdapterError):
    """The engine answers from the one adapter merged into its weights, and this is another."""


class EngineClosed(V2LError):
    """The engine is shutting down, or has stopped after an error."""


class JobCancelled(V2LError):
    """The job was cancelled by :meth:`Cancellation.request`."""


class Cancellation:
    """A request, from any thread, to stop the work of another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requested = False
        self._stop: Callable[[], None] | None = None

    @property
    def requested(self) -> bool:
        return self._requested

    def request(self) -> None:
        """Ask the work to stop; what it waits for within :meth:`stopping` is stopped at once."""
        with self._lock:
            self._requested = True
            if self._stop is not None:
                self._stop()

    def check(self) -> None:
        """Raises JobCancelled: the request was made."""
        if self._requested:
            raise JobCancelled("the job was cancelled")

    @contextmanager
    def stopping(self, stop: Callable[[], None]) -> Iterator[None]:
        """Call ``stop`` when the request comes within the block, which then ends by itself.

        Raises:
            JobCancelled: the request came before.
        """
        with self._lock:
            self.check()
            self._stop = stop
        try:
            yield
        finally:
            with self._lock:
                self._stop = None


@contextmanager
def room(places: threading.Semaphore) -> Iterator[None]:
    """Try to acquire a worker permit; raise QueueFull instead of blocking a thread."""
    if not places.acquire(blocking=False):
        raise QueueFull("too many videos are being read; try again later")
    try:
        yield
    finally:
        places.release()


def told(error: Exception) -> V2LError:
    """What the user is told; a bug is logged with its traceback."""
    if isinstance(error, V2LError):
        return error
    log.error("unexpected error in the engine", exc_info=error)
    return V2LError(f"internal error: {type(error).__name__}; see the server's log")


@dataclass(frozen=True)
class GenerationRequest:
    """A question.

    Attributes:
        text: the question.
        adapters: ids of the adapters to answer from; several are composed in this order, none is
            the plain model.
        clip: answer with this video in context instead (the direct baseline).
        sampling: how tokens are chosen, and how many at most.
        stop: strings that end the answer; they are not part of it.
    """

    text: str
    adapters: tuple[str, ...] = ()
    clip: Clip | None = None
    sampling: SamplingParams = SamplingParams()
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.clip is not None and self.adapters:
            raise ConfigError("a request has either a video in context or adapters, not both")
        if not all(self.stop):
            raise ConfigError("a stop string is empty; leave it out")


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer; the last one has a reason: "stop", "length" or "cancelled"."""

    text: str
    finish_reason: str | None


@dataclass(frozen=True)
class Usage:
    """What an answer cost: tokens, and seconds from submission to its first token (0: it has
    none)."""

    prompt_tokens: int
    completion_tokens: int
    visual_tokens: int
    time_to_first_token: float


class _Waker:
    """Sets events of one event loop from other threads; many at once cost it one wake-up."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        # Not kept alive: the registry forgets a loop with its last user.
        self._loop = weakref.ref(loop)
        self._lock = threading.Lock()
        self._due: list[asyncio.Event] = []

    def wake(self, event: asyncio.Event) -> None:
        with self._lock:
            self._due.append(event)
            if len(self._due) > 1:
                return
        loop = self._loop()
        # A loop that has been closed waits for nothing any more.
        with suppress(RuntimeError):
            if loop is not None:
                loop.call_soon_threadsafe(self._set)

    def _set(self) -> None:
        with self._lock:
            due, self._due = self._due, []
        for event in due:
            event.set()


_wakers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Waker] = weakref.WeakKeyDictionary()


class _Signal:
    """Wakes threads and event loops that wait for something to change."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self._listeners: set[tuple[_Waker, asyncio.Event]] = set()

    def notify(self) -> None:
        """Call with ``condition`` held."""
        self.condition.notify_all()
        for waker, event in self._listeners:
            waker.wake(event)

    async def wait(self, ready: Callable[[], bool]) -> None:
        """Until ``ready``, which changes with ``condition`` held alone."""
        loop = asyncio.get_running_loop()
        waker = _wakers.setdefault(loop, _Waker(loop))
        while True:
            listener = waker, asyncio.Event()
            with self.condition:
                if ready():
                    return
                self._listeners.add(listener)
            try:
                await listener[1].wait()
            finally:
                with self.condition:
                    self._listeners.discard(listener)


class Generation:
    """An answer in the making; every reader sees it from the beginning.

    Iterating, or ``async for chunk in generation.chunks()``, gives pieces as they are made and
    raises the error that ended the request, if one did.
    """

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.submitted = time.perf_counter()
        self.cancelled = False
        self._signal = _Signal()
        self._chunks: list[Chunk] = []
        self._error: V2LError | None = None
        self._usage: Usage | None = None

    def cancel(self) -> None:
        """End it at the next token; a finished answer stays as it is."""
        self.cancelled = True

    @property
    def done(self) -> bool:
        return self._error is not None or self._usage is not None

    @property
    def usage(self) -> Usage | None:
        """Known when the answer is complete."""
        return self._usage

    def __iter__(self) -> Iterator[Chunk]:
        place = 0
        while True:
            with self._signal.condition:
                self._signal.condition.wait_for(partial(self._ready, place))
            if not self._has(place):
                return
            yield self._chunks[place]
            place += 1

    async def chunks(self) -> AsyncIterator[Chunk]:
        """The same for an event loop."""
        place = 0
        while True:
            await self._signal.wait(partial(self._ready, place))
            if not self._has(place):
                return
            yield self._chunks[place]
            place += 1

    def result(self, timeout: float | None = None) -> tuple[str, str, Usage]:
        """Wait for the end: text, finish reason, usage.

        Raises:
            TimeoutError: it is not complete after ``timeout`` seconds.
            V2LError: what ended the request.
        """
        with self._signal.condition:
            if not self._signal.condition.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"no answer within {timeout} s")
        if self._usage is None:
            raise self._error or EngineClosed("the engine stopped")
        return "".join(c.text for c in self._chunks), self._chunks[-1].finish_reason, self._usage

    def _ready(self, place: int) -> bool:
        return self.done or len(self._chunks) > place

    def _has(self, place: int) -> bool:
        """Whether there is a chunk at ``place``; if none will come, the error that is why."""
        if len(self._chunks) > place:
            return True
        if self._error is not None:
            raise self._error
        return False

    # --- the engine's side ------------------------------------------------------------------

    def put(self, text: str) -> None:
        """Add a piece."""
        with self._signal.condition:
            self._chunks.append(Chunk(text, None))
            self._signal.notify()

    def finish(self, text: str, reason: str, usage: Usage) -> None:
        """Add the last piece."""
        with self._signal.condition:
            self._chunks.append(Chunk(text, reason))
            self._usage = usage
            self._signal.notify()

    def fail(self, error: V2LError) -> None:
        """End it with an error."""
        with self._signal.condition:
            self._error = error
            self._signal.notify()


@dataclass(eq=False)
class InternalizeJob:
    """A video on its way to an adapter.

    Attributes:
        id: of the job.
        state: "queued", "decoding", "encoding", "generating", "done", "failed" or "cancelled".
        progress: 0 to 1.
        adapter_id: in the store, when done.
        error: why it failed, or that it was cancelled.
        seconds: time spent in each state so far.
        cancellation: requested by :meth:`Engine.cancel`.
    """

    id: str
    state: str = "queued"
    progress: float = 0.0
    adapter_id: str | None = None
    error: V2LError | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    cancellation: Cancellation = field(default_factory=Cancellation, repr=False)
    _signal: _Signal = field(default_factory=_Signal, repr=False)
    _since: float = field(default_factory=time.perf_counter, repr=False)

    @property
    def done(self) -> bool:
        return self.state in ("done", "failed", "cancelled")

    def wait(self, timeout: float | None = None) -> str:
        """Wait for the adapter's id.

        Raises:
            TimeoutError: it is not there after ``timeout`` seconds.
            JobCancelled: the job was cancelled.
            V2LError: why the job failed.
        """
        with self._signal.condition:
            if not self._signal.condition.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"job {self.id} is still {self.state} after {timeout} s")
        if self.adapter_id is None:
            raise self.error or EngineClosed("the engine stopped")
        return self.adapter_id

    def update(
        self,
        state: str,
        progress: float,
        adapter_id: str | None = None,
        error: V2LError | None = None,
    ) -> None:
        """The engine's side: enter a state, or move on within it; nothing follows the end."""
        now = time.perf_counter()
        with self._signal.condition:
            if self.done:
                return
            self.seconds[self.state] = self.seconds.get(self.state, 0.0) + now - self._since
            self._since = now
            self.adapter_id, self.error = adapter_id, error
            self.state, self.progress = state, progress
            self._signal.notify()
