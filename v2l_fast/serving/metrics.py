"""Prometheus metrics of one server: what the routes observe, and the engine's own counters.

Names follow Prometheus' rules (base units, ``_total``); nothing carries ids or text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from v2l_fast.serving.stats import EngineStats
from v2l_fast.video import fallbacks

_FIRST_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_GAP_SECONDS = (
    0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2,
    0.5, 1, 2, 5,
)  # fmt: skip
_STAGE_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)

_GAUGES = {
    "running": "Requests being answered.",
    "waiting": "Requests in the queue.",
    "jobs": "Internalization jobs that are not finished.",
}
_COUNTERS = {
    "prompt_tokens": "Tokens in context, visual ones included.",
    "completion_tokens": "Tokens generated.",
    "visual_tokens": "Tokens in context that stand for pixels.",
    "steps": "Decode steps.",
    "adapter_hits": "Requests whose adapter was in a device slot.",
    "adapter_misses": "Requests whose adapter had to be brought to the device.",
    "adapter_loads": "Adapters read from the store.",
}


class Metrics:
    """The metrics of one server.

    Args:
        stats: asks the engine for its counters.
        stored: number of adapters in the store.
    """

    def __init__(self, stats: Callable[[], EngineStats], stored: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self._first_token = Histogram(
            "v2l_time_to_first_token_seconds",
            "From the arrival of a question to the first piece of its answer, by what is asked: "
            "an adapter, the video in context, or the plain model.",
            ["source"],
            buckets=_FIRST_SECONDS,
            registry=self.registry,
        )
        self._between = Histogram(
            "v2l_inter_token_seconds",
            "Between each token of an answer and the next one, as its reader gets them; tokens "
            "without text of their own come with the next.",
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
        self.registry.register(_EngineCollector(stats, stored))

    def answered(self, source: str, end: str) -> None:
        """A question was answered, cancelled or refused."""
        self._answers.labels(source, end).inc()

    def first_token(self, source: str, seconds: float) -> None:
        """An answer was completed; seconds from its arrival to its first piece."""
        self._first_token.labels(source).observe(seconds)

    def next_token(self, source: str, seconds: float) -> None:
        """A piece of an answer came so many seconds after the one before it."""
        self._between.labels(source).observe(seconds)

    def internalized(self, result: str, seconds: Mapping[str, float]) -> None:
        """A video is done; ``seconds`` by stage."""
        self._videos.labels(result).inc()
        for stage, spent in seconds.items():
            self._internalize.labels(stage).observe(spent)

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """Reads the engine's counters when Prometheus asks."""

    def __init__(self, stats: Callable[[], EngineStats], stored: Callable[[], int]) -> None:
        self._stats = stats
        self._stored = stored

    def describe(self) -> Iterator[Metric]:
        # Registering must not need a running engine.
        return iter(())

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"v2l_engine_{name}", text, getattr(stats, name))
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"v2l_engine_{name}", text, getattr(stats, name))
        left = CounterMetricFamily(
            "v2l_decoder_fallbacks",
            "Videos that the GPU left to the CPU's decoder, by reason.",
            labels=["reason"],
        )
        for reason, count in fallbacks.reasons().items():
            left.add_metric([reason], count)
        yield left
        yield GaugeMetricFamily("v2l_store_adapters", "Adapters in the store.", self._stored())
