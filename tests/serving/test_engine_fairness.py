"""No request changes another one's answer, ends it, or makes it wait without bound."""

from __future__ import annotations

from collections import deque

import pytest
import torch

from tests.serving.engine_parts import QUESTIONS, WAIT, MemoryStore, request
from v2l_fast.errors import AdapterError, V2LError
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.serving import answering
from v2l_fast.serving.answering import Answering, Waiting
from v2l_fast.serving.engine import Engine
from v2l_fast.serving.requests import Generation
from v2l_fast.serving.slots import DeviceAdapterCache, HostAdapters
from v2l_fast.serving.text import TextStream
from v2l_fast.vlm.decoder import Decoder

M = "down_proj"


@pytest.fixture
def store(adapters) -> MemoryStore:
    return MemoryStore(adapters)


def neighbors(model, store, engine, odd) -> None:
    """Ask ``odd`` amid others, which must get what they get alone; its error if it has one."""
    plain = [request(q, *ids, max_new_tokens=12) for q in QUESTIONS for ids in ((), ("a0",))]
    drawn = [request(q, "a1", max_new_tokens=12, temperature=1.2, seed=4) for q in QUESTIONS]
    asked = [*plain, odd, *drawn]
    made = [engine.submit(one) for one in asked]
    for one, generation in zip(asked, made, strict=True):
        if one is odd:
            continue
        parts = [store.adapters[id] for id in one.adapters]
        options = {k: getattr(one.sampling, k) for k in ("max_new_tokens", "temperature", "seed")}
        expected = model.ask(one.text, Adapter.compose(parts) if parts else None, **options)
        assert generation.result(WAIT)[0] == expected
    made[len(plain)].result(WAIT)


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
def test_a_poisoned_adapter_ends_its_own_request(value, model, store, adapters):
    poisoned = Adapter({M: adapters[2].A[M]}, {M: torch.full_like(adapters[2].B[M], value)},
                       adapters[2].scale, adapters[2].bias)  # fmt: skip
    store.adapters["poisoned"] = poisoned
    with Engine(model, store, max_batch=10, max_context=160, adapter_slots=3) as engine:
        for _ in range(2):
            with pytest.raises(AdapterError, match="NaN or infinite"):
                neighbors(model, store, engine, request(QUESTIONS[0], "poisoned"))
        # Slots and rows that it had serve others.
        for place in range(9):
            one = request(QUESTIONS[place % 3], f"a{place % 3}")
            assert engine.submit(one).result(WAIT)[0] == model.ask(
                one.text, store.adapters[one.adapters[0]], max_new_tokens=10
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
        odd = request(odd.text, "a2", stop=("marked",), max_new_tokens=12)
    elif where == "fill":
        fill = DeviceAdapterCache._fill

        def copies(self, slot, adapter):
            return (broken if slot == self._slot_of.get(("a2",)) else fill)(self, slot, adapter)

        monkeypatch.setattr(DeviceAdapterCache, "_fill", copies)
    else:
        ids = model.backbone.prompt_builder.question(odd.text)
        embed = Decoder.embed

        def embeds(self, given):
            return (broken if given.tolist() == ids else embed)(self, given)

        monkeypatch.setattr(Decoder, "embed", embeds)
    with Engine(model, store, max_batch=10, max_context=160, adapter_slots=3) as engine:
        for _ in range(2):
            with pytest.raises(V2LError, match="RuntimeError; see the server's log"):
                neighbors(model, store, engine, odd)
        assert engine.stats().requests["error"] == 2
        assert engine.stats().running == 0
        assert len(engine._answering.slots._idle) == 3


# --- slots ----------------------------------------------------------------------------------------


@pytest.fixture
def taking(model, store):
    """An :class:`Answering` of 8 rows and 2 slots, and a function that queues requests."""
    host = HostAdapters(model, store, 99)
    left = []
    with torch.inference_mode():
        part = Answering(model, 8, 160, 2, None, lambda made, why: left.append(made) or True)
        queue: deque[Waiting] = deque()

        def ask(*ids: str, tokens: int = 100) -> Generation:
            made = Generation(request(QUESTIONS[0], *ids, max_new_tokens=tokens))
            prompt = model.backbone.prompt_builder.question(QUESTIONS[0])
            queue.append(Waiting(made, prompt, adapter=host.get(ids) if ids else None))
            return made

        def turn() -> None:
            part.take(queue)
            part.step()

        yield part, queue, ask, turn, left


def test_what_has_no_slot_is_skipped(taking):
    part, queue, ask, turn, _ = taking
    for ids in (("a0",), ("a1",)):
        ask(*ids)
    turn()
    stuck = ask("a2"), ask("a0", "a1")
    free = ask(), ask("a0"), ask("a1"), ask()
    turn()
    running = {row.waiting.generation for row in part.batch.requests}
    assert running >= set(free) and not running & set(stuck)
    assert [waiting.generation for waiting in queue] == list(stuck)
    assert [waiting.passed for waiting in queue] == [4, 4]


def test_nothing_starves(taking, monkeypatch):
    """Users of resident adapters come for ever: one that needs a slot is served all the same."""
    monkeypatch.setattr(answering, "PATIENCE", 5)
    part, queue, ask, turn, left = taking
    ask("a0"), ask("a1")
    turn()
    stuck = [ask("a2"), ask("a0", "a1"), ask("a2", "a0")]
    for place in range(400):
        # More than there are rows, so that one user follows the other.
        if len(queue) < 12:
            ask(f"a{place % 2}", tokens=7)
        if place == 200:
            assert left
        turn()
        if all(not any(w.generation is one for w in queue) for one in stuck):
            break
    assert place < 399
    # Each was passed by few, though all that time the others had slots.
    assert all(row.waiting.passed <= 5 + 1 for row in part.batch.requests)


def test_the_plain_model_is_never_held_up_by_slots(taking, monkeypatch):
    monkeypatch.setattr(answering, "PATIENCE", 0)
    part, queue, ask, turn, _ = taking
    ask("a0"), ask("a1")
    turn()
    ask("a2")
    plain = ask()
    user = ask("a0")
    turn()
    running = {row.waiting.generation for row in part.batch.requests}
    assert plain in running and user not in running and len(queue) == 2


def test_a_turn_takes_bounded_work(taking, monkeypatch):
    monkeypatch.setattr(answering, "PREFILL_TOKENS", 40)
    part, queue, ask, turn, _ = taking
    for _ in range(6):
        ask()
    length = len(queue[0].prompt)
    turn()
    assert len(part.batch.requests) == max(1, 40 // length)
    monkeypatch.setattr(answering, "PREFILL_TOKENS", 1)
    before = len(part.batch.requests)
    turn()
    assert len(part.batch.requests) == before + 1


def test_a_turn_fills_a_bounded_number_of_slots(taking, monkeypatch):
    monkeypatch.setattr(answering, "FILLED_PARTS", 2)
    part, queue, ask, turn, _ = taking
    ask("a0", "a1"), ask("a2"), ask()
    turn()
    assert [waiting.generation.request.adapters for waiting in queue] == [("a2",)]
    turn()
    assert not queue


def test_many_orders_of_many_videos(model, store, adapters):
    """Each order is an adapter of its own; nothing of them is kept but what each part is."""
    with Engine(model, store, max_batch=8, max_context=160, adapter_slots=2) as engine:
        orders = [tuple(f"a{(i * step + i // 3) % 3}" for i in range(64)) for step in range(6)]
        made = [engine.submit(request(QUESTIONS[1], *ids, max_new_tokens=4)) for ids in orders]
        for ids, generation in zip(orders, made, strict=True):
            whole = Adapter.compose([store.adapters[id] for id in ids])
            assert generation.result(WAIT)[0] == model.ask(QUESTIONS[1], whole, max_new_tokens=4)
        assert engine.stats().adapter_loads == 3
