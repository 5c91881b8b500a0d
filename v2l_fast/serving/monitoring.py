"""The server's JSON log lines, and its metrics for Prometheus.

Neither contains questions, answers, file names or keys, only ids, counts and times. Metric names
follow Prometheus' rules (base units, ``_total``), except one that routers know from vLLM.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from v2l_fast.video import fallbacks

if TYPE_CHECKING:
    from v2l_fast.serving.engine import EngineStats

log = logging.getLogger("v2l_fast.serving")

_FIRST_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_GAP_SECONDS = (
    0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2,
    0.5, 1, 2, 5,
)  # fmt: skip
_STAGE_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_GAUGES = {
    "running": "Requests being answered.",
    "waiting": "Requests in the queue.",
    "jobs": "Internalization jobs that have not ended.",
}
_COUNTERS = {
    "prompt_tokens": "Tokens in context, visual ones included.",
    "completion_tokens": "Tokens generated.",
    "visual_tokens": "Image tokens in context.",
    "steps": "Decode steps.",
    "adapter_hits": "Requests whose adapter was in a device slot.",
    "adapter_misses": "Requests whose adapter had to be copied to the device.",
    "adapter_loads": "Adapters read from the store.",
}


# --- logs -----------------------------------------------------------------------------------------


class JsonFormatter(logging.Formatter):
    """One JSON object per line; ``extra={"fields": {..}}`` adds fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(level: str = "info") -> None:
    """Write the process's log to standard error as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # RequestLog writes a line per request, with its duration.
    logging.getLogger("uvicorn.access").disabled = True
    logging.getLogger("python_multipart").setLevel(logging.WARNING)


def log_event(name: str, **fields: object) -> None:
    """Log an event with fields."""
    log.info(name, extra={"fields": fields})


class RateLimitedEvent:
    """An event that may occur thousands of times a second, logged once per interval.

    Args:
        name: of the event; its field ``count`` is the number of occurrences since the last line.
        seconds: the interval.
    """

    def __init__(self, name: str, seconds: float = 10.0) -> None:
        self._name, self._seconds = name, seconds
        self._count = 0
        self._next = 0.0

    def record(self) -> None:
        """Count an occurrence; log when the interval has passed."""
        self._count += 1
        now = time.monotonic()
        if now >= self._next:
            log.warning(self._name, extra={"fields": {"count": self._count}})
            self._count, self._next = 0, now + self._seconds


class RequestLog:
    """ASGI middleware: adds a request id to every response and logs one line at its end."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        request_id = uuid.uuid4().hex
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            # The route's pattern: the path itself may contain anything.
            route = getattr(scope.get("route"), "path", None)
            log_event(
                "request",
                request_id=request_id,
                method=scope["method"] if route else None,
                route=route,
                status=status,
                seconds=round(time.perf_counter() - start, 6),
            )


# --- metrics --------------------------------------------------------------------------------------


class Metrics:
    """The metrics of one server.

    Args:
        engine_stats: returns the engine's counters.
        num_stored: returns the number of adapters in the store.
    """

    def __init__(
        self, engine_stats: Callable[[], EngineStats], num_stored: Callable[[], int]
    ) -> None:
        self.registry = CollectorRegistry()
        self._first_token = Histogram(
            "v2l_time_to_first_token_seconds",
            "From the arrival of a question to the first piece of its answer, by source: an "
            "adapter, the video in context, or the plain model.",
            ["source"],
            buckets=_FIRST_SECONDS,
            registry=self.registry,
        )
        self._between = Histogram(
            "v2l_inter_token_seconds",
            "Between consecutive tokens of an answer as its reader receives them; tokens without "
            "text of their own arrive with the next.",
            ["source"],
            buckets=_GAP_SECONDS,
            registry=self.registry,
        )
        self._answers = Counter(
            "v2l_answers",
            "Questions by how they ended: stop, length, cancelled, or an error's code.",
            ["source", "end"],
            registry=self.registry,
        )
        self._internalize = Histogram(
            "v2l_internalize_seconds",
            "Time of a job in each stage.",
            ["stage"],
            buckets=_STAGE_SECONDS,
            registry=self.registry,
        )
        self._videos = Counter(
            "v2l_videos",
            "Videos by result: internalized, failed, cancelled, or cached (from the store).",
            ["result"],
            registry=self.registry,
        )
        self._unloads = Counter(
            "v2l_replica_unloads",
            "Deleted adapters by what a replica did: unloaded, absent, or failed.",
            ["result"],
            registry=self.registry,
        )
        self.registry.register(_EngineCollector(engine_stats, num_stored))

    def count_answer(self, source: str, end: str) -> None:
        """Count a question that ended: with an answer, cancelled or refused."""
        self._answers.labels(source, end).inc()

    def observe_first_token(self, source: str, seconds: float) -> None:
        """Record the seconds from a question's arrival to the first piece of its answer."""
        self._first_token.labels(source).observe(seconds)

    def observe_next_token(self, source: str, seconds: float) -> None:
        """Record the seconds between two pieces of an answer."""
        self._between.labels(source).observe(seconds)

    def count_video(self, result: str, seconds: Mapping[str, float]) -> None:
        """Count a video that ended; ``seconds`` are those of each stage."""
        self._videos.labels(result).inc()
        for stage, spent in seconds.items():
            self._internalize.labels(stage).observe(spent)

    def count_unload(self, result: str) -> None:
        """Count a request to a replica to unload a deleted adapter."""
        self._unloads.labels(result).inc()

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """Reads the engine's counters when Prometheus asks."""

    def __init__(
        self, engine_stats: Callable[[], EngineStats], num_stored: Callable[[], int]
    ) -> None:
        self._engine_stats = engine_stats
        self._num_stored = num_stored

    def describe(self) -> Iterator[Metric]:
        # Registering must not need a running engine.
        return iter(())

    def collect(self) -> Iterator[Metric]:
        stats = self._engine_stats()
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"v2l_engine_{name}", text, getattr(stats, name))
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"v2l_engine_{name}", text, getattr(stats, name))
        # By vLLM's name and labels, which routers read to send a question to an adapter's replica.
        adapters = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Ids of the adapters on the device (running) and of waiting requests; the value is the "
            "time.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        adapters.add_metric(
            [
                str(stats.adapter_slots),
                ",".join(stats.resident_adapters),
                ",".join(stats.waiting_adapters),
            ],
            time.time(),
        )
        yield adapters
        decoder = CounterMetricFamily(
            "v2l_decoder_fallbacks",
            "Videos that the GPU left to the CPU's decoder, by reason.",
            labels=["reason"],
        )
        for reason, count in fallbacks.reasons().items():
            decoder.add_metric([reason], count)
        yield decoder
        yield GaugeMetricFamily("v2l_store_adapters", "Adapters in the store.", self._num_stored())
