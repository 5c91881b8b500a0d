"""The engine against the model asked alone, whatever is answered at the same time."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading

import pytest
import torch

from tests import tiny
from tests.serving.engine_parts import QUESTIONS, WAIT, MemoryStore, request
from tests.video.clips import encode
from v2l_fast import Video2LoRA
from v2l_fast.errors import AdapterError, ConfigError, V2LError
from v2l_fast.generation import SamplingParams
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.serving.engine import Engine
from v2l_fast.serving.requests import (
    EngineClosed,
    GenerationRequest,
    OtherAdapter,
    PromptTooLong,
    QueueFull,
)
from v2l_fast.vlm.decoder import Decoder


@pytest.fixture
def store(adapters) -> MemoryStore:
    return MemoryStore(adapters)


@pytest.fixture
def engine(model, store):
    with Engine(model, store, max_batch=4, max_context=160, adapter_slots=3) as engine:
        yield engine


def alone(model: Video2LoRA, store: MemoryStore, asked: GenerationRequest) -> str:
    """The answer of ``Video2LoRA`` to nothing but this request."""
    sampling = {name: getattr(asked.sampling, name) for name in SamplingParams.__dataclass_fields__}
    if asked.clip is not None:
        return model.ask_direct(asked.text, asked.clip, **sampling)
    parts = [store.adapters[id] for id in asked.adapters]
    return model.ask(asked.text, Adapter.compose(parts) if parts else None, **sampling)


def mixture(clips, count: int, seed: int) -> list[GenerationRequest]:
    """Questions with one adapter, several, none, or a video; greedy and drawn; short and long."""
    rng = random.Random(seed)
    made = []
    for place in range(count):
        drawn = {"temperature": 1.1, "top_p": 0.9, "seed": place} if place % 3 == 0 else {}
        ids = rng.choice([(), ("a0",), ("a1",), ("a2",), ("a0", "a1"), ("a2", "a1", "a0")])
        asked = request(rng.choice(QUESTIONS), *ids, max_new_tokens=rng.randint(1, 14), **drawn)
        if place % 7 == 5:
            asked = GenerationRequest(asked.text, (), rng.choice(clips), asked.sampling)
        made.append(asked)
    return made


@pytest.mark.parametrize(("rows", "slots"), [(1, 1), (4, 2), (16, 8)])
def test_every_answer_is_the_one_given_alone(rows, slots, model, store, clips):
    asked = mixture(clips, 28, rows)
    with Engine(model, store, max_batch=rows, max_context=160, adapter_slots=slots) as engine:
        made = [engine.submit(one) for one in asked]
        for one, generation in zip(asked, made, strict=True):
            text, reason, usage = generation.result(WAIT)
            assert text == alone(model, store, one)
            assert reason in ("stop", "length")
            assert 0 < usage.time_to_first_token < WAIT
            assert (usage.visual_tokens > 0) == (one.clip is not None)
        stats = engine.stats()
    assert (stats.running, stats.waiting, stats.jobs) == (0, 0, 0)
    assert stats.requests["stop"] + stats.requests["length"] == len(asked)
    assert stats.completion_tokens == sum(g.usage.completion_tokens for g in made)
    with_adapter = sum(bool(one.adapters) for one in asked)
    assert stats.adapter_hits + stats.adapter_misses == with_adapter
    assert stats.adapter_loads == 3


def test_requests_join_and_leave_a_running_batch(engine, model, store):
    long = engine.submit(request(QUESTIONS[0], "a0", max_new_tokens=120))
    pieces = iter(long)
    next(pieces)
    for place in range(6):
        one = request(QUESTIONS[place % 3], f"a{place % 3}", max_new_tokens=4)
        assert engine.submit(one).result(WAIT)[0] == alone(model, store, one)
    assert not long.done or long.usage.completion_tokens == 120
    assert long.result(WAIT)[0] == alone(model, store, long.request)


def test_threads_submit_at_once(engine, model, store, clips):
    asked = mixture(clips, 24, 5)
    expected = [alone(model, store, one) for one in asked]
    found: dict[int, str] = {}

    def work(start: int) -> None:
        for place in range(start, len(asked), 4):
            found[place] = engine.submit(asked[place]).result(WAIT)[0]

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[place] for place in range(len(asked))] == expected


def test_pieces_add_up_and_come_one_by_one(engine, model, store):
    asked = request(QUESTIONS[0], "a1", max_new_tokens=40)
    generation = engine.submit(asked)
    pieces = list(generation)
    assert "".join(piece.text for piece in pieces) == alone(model, store, asked)
    assert len(pieces) > 10
    assert [p.finish_reason for p in pieces] == [None] * (len(pieces) - 1) + ["length"]
    # A reader that comes later sees it from the beginning.
    assert list(generation) == pieces


def test_in_an_event_loop(engine, model, store):
    asked = [request(q, "a0", max_new_tokens=20) for q in QUESTIONS]

    async def read(one: GenerationRequest) -> str:
        return "".join([chunk.text async for chunk in engine.submit(one).chunks()])

    async def main() -> list[str]:
        return await asyncio.gather(*map(read, asked))

    assert asyncio.run(main()) == [alone(model, store, one) for one in asked]


def test_a_stop_string_ends_an_answer(engine, model, store):
    free = request(QUESTIONS[1], "a0", max_new_tokens=30)
    whole = alone(model, store, free)
    words = whole.split()
    stop = " ".join(words[3:5])
    generation = engine.submit(request(QUESTIONS[1], "a0", stop=(stop, "never"), max_new_tokens=30))
    text, reason, usage = generation.result(WAIT)
    assert text == whole[: whole.index(stop)].rstrip() and reason == "stop"
    assert usage.completion_tokens < 30


def test_cancelling(engine, model, store):
    running = engine.submit(request(QUESTIONS[0], "a0", max_new_tokens=140))
    next(iter(running))
    running.cancel()
    text, reason, usage = running.result(WAIT)
    assert reason == "cancelled" and 0 < usage.completion_tokens < 140
    assert alone(model, store, running.request).startswith(text)


def test_cancelling_what_waits(model, store):
    with Engine(model, store, max_batch=1, max_context=160) as engine:
        first = engine.submit(request(QUESTIONS[0], max_new_tokens=140))
        waiting = engine.submit(request(QUESTIONS[1], "a0"))
        waiting.cancel()
        assert waiting.result(WAIT)[:2] == ("", "cancelled")
        assert not first.done
        first.cancel()
        assert engine.submit(request(QUESTIONS[1])).result(WAIT)[1] == "length"


def test_limits(engine, clips):
    with pytest.raises(PromptTooLong, match="160"):
        engine.submit(request(QUESTIONS[0], max_new_tokens=155))
    with pytest.raises(PromptTooLong, match="more than 160"):
        engine.submit(request("what " * 200))
    long = engine.submit(
        GenerationRequest(
            "what?", clip=tiny.clip(8, 0), sampling=SamplingParams(max_new_tokens=100)
        )
    )
    with pytest.raises(PromptTooLong):
        long.result(WAIT)
    with pytest.raises(PromptTooLong):
        list(long)
    with pytest.raises(AdapterError, match="nobody"):
        engine.submit(request(QUESTIONS[0], "a0", "nobody"))
    with pytest.raises(ConfigError, match="not both"):
        GenerationRequest("what?", ("a0",), clips[0])
    with pytest.raises(ConfigError, match="empty"):
        request("what?", stop=("",))
    assert engine.stats().requests["error"] == 1


def test_a_full_queue(model, store):
    with Engine(model, store, max_batch=1, max_context=160, queue_limit=2) as engine:
        first = engine.submit(request(QUESTIONS[0], max_new_tokens=140))
        next(iter(first))
        waiting = [engine.submit(request(QUESTIONS[0])) for _ in range(2)]
        with pytest.raises(QueueFull, match="2 questions"):
            engine.submit(request(QUESTIONS[0]))
        first.cancel()
        assert [g.result(WAIT)[1] for g in waiting] == ["length"] * 2


def test_an_adapter_of_another_model_is_refused(engine, store, adapters):
    stranger = Adapter(dict(adapters[0].A), dict(adapters[0].B), 99.0, adapters[0].bias)
    store.adapters["stranger"] = stranger
    with pytest.raises(AdapterError, match="scale"):
        engine.submit(request(QUESTIONS[0], "stranger"))


def test_forgetting(engine, store):
    engine.submit(request(QUESTIONS[0], "a0")).result(WAIT)
    del store.adapters["a0"]
    engine.submit(request(QUESTIONS[0], "a0")).result(WAIT)
    engine.forget("a0")
    with pytest.raises(AdapterError, match="no such adapter"):
        engine.submit(request(QUESTIONS[0], "a0"))


def test_an_error_ends_its_requests_and_nothing_else(engine, model, store, monkeypatch):
    engine.submit(request(QUESTIONS[0])).result(WAIT)
    failures = itertools.chain([RuntimeError("device lost")], itertools.repeat(None))
    logits = Decoder.logits

    def sometimes(self, hidden):
        failure = next(failures)
        if failure is not None:
            raise failure
        return logits(self, hidden)

    monkeypatch.setattr(Decoder, "logits", sometimes)
    with pytest.raises(V2LError, match="RuntimeError; see the server's log"):
        engine.submit(request(QUESTIONS[0], "a0")).result(WAIT)
    for place in range(4):
        one = request(QUESTIONS[place % 3], f"a{place % 3}")
        assert engine.submit(one).result(WAIT)[0] == alone(model, store, one)
    assert engine.stats().requests["error"] == 1 and engine.stats().running == 0


def test_merged_mode(model, store):
    asked = [request(q, "a1", max_new_tokens=14) for q in QUESTIONS]
    before = [alone(model, store, request(q)) for q in QUESTIONS]
    with Engine(model, store, merged="a1", max_context=160) as engine:
        for one, generation in zip(asked, [engine.submit(one) for one in asked], strict=True):
            assert generation.result(WAIT)[0] == alone(model, store, one)
        for other in (request("what?"), request("what?", "a0"), request("what?", "a1", "a0")):
            with pytest.raises(OtherAdapter, match="adapter a1 alone"):
                engine.submit(other)
        assert engine.stats().adapter_hits + engine.stats().adapter_misses == 0
        assert [alone(model, store, request(q)) for q in QUESTIONS] == before
    with pytest.raises(AdapterError, match="nobody"):
        Engine(model, store, merged="nobody")


def test_closing_finishes_what_is_there(model, store):
    engine = Engine(model, store, max_batch=1, max_context=160)
    made = [engine.submit(request(q, "a0")) for q in QUESTIONS]
    engine.close()
    assert all(g.result(0)[0] == alone(model, store, g.request) for g in made)
    for call in (lambda: engine.submit(request("what?")), lambda: engine.internalize("x.mp4")):
        with pytest.raises(EngineClosed):
            call()
    engine.close()


def test_closing_at_once(model, store, tmp_path):
    engine = Engine(model, store, max_batch=1, max_context=160)
    made = [engine.submit(request(QUESTIONS[0], max_new_tokens=140)) for _ in range(3)]
    jobs = [engine.internalize(encode(tmp_path / "c.mp4", 12)) for _ in range(4)]
    engine.close(drain=False)
    for generation in made:
        with pytest.raises(EngineClosed):
            list(generation)
    assert all(job.state in ("done", "failed") for job in jobs)


# --- internalizing --------------------------------------------------------------------------------


def test_a_file_becomes_an_adapter_that_answers(engine, model, store, tmp_path):
    path = encode(tmp_path / "clip.mp4", 12)
    job = engine.internalize(path, max_frames=3, exact_frames=True)
    id = job.wait(WAIT)
    made = model.internalize(path, max_frames=3, exact_frames=True)
    for found, wanted in ((store.adapters[id].A, made.A), (store.adapters[id].B, made.B)):
        assert torch.equal(found["down_proj"], wanted["down_proj"])
    assert (job.state, job.progress, job.adapter_id) == ("done", 1.0, id)
    assert set(job.seconds) == {"queued", "decoding", "encoding", "generating"}
    one = request(QUESTIONS[0], id)
    assert engine.submit(one).result(WAIT)[0] == alone(model, store, one)
    assert engine.stats().adapter_loads == 0 and engine.stats().jobs_done == 1


def test_a_broken_file_fails_its_job_alone(engine, tmp_path):
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"not a video")
    jobs = [engine.internalize(bad), engine.internalize(encode(tmp_path / "good.mp4", 6))]
    with pytest.raises(V2LError, match="bad.mp4"):
        jobs[0].wait(WAIT)
    assert jobs[1].wait(WAIT)
    assert jobs[0].state == "failed" and engine.stats().jobs_failed == 1


def test_too_many_jobs(model, store, tmp_path, monkeypatch):
    gate = threading.Event()
    load = Video2LoRA.load_clip
    monkeypatch.setattr(Video2LoRA, "load_clip", lambda *a: gate.wait(WAIT) and load(*a))
    path = encode(tmp_path / "clip.mp4", 6)
    with Engine(model, store, queue_limit=3) as engine:
        jobs = [engine.internalize(path) for _ in range(3)]
        with pytest.raises(QueueFull, match="3 videos"):
            engine.internalize(path)
        assert engine.stats().jobs == 3
        gate.set()
        assert all(job.wait(WAIT) for job in jobs)


def test_internalizing_and_answering_take_turns(model, store, tmp_path, monkeypatch):
    path = encode(tmp_path / "clip.mp4", 12)
    with Engine(model, store, max_batch=2, max_context=160) as engine:
        events: list[str] = []
        batch = engine._answering.batch
        step, unit = batch.decode, engine._background.step

        def logged_step(adapters=None):
            events.append("step")
            step(adapters)

        def logged_unit() -> bool:
            found = unit()
            events.extend(["unit"] * found)
            return found

        monkeypatch.setattr(batch, "decode", logged_step)
        monkeypatch.setattr(engine._background, "step", logged_unit)
        asked = request(QUESTIONS[0], "a0", max_new_tokens=140)
        generation = engine.submit(asked)
        next(iter(generation))
        job = engine.internalize(path)
        assert generation.result(WAIT)[0] == alone(model, store, asked)
        job.wait(WAIT)
    # Encoding, each layer, and the end: none of them after another while tokens were due.
    assert events.count("unit") >= 5
    last = max(place for place, event in enumerate(events) if event == "step")
    answering = events[: last + 1]
    assert all(pair != ("unit", "unit") for pair in itertools.pairwise(answering))
