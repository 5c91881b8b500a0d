"""A store in memory and requests for engine tests."""

from __future__ import annotations

from tests.waiting import LIMIT
from v2l_fast.errors import AdapterError
from v2l_fast.generation import SamplingParams
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.serving.requests import GenerationRequest

WAIT = LIMIT
QUESTIONS = (
    "what happens?",
    "which color is it?",
    "how many circle stays after the small square moves left?",
)


class MemoryStore:
    """Adapters by id."""

    def __init__(self, adapters: list[Adapter] | None = None) -> None:
        self.adapters = {f"a{place}": a for place, a in enumerate(adapters or [])}
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


def request(text: str, *adapters: str, stop: tuple[str, ...] = (), **sampling) -> GenerationRequest:
    sampling.setdefault("max_new_tokens", 10)
    return GenerationRequest(text, adapters, sampling=SamplingParams(**sampling), stop=stop)
