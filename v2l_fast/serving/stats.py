"""What an engine has done and has before it: plain numbers, for metrics and tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start, and what is there now.

    Attributes:
        running: requests being answered.
        waiting: requests in the queue.
        jobs: internalization jobs that are not finished.
        requests: finished requests by reason: stop, length, cancelled, error.
        jobs_done, jobs_failed: finished jobs.
        prompt_tokens, completion_tokens, visual_tokens: of all finished requests.
        steps: decode steps.
        adapter_hits, adapter_misses: requests whose adapter was, or was not, in a device slot.
        adapter_loads: adapters read from the store, because host memory did not have them either.
    """

    running: int
    waiting: int
    jobs: int
    requests: dict[str, int]
    jobs_done: int
    jobs_failed: int
    prompt_tokens: int
    completion_tokens: int
    visual_tokens: int
    steps: int
    adapter_hits: int
    adapter_misses: int
    adapter_loads: int
