"""A store in memory and requests, for tests of the engine."""

from __future__ import annotations

from tests.waiting import LIMIT
from v2l_fast.errors import AdapterError
from v2l_fast.generation import SamplingParams
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.serving.request import StreamingRequest

WAIT = LIMIT
QUESTIONS = (
    "what happens?",
    "which color is it?",
    "how many circle stays after the small square moves left?",
)


class MemoryStore:
    """Adapters by id."""

    def __init__(self, adapters: list[Adapter] | None = None) -> None:
        self.adapters = {f"a{index}": a for index, a in enumerate(adapters or [])}
        self.reads = 0

    def put(self, adapter: Adapter) -> str:
        id = f"a{len(self.adapters)}"
        self.adapters[id] = adapter
        return id

    def get(self, id: str) -> Adapter:
        self.reads += 1
        if id not in self.adapters:
            raise AdapterError(f"{id}: no such adapter")
        return self.adapters[id]


def request(text: str, *adapters: str, stop: tuple[str, ...] = (), **sampling) -> StreamingRequest:
    sampling.setdefault("max_new_tokens", 10)
    return StreamingRequest(text, adapters, sampling=SamplingParams(**sampling), stop=stop)


def copies(requests: list[StreamingRequest], times: int = 1) -> list[StreamingRequest]:
    """The same questions again, not submitted."""
    return [one.copy() for one in requests * times]
