"""No request changes another one's answer, ends it, or makes it wait without bound."""

from __future__ import annotations

from collections import deque

import pytest
import torch

from tests.serving.engine_parts import QUESTIONS, WAIT, MemoryStore, request
from v2l_fast.errors import AdapterError, V2LError
from v2l_fast.generation import PrefixCache
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.serving import scheduler as scheduling
from v2l_fast.serving.device_cache import DeviceAdapterCache, HostAdapterCache
from v2l_fast.serving.engine import Engine
from v2l_fast.serving.request import StreamingRequest, TextStream
from v2l_fast.serving.scheduler import Scheduler
from v2l_fast.vlm.decoder import Decoder

M = "down_proj"


@pytest.fixture
def store(adapters) -> MemoryStore:
    return MemoryStore(adapters)


def neighbors(model, store, engine, odd) -> None:
    """Ask ``odd`` among others, which must get the answers they get alone; raises its error."""
    plain = [request(q, *ids, max_new_tokens=12) for q in QUESTIONS for ids in ((), ("a0",))]
    sampled = [request(q, "a1", max_new_tokens=12, temperature=1.2, seed=4) for q in QUESTIONS]
    for one in [*plain, odd, *sampled]:
        engine.submit(one)
    for one in [*plain, *sampled]:
        parts = [store.adapters[id] for id in one.adapters]
        options = {k: getattr(one.sampling, k) for k in ("max_new_tokens", "temperature", "seed")}
        expected = model.ask(one.question, Adapter.compose(parts) if parts else None, **options)
        assert one.result(WAIT)[0] == expected
    odd.result(WAIT)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-40},
        {"temperature": 5e-324, "seed": -(1 << 63)},
        {"temperature": 1e308, "seed": (1 << 63) - 1},
        {"temperature": 1.0, "top_p": 1e-300},
        {"temperature": 1.0, "top_k": 10**18},
        {"temperature": 1e30, "top_p": 5e-324, "top_k": 1, "seed": -1},
    ],
)
def test_extreme_sampling_is_answered_and_harms_nobody(options, model, store):
    with Engine(model, store, max_batch=10, max_context=160, adapter_slots=3) as engine:
        neighbors(model, store, engine, request(QUESTIONS[0], "a2", max_new_tokens=12, **options))
        assert engine.stats().requests["error"] == 0


@pytest.mark.parametrize("value", [1e38, float("nan")])
def test_a_poisoned_adapter_ends_only_its_request(value, model, store, adapters):
    poisoned = Adapter({M: adapters[2].A[M]}, {M: torch.full_like(adapters[2].B[M], value)},
                       adapters[2].scale, adapters[2].bias)  # fmt: skip
    store.adapters["poisoned"] = poisoned
    with Engine(model, store, max_batch=10, max_context=160, adapter_slots=3) as engine:
        for _ in range(2):
            with pytest.raises(AdapterError, match="NaN or infinite"):
                neighbors(model, store, engine, request(QUESTIONS[0], "poisoned"))
        # Its slots and rows serve others.
        for index in range(9):
            one = request(QUESTIONS[index % 3], f"a{index % 3}")
            assert engine.submit(one).result(WAIT)[0] == model.ask(
                one.question, store.adapters[one.adapters[0]], max_new_tokens=10
            )


@pytest.mark.parametrize("where", ["push", "finish", "embed", "fill"])
def test_a_failure_anywhere_belongs_to_its_request(where, model, store, monkeypatch):
    odd = request("how many square stays right?", "a2", max_new_tokens=12)

    def broken(self, *args):
        raise RuntimeError("broken")

    if where in ("push", "finish"):
        original = getattr(TextStream, where)

        def text(self, tokens):
            return (broken if "marked" in self._stop else original)(self, tokens)

        monkeypatch.setattr(TextStream, where, text)
        odd = request(odd.question, "a2", stop=("marked",), max_new_tokens=12)
    elif where == "fill":
        copy = DeviceAdapterCache._copy

        def copies(self, slot, adapter):
            return (broken if slot == self._slot_of.get(("a2",)) else copy)(self, slot, adapter)

        monkeypatch.setattr(DeviceAdapterCache, "_copy", copies)
    else:
        ids = model.backbone.prompt_builder.question(odd.question)
        embed = Decoder.embed

        def embeds(self, tokens):
            return (broken if tokens.tolist() == ids else embed)(self, tokens)

        monkeypatch.setattr(Decoder, "embed", embeds)
    with Engine(model, store, max_batch=10, max_context=160, adapter_slots=3) as engine:
        for _ in range(2):
            with pytest.raises(V2LError, match="RuntimeError; see the server's log"):
                neighbors(model, store, engine, odd.copy())
        assert engine.stats().requests["error"] == 2
        assert engine.stats().running == 0
        assert len(engine._scheduler.adapters._idle) == 3


