"""The engine answers as the model does alone, whatever else it answers at the same time."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading

import pytest
import torch

from tests import tiny
from tests.rounding import RoundingCheck
from tests.serving.engine_parts import QUESTIONS, WAIT, MemoryStore, copies, request
from tests.video.clips import encode
from v2l_fast import Video2LoRA
from v2l_fast.errors import AdapterError, ConfigError, PromptTooLong, V2LError
from v2l_fast.generation import SamplingParams
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.serving import scheduler as scheduling
from v2l_fast.serving.engine import Engine
from v2l_fast.serving.request import (
    EngineClosed,
    OtherAdapter,
    QueueFull,
    StreamingRequest,
)
from v2l_fast.vlm.decoder import Decoder


@pytest.fixture
def store(adapters) -> MemoryStore:
    return MemoryStore(adapters)


@pytest.fixture
def engine(model, store):
    with Engine(model, store, max_batch=4, max_context=160, adapter_slots=3) as engine:
        yield engine


def alone(model: Video2LoRA, store: MemoryStore, one: StreamingRequest) -> str:
    """The answer of ``Video2LoRA`` to this request only."""
    sampling = {name: getattr(one.sampling, name) for name in SamplingParams.__dataclass_fields__}
    if one.clip is not None:
        return model.answer_direct(one.question, one.clip, **sampling)[0].text
    parts = [store.adapters[id] for id in one.adapters]
    return model.answer(one.question, Adapter.compose(parts) if parts else None, **sampling)[0].text


def mixture(clips, count: int, seed: int) -> list[StreamingRequest]:
    """Questions with one adapter, several, none, or a video; greedy and sampled; short and long."""
    rng = random.Random(seed)
    requests = []
    for index in range(count):
        sampled = {"temperature": 1.1, "top_p": 0.9, "seed": index} if index % 3 == 0 else {}
        ids = rng.choice([(), ("a0",), ("a1",), ("a2",), ("a0", "a1"), ("a2", "a1", "a0")])
        one = request(rng.choice(QUESTIONS), *ids, max_new_tokens=rng.randint(1, 14), **sampled)
        if index % 7 == 5:
            one = StreamingRequest(one.question, (), rng.choice(clips), one.sampling)
        requests.append(one)
    return requests


def test_the_engine_in_bfloat16_differs_by_rounding_alone(backbone, hypernet, store):
    """From the batch that a request happens to be in, and from asking alone."""
    check = RoundingCheck(backbone)
    check.backbone.stop_ids = ()
    model = Video2LoRA(check.backbone, hypernet)
    sets = ((), ("a0",), ("a1", "a2"), ("a2",))
    requests = [request(text, *ids) for text in QUESTIONS for ids in sets]
    with Engine(model, store, max_batch=6, max_context=160, adapter_slots=3) as engine:
        alone = copies(requests)
        for one in alone:
            engine.submit(one).result(WAIT)
        together = [engine.submit(one) for one in copies(requests, 2)]
        for one in together:
            one.result(WAIT)
    for index, one in enumerate(together):
        expected = alone[index % len(alone)]
        parts = [store.adapters[id] for id in one.adapters]
        prompt = backbone.prompt_builder.question(one.question)
        adapter = Adapter.compose(parts) if parts else None
        check.same(prompt, adapter, expected.tokens, one.tokens)


@pytest.mark.parametrize(("rows", "slots"), [(1, 1), (4, 2), (16, 8)])
def test_every_answer_is_the_same_as_alone(rows, slots, model, store, clips):
    requests = mixture(clips, 28, rows)
    with Engine(model, store, max_batch=rows, max_context=160, adapter_slots=slots) as engine:
        for one in requests:
            engine.submit(one)
        for one in requests:
            text, reason, usage = one.result(WAIT)
            assert text == alone(model, store, one)
            assert reason in ("stop", "length")
            assert 0 < usage.time_to_first_token < WAIT
            assert (usage.visual_tokens > 0) == (one.clip is not None)
        stats = engine.stats()
    assert (stats.running, stats.waiting, stats.jobs) == (0, 0, 0)
    assert stats.requests["stop"] + stats.requests["length"] == len(requests)
    assert stats.completion_tokens == sum(one.usage.completion_tokens for one in requests)
    with_adapter = sum(bool(one.adapters) for one in requests)
    assert stats.adapter_hits + stats.adapter_misses == with_adapter
    assert stats.adapter_loads == 3


def test_requests_join_and_leave_a_running_batch(engine, model, store):
    long = engine.submit(request(QUESTIONS[0], "a0", max_new_tokens=120))
    pieces = iter(long)
    next(pieces)
    for index in range(6):
        one = request(QUESTIONS[index % 3], f"a{index % 3}", max_new_tokens=4)
        assert engine.submit(one).result(WAIT)[0] == alone(model, store, one)
    assert not long.done or long.usage.completion_tokens == 120
    assert long.result(WAIT)[0] == alone(model, store, long)


def test_threads_submit_concurrently(engine, model, store, clips):
    requests = mixture(clips, 24, 5)
    expected = [alone(model, store, one) for one in requests]
    answers: dict[int, str] = {}

    def work(start: int) -> None:
        for index in range(start, len(requests), 4):
            answers[index] = engine.submit(requests[index]).result(WAIT)[0]

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[index] for index in range(len(requests))] == expected


def test_pieces_add_up_and_come_one_by_one(engine, model, store):
    one = engine.submit(request(QUESTIONS[0], "a1", max_new_tokens=40))
    pieces = list(one)
    assert "".join(piece.text for piece in pieces) == alone(model, store, one)
    assert len(pieces) > 10
    assert [p.finish_reason for p in pieces] == [None] * (len(pieces) - 1) + ["length"]
    # A later reader sees the answer from the beginning.
    assert list(one) == pieces
    with pytest.raises(ConfigError, match="submitted before"):
        engine.submit(one)


def test_in_an_event_loop(engine, model, store):
    requests = [request(q, "a0", max_new_tokens=20) for q in QUESTIONS]

    async def read(one: StreamingRequest) -> str:
        return "".join([chunk.text async for chunk in engine.submit(one).chunks()])

    async def main() -> list[str]:
        return await asyncio.gather(*map(read, requests))

    assert asyncio.run(main()) == [alone(model, store, one) for one in requests]


def test_a_stop_string_ends_an_answer(engine, model, store):
    free = request(QUESTIONS[1], "a0", max_new_tokens=30)
    whole = alone(model, store, free)
    words = whole.split()
    stop = " ".join(words[3:5])
    one = engine.submit(request(QUESTIONS[1], "a0", stop=(stop, "never"), max_new_tokens=30))
    text, reason, usage = one.result(WAIT)
    assert text == whole[: whole.index(stop)].rstrip() and reason == "stop"
    assert usage.completion_tokens < 30


def test_cancelling(engine, model, store):
    running = engine.submit(request(QUESTIONS[0], "a0", max_new_tokens=140))
    next(iter(running))
    running.cancel()
    text, reason, usage = running.result(WAIT)
    assert reason == "cancelled" and 0 < usage.completion_tokens < 140
    assert alone(model, store, running).startswith(text)


def test_cancelling_a_waiting_request(model, store):
    with Engine(model, store, max_batch=1, max_context=160) as engine:
        first = engine.submit(request(QUESTIONS[0], max_new_tokens=140))
        waiting = engine.submit(request(QUESTIONS[1], "a0"))
        waiting.cancel()
        assert waiting.result(WAIT)[:2] == ("", "cancelled")
        assert not first.done
        first.cancel()
        assert engine.submit(request(QUESTIONS[1])).result(WAIT)[1] == "length"


@pytest.mark.parametrize(
    ("ids", "in_context"), [((), False), (("a0",), False), (("a0", "a1"), False), ((), True)]
)
def test_several_answers_to_one_prompt(
    ids, in_context, model, store, clips, prefill_rows, monkeypatch
):
    monkeypatch.setattr(scheduling, "PREFILL_TOKENS", 1)
    sampling = SamplingParams(9, temperature=1.3, seed=7, n=4, logprobs=2)
    whole = StreamingRequest(QUESTIONS[0], ids, clips[0] if in_context else None, sampling)
    with Engine(
        model, store, max_batch=4, max_context=160, adapter_slots=1, warm_up=False
    ) as engine:
        with pytest.raises(ConfigError, match="submit_all"):
            engine.submit(whole)
        requests = engine.submit_all(whole)
        texts = [one.result(WAIT)[0] for one in requests]
        assert prefill_rows == [1] and len(set(texts)) > 1
        for index, one in enumerate(requests):
            assert one.sampling.seed == 7 + index
            assert texts[index] == alone(model, store, one)
            reported = [entry for chunk in one for entry in chunk.logprobs]
            assert [entry.token for entry in reported] == one.tokens
            assert all(len(entry.top) == 2 for entry in reported)
        with pytest.raises(QueueFull):
            engine.submit_all(whole.copy(SamplingParams(9, n=300)))
        assert engine.stats().requests["error"] == engine.stats().waiting == 0


def converse(model, store, engine, ids=(), clip=None, turns=3) -> list[int]:
    """A conversation whose answers must be those alone; how many tokens each turn reused."""
    messages, reused = [], []
    for turn in range(turns):
        messages.append({"role": "user", "content": QUESTIONS[2 if turn == 0 else turn % 2]})
        one = StreamingRequest(list(messages), ids, clip, SamplingParams(6))
        text, _, usage = engine.submit(one).result(WAIT)
        assert text == alone(model, store, one)
        assert usage.prompt_tokens > usage.reused_tokens
        messages.append({"role": "assistant", "content": text})
        reused.append(usage.reused_tokens)
    return reused


@pytest.mark.parametrize("ids", [(), ("a0",), ("a0", "a1")])
def test_a_conversation_reuses_its_prefix(ids, engine, model, store):
    first, *later = converse(model, store, engine, ids)
    assert first == 0 and later[0] >= 16 and later[1] > later[0]
    assert engine.stats().reused_tokens == sum(later)


def test_the_next_question_about_a_video_encodes_no_frame(engine, model, store, clips, monkeypatch):
    encoded, encode = [], type(model.backbone).encode_views

    def counted(self, views):
        encoded.append(threading.current_thread().name)
        return encode(self, views)

    monkeypatch.setattr(type(model.backbone), "encode_views", counted)
    converse(model, store, engine, clip=clips[0])
    again = StreamingRequest("how many?", clip=tiny.clip(3, 0), sampling=SamplingParams(6, n=2))
    other = StreamingRequest("how many?", clip=tiny.clip(3, 7), sampling=SamplingParams(6))
    texts = [one.result(WAIT)[0] for one in engine.submit_all(again)]
    assert encoded.count("v2l-engine") == 1
    assert engine.submit(other).result(WAIT)[0] == alone(model, store, other)
    assert encoded.count("v2l-engine") == 2
    monkeypatch.undo()
    assert texts == [
        a.text for a in model.answer_direct("how many?", clips[0], max_new_tokens=6, n=2)
    ]
    assert not any(s.leases for s in engine._prefix_cache._order)


def test_prefixes_belong_to_content_not_to_names(engine, model, store):
    store.adapters["again"] = store.adapters["a0"]
    assert converse(model, store, engine, ("a0",), turns=1) == [0]
    assert converse(model, store, engine, ("a1",), turns=1) == [0]
    assert converse(model, store, engine, ("a0", "a1"), turns=1) == [0]
    assert converse(model, store, engine, ("again",), turns=1)[0] > 0


@pytest.mark.parametrize("limit", [0, 20_000])
def test_a_small_prefix_cache(limit, model, store, clips):
    """Many conversations at once beyond the limit; some requests are cancelled."""
    with Engine(
        model, store, max_batch=4, max_context=160, adapter_slots=3, prefix_cache_bytes=limit
    ) as engine:
        requests = mixture(clips, 24, 5) * 2
        requests = [one.copy() for one in requests]
        for one in requests:
            engine.submit(one)
        for one in requests[::5]:
            one.cancel()
        for index, one in enumerate(requests):
            text, reason, _ = one.result(WAIT)
            assert index % 5 == 0 or text == alone(model, store, one)
        cache = engine._prefix_cache
        assert cache.bytes <= limit and not any(s.leases for s in cache._order)


def test_limits(engine, clips):
    with pytest.raises(PromptTooLong, match="160"):
        engine.submit(request(QUESTIONS[0], max_new_tokens=155))
    with pytest.raises(PromptTooLong, match="context of 160"):
        engine.submit(request("what " * 200))
    long = engine.submit(
        StreamingRequest("what?", clip=tiny.clip(8, 0), sampling=SamplingParams(max_new_tokens=100))
    )
    with pytest.raises(PromptTooLong):
        long.result(WAIT)
    with pytest.raises(PromptTooLong):
        list(long)
    with pytest.raises(AdapterError, match="nobody"):
        engine.submit(request(QUESTIONS[0], "a0", "nobody"))
    with pytest.raises(ConfigError, match="not both"):
        StreamingRequest("what?", ("a0",), clips[0])
    with pytest.raises(ConfigError, match="not be empty"):
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
        assert [one.result(WAIT)[1] for one in waiting] == ["length"] * 2


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


def test_an_error_ends_only_its_request(engine, model, store, monkeypatch):
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
    for index in range(4):
        one = request(QUESTIONS[index % 3], f"a{index % 3}")
        assert engine.submit(one).result(WAIT)[0] == alone(model, store, one)
    assert engine.stats().requests["error"] == 1 and engine.stats().running == 0


def test_merged_mode(model, store):
    requests = [request(q, "a1", max_new_tokens=14) for q in QUESTIONS]
    before = [alone(model, store, request(q)) for q in QUESTIONS]
    with Engine(model, store, merged="a1", max_context=160) as engine:
        for one in [engine.submit(one) for one in requests]:
            assert one.result(WAIT)[0] == alone(model, store, one)
        for other in (request("what?"), request("what?", "a0"), request("what?", "a1", "a0")):
            with pytest.raises(OtherAdapter, match="adapter a1 only"):
                engine.submit(other)
        assert engine.stats().adapter_hits + engine.stats().adapter_misses == 0
        assert [alone(model, store, request(q)) for q in QUESTIONS] == before
    with pytest.raises(AdapterError, match="nobody"):
        Engine(model, store, merged="nobody")


def test_closing_finishes_unfinished_requests(model, store):
    engine = Engine(model, store, max_batch=1, max_context=160)
    requests = [engine.submit(request(q, "a0")) for q in QUESTIONS]
    engine.close()
    assert all(one.result(0)[0] == alone(model, store, one) for one in requests)
    for call in (lambda: engine.submit(request("what?")), lambda: engine.internalize("x.mp4")):
        with pytest.raises(EngineClosed):
            call()
    engine.close()


def test_closing_at_once(model, store, tmp_path):
    engine = Engine(model, store, max_batch=1, max_context=160)
    requests = [engine.submit(request(QUESTIONS[0], max_new_tokens=140)) for _ in range(3)]
    jobs = [engine.internalize(encode(tmp_path / "c.mp4", 12)) for _ in range(4)]
    engine.close(drain=False)
    for one in requests:
        with pytest.raises(EngineClosed):
            list(one)
    assert all(job.state in ("done", "failed") for job in jobs)


# --- internalizing --------------------------------------------------------------------------------


def test_a_file_becomes_an_adapter_that_answers(engine, model, store, tmp_path):
    path = encode(tmp_path / "clip.mp4", 12)
    job = engine.internalize(path, model.config.sampling.override(max_frames=3, exact_frames=True))
    id = job.wait(WAIT)
    expected = model.internalize(path, max_frames=3, exact_frames=True)
    assert torch.equal(store.adapters[id].A["down_proj"], expected.A["down_proj"])
    assert torch.equal(store.adapters[id].B["down_proj"], expected.B["down_proj"])
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


def test_internalizing_and_answering_alternate(model, store, tmp_path, monkeypatch):
    path = encode(tmp_path / "clip.mp4", 12)
    with Engine(model, store, max_batch=2, max_context=160) as engine:
        events: list[str] = []
        runner, interleaver = engine._scheduler.runner, engine._interleaver
        decode, run_unit = runner.decode, interleaver.run_unit

        def logged_decode(adapters=None):
            events.append("step")
            decode(adapters)

        def logged_unit() -> bool:
            ran = run_unit()
            events.extend(["unit"] * ran)
            return ran

        monkeypatch.setattr(runner, "decode", logged_decode)
        monkeypatch.setattr(interleaver, "run_unit", logged_unit)
        one = engine.submit(request(QUESTIONS[0], "a0", max_new_tokens=140))
        next(iter(one))
        job = engine.internalize(path)
        assert one.result(WAIT)[0] == alone(model, store, one)
        job.wait(WAIT)
    # Encoding, each layer, and the end: never two in a row while tokens are due.
    assert events.count("unit") >= 5
    last = max(index for index, event in enumerate(events) if event == "step")
    answering = events[: last + 1]
    assert all(pair != ("unit", "unit") for pair in itertools.pairwise(answering))