# --- slots ----------------------------------------------------------------------------------------


class Steps:
    """A scheduler of 8 rows and 2 slots, and its queue.

    Attributes:
        ended: requests that have ended.
    """

    def __init__(self, model, store) -> None:
        self.ended: list[StreamingRequest] = []
        self.waiting: deque[StreamingRequest] = deque()
        self._model, self._host = model, HostAdapterCache(model, store, 99)
        self.scheduler = Scheduler(model, 8, 160, 2, None, PrefixCache(0), self._end)

    def _end(self, one: StreamingRequest, reason: str) -> bool:
        self.ended.append(one)
        return True

    def ask(self, *ids: str, tokens: int = 100) -> StreamingRequest:
        """Queue a request."""
        one = request(QUESTIONS[0], *ids, max_new_tokens=tokens)
        one.submitted = 0.0
        one.prompt = self._model.backbone.prompt_builder.question(QUESTIONS[0])
        one.prompt_tokens = len(one.prompt)
        one.host_adapter = self._host.get(ids) if ids else None
        self.waiting.append(one)
        return one

    def step(self) -> None:
        self.scheduler.schedule(self.waiting)
        self.scheduler.step()

    @property
    def running(self) -> set[StreamingRequest]:
        return set(self.scheduler.runner.requests)


@pytest.fixture
def steps(model, store):
    with torch.inference_mode():
        yield Steps(model, store)


def test_a_request_without_a_slot_is_skipped(steps):
    steps.ask("a0"), steps.ask("a1")
    steps.step()
    stuck = [steps.ask("a2"), steps.ask("a0", "a1")]
    free = {steps.ask(), steps.ask("a0"), steps.ask("a1"), steps.ask()}
    steps.step()
    assert steps.running >= free and not steps.running & set(stuck)
    assert list(steps.waiting) == stuck
    assert [one.skipped for one in stuck] == [4, 4]


def test_nothing_starves(steps, monkeypatch):
    """A request that needs a slot is served although users of resident adapters keep coming."""
    monkeypatch.setattr(scheduling, "PATIENCE", 5)
    steps.ask("a0"), steps.ask("a1")
    steps.step()
    stuck = {steps.ask("a2"), steps.ask("a0", "a1"), steps.ask("a2", "a0")}
    for index in range(400):
        # More than there are rows, so that one user follows the other.
        if len(steps.waiting) < 12:
            steps.ask(f"a{index % 2}", tokens=7)
        if index == 200:
            assert steps.ended
        steps.step()
        if not stuck & set(steps.waiting):
            break
    assert index < 399
    # Few requests passed each of them, though the others had slots all the time.
    assert all(one.skipped <= 5 + 1 for one in steps.running)


def test_slots_never_hold_up_the_plain_model(steps, monkeypatch):
    monkeypatch.setattr(scheduling, "PATIENCE", 0)
    steps.ask("a0"), steps.ask("a1")
    steps.step()
    steps.ask("a2")
    plain, user = steps.ask(), steps.ask("a0")
    steps.step()
    assert plain in steps.running and user not in steps.running and len(steps.waiting) == 2


def test_a_step_prefills_a_bounded_number_of_tokens(steps, monkeypatch):
    monkeypatch.setattr(scheduling, "PREFILL_TOKENS", 40)
    for _ in range(6):
        steps.ask()
    length = steps.waiting[0].prompt_tokens
    steps.step()
    assert len(steps.running) == max(1, 40 // length)
    monkeypatch.setattr(scheduling, "PREFILL_TOKENS", 1)
    before = len(steps.running)
    steps.step()
    assert len(steps.running) == before + 1


def test_a_step_copies_a_bounded_number_of_adapters(steps, monkeypatch):
    monkeypatch.setattr(scheduling, "COPIED_PARTS", 2)
    steps.ask("a0", "a1"), steps.ask("a2"), steps.ask()
    steps.step()
    assert [one.adapters for one in steps.waiting] == [("a2",)]
    steps.step()
    assert not steps.waiting


def test_many_orders_of_many_videos(model, store):
    """Each order is an adapter of its own; only the parts are kept in memory."""
    with Engine(model, store, max_batch=8, max_context=160, adapter_slots=2) as engine:
        orders = [tuple(f"a{(i * step + i // 3) % 3}" for i in range(64)) for step in range(6)]
        requests = [request(QUESTIONS[1], *ids, max_new_tokens=4) for ids in orders]
        for one in requests:
            engine.submit(one)
        for one in requests:
            whole = Adapter.compose([store.adapters[id] for id in one.adapters])
            assert one.result(WAIT)[0] == model.ask(QUESTIONS[1], whole, max_new_tokens=4)
        assert engine.stats().adapter_loads == 3
