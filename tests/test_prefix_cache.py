"""Reused keys and values are those of the same tokens, adapter and video, and memory is bounded."""

from __future__ import annotations

import os
import random

import pytest
import torch

from v2l_fast.errors import ConfigError
from v2l_fast.generation import CacheKey, ModelRunner, PrefixCache, Request, SamplingParams
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.hypernet.adapter_bank import AdapterBank
from v2l_fast.serving import graphs
from v2l_fast.vlm.decoder import StaticKVCache

L, HEADS, SIZE = 2, 1, 4
TOKEN_BYTES = 2 * L * HEADS * SIZE * 4


def states(scope, tokens) -> torch.Tensor:
    """Keys that depend on the scope and on all tokens up to each one, as a decoder's do."""
    values, state = [], hash(scope) % 1009
    for token in tokens:
        state = (state * 31 + token + 1) % 100003
        values.append(state)
    wide = torch.tensor(values, dtype=torch.float32)
    return wide[None, None, :, None].expand(L, HEADS, -1, SIZE)


def insert(cache, tokens, scope=None) -> None:
    keys = states(scope, tokens)
    cache.insert(CacheKey(tokens, scope), keys, -keys)


def check(cache, tokens, scope=None, minimum=1) -> int:
    """How many tokens are known; their keys and values must be right."""
    prefix = cache.acquire(CacheKey(tokens, scope), minimum)
    if prefix is None:
        return 0
    row = StaticKVCache(*(torch.full((L, 2, HEADS, 99, SIZE), 7.0) for _ in range(2)))
    prefix.copy_to(row, 1)
    expected = states(scope, tokens)[:, :, : prefix.length]
    assert torch.equal(row.keys[:, 1, :, : prefix.length], expected)
    assert torch.equal(row.values[:, 1, :, : prefix.length], -expected)
    assert (row.keys[:, 0] == 7).all() and (row.keys[:, 1, :, prefix.length :] == 7).all()
    cache.release(prefix)
    return prefix.length


@pytest.mark.parametrize("limit", [30, 200, 10**6])
def test_prefixes_of_random_conversations(limit):
    """A match is the longest one if nothing was evicted, and never wrong."""
    rng = random.Random(limit)
    cache, seen = PrefixCache(limit * TOKEN_BYTES), []
    for _ in range(300):
        scope = rng.choice([None, "a", ("b", 1)])
        start = list(rng.choice(seen)[1]) if seen and rng.random() < 0.7 else []
        start = start[: rng.randint(0, len(start))][:70]
        tokens = start + [rng.randrange(3) for _ in range(rng.randint(1, 20))]
        known = check(cache, tokens, scope)
        others = [other for s, other in seen if s == scope]
        common = max((len(os.path.commonprefix([tokens, list(o)])) for o in others), default=0)
        assert known <= min(common, len(tokens) - 1)
        if limit == 10**6:
            assert known == min(common, len(tokens) - 1)
        insert(cache, tokens, scope)
        seen.append((scope, tuple(tokens)))
        assert cache.bytes <= limit * TOKEN_BYTES
        assert cache.bytes == sum(segment.bytes for segment in cache._order)
        assert all(list(cache._order).index(s) < list(cache._order).index(s.parent)
                   for s in list(cache._order)[:20] if s.parent is not None)  # fmt: skip


def test_the_least_recently_used_goes_first():
    cache = PrefixCache(20 * TOKEN_BYTES)
    insert(cache, [1] * 10), insert(cache, [2] * 10)
    assert check(cache, [1] * 10) == 9
    insert(cache, [3] * 10)
    assert check(cache, [2] * 10) == 0
    assert check(cache, [1] * 10) == check(cache, [3] * 10) == 9


def test_leased_prefixes_are_not_evicted():
    cache = PrefixCache(20 * TOKEN_BYTES)
    insert(cache, [1] * 10), insert(cache, [2] * 10)
    leased = [cache.acquire(CacheKey([token] * 11), 1) for token in (1, 2)]
    insert(cache, [3] * 10)
    assert check(cache, [3] * 10) == 0 and cache.bytes == 20 * TOKEN_BYTES
    insert(cache, [1] * 5 + [4])
    cache.retain(leased[0])
    for _ in range(2):
        cache.release(leased[0])
    cache.release(leased[1])
    insert(cache, [3] * 10)
    assert check(cache, [3] * 10) == 9


def test_short_matches_and_no_room():
    cache = PrefixCache(10**6)
    insert(cache, range(20))
    assert check(cache, range(16), minimum=16) == 0
    assert check(cache, range(17), minimum=16) == 16
    nothing = PrefixCache(0)
    insert(nothing, [1, 2])
    assert len(nothing) == 0
    cache.clear()
    assert check(cache, range(20)) == cache.bytes == 0
    with pytest.raises(ConfigError, match="at least 0, got -1"):
        PrefixCache(-1)


# --- in the runner --------------------------------------------------------------------------------


def talk(backbone, runner, ids, adapters=None, slot=-1, scope=None, **sampling) -> Request:
    request = Request(SamplingParams(9, **sampling), slot, cache_key=CacheKey(ids, scope))
    runner.prefill([request], [backbone.decoder.embed(torch.tensor(ids))], adapters)
    while runner.retire_finished():
        runner.decode(adapters)
    return request


@pytest.fixture(params=["runner", "graphs"])
def new_runner(request, monkeypatch):
    """Makes runners; with captured passes, which a CPU calls again."""
    if request.param == "runner":
        return ModelRunner

    def capture(self, run, inputs, adapters):
        output = run()
        graph = type("Graph", (), {"replay": staticmethod(lambda: output.copy_(run()))})
        return graphs._CapturedPass(graph, inputs, output, adapters)

    monkeypatch.setattr(graphs.CudaGraphRunner, "_capture", capture)
    monkeypatch.setattr(graphs, "MIN_REACH", 32)
    return graphs.CudaGraphRunner


@torch.inference_mode()
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.2, "seed": 3}])
def test_a_conversation_gets_the_same_answers(new_runner, sampling, backbone, adapters):
    """Under two adapters in turn and none; every turn after the first reuses the one before."""
    bank = AdapterBank.pack(adapters[:2], "cpu", torch.float32)
    cache = PrefixCache(1 << 20)
    rng = torch.Generator().manual_seed(0)
    first = torch.randint(5, 60, (20,), generator=rng).tolist()
    histories = {slot: [2, *first] for slot in (0, 1, -1)}
    reusing, plain = (
        new_runner(backbone.decoder, 3, 150, (), prefix_cache=c) for c in (cache, None)
    )
    for turn in range(4):
        for slot, ids in histories.items():
            given = bank if slot >= 0 else None
            answers = [
                talk(backbone, runner, ids, given, slot, slot, **sampling)
                for runner in (plain, reusing)
            ]
            assert answers[0].tokens == answers[1].tokens
            assert answers[0].reused == 0
            # All but the new message; of the answer before, the last token was never fed.
            assert answers[1].reused == (0 if turn == 0 else len(ids) - 7)
            new = torch.randint(5, 60, (6,), generator=rng).tolist()
            histories[slot] = [*ids, *answers[0].tokens, *new]
    assert len({tuple(ids) for ids in histories.values()}) == 3


@torch.inference_mode()
def test_a_batch_of_new_and_continued_prompts(new_runner, backbone, adapters):
    """Equal prompts, prompts that were computed in part and others, in one prefill."""
    bank = AdapterBank.pack(adapters[:2], "cpu", torch.float32)
    cache = PrefixCache(1 << 20)
    runner = new_runner(backbone.decoder, 8, 80, (), prefix_cache=cache)
    known = list(range(5, 35))
    talk(backbone, runner, known, bank, 0, "a")
    prompts = [[*known, 40, 41], [3, 4], [*known[:25], 50], known, [*known, 40, 41]]
    slots = [0, -1, 0, 1, 0]
    scopes = ["a", None, "a", "b", "a"]
    tensors = [backbone.decoder.embed(torch.tensor(p)) for p in prompts]
    tensors[4] = tensors[0]
    requests = [
        Request(SamplingParams(7), slot, cache_key=CacheKey(ids, scope))
        for ids, slot, scope in zip(prompts, slots, scopes, strict=True)
    ]
    runner.prefill(requests, tensors, bank)
    while runner.retire_finished():
        runner.decode(bank)
    alone = ModelRunner(backbone.decoder, 1, 80, ())
    for ids, slot, one in zip(prompts, slots, requests, strict=True):
        assert one.tokens == talk(backbone, alone, ids, bank, slot).tokens[:7]
    assert [one.reused for one in requests] == [30, 0, 25, 0, 30]
    assert all(segment.leases == 0 for segment in cache._order)


@torch.inference_mode()
def test_a_full_row_may_be_padded_past_its_end(backbone):
    """A short continuation beside a long one, both up to the last slot."""
    cache = PrefixCache(1 << 20)
    runner = ModelRunner(backbone.decoder, 2, 48, (), prefix_cache=cache)
    first, second = [2, *range(5, 40)], [2, *range(20, 40)]
    for ids in (first, second):
        talk(backbone, runner, ids)
    prompts = [[*first, 41, 42], [*second, *range(41, 58)]]
    requests = [Request(SamplingParams(10), cache_key=CacheKey(ids)) for ids in prompts]
    runner.prefill(requests, [backbone.decoder.embed(torch.tensor(p)) for p in prompts])
    while runner.retire_finished():
        runner.decode()
    alone = ModelRunner(backbone.decoder, 1, 60, ())
    for ids, one in zip(prompts, requests, strict=True):
        expected = Request(SamplingParams(10))
        alone.prefill([expected], [backbone.decoder.embed(torch.tensor(ids))])
        while alone.retire_finished():
            alone.decode()
        assert one.reused > 20 and one.tokens == expected.tokens


@torch.inference_mode()
def test_a_failed_request_leaves_nothing_behind(backbone, adapters):
    cache = PrefixCache(1 << 20)
    bad = {"down_proj": torch.full_like(adapters[0].B["down_proj"], float("nan"))}
    poisoned = Adapter(adapters[0].A, bad, adapters[0].scale, adapters[0].bias)
    bank = AdapterBank.pack([poisoned], "cpu", torch.float32)
    runner = ModelRunner(backbone.decoder, 2, 80, (), prefix_cache=cache)
    assert talk(backbone, runner, list(range(5, 35)), bank, 0).error is not None
    assert len(cache) == 0


def test_answers_with_a_prefix_cache(model, adapters):
    cache = PrefixCache(1 << 20)
    messages = [{"role": "user", "content": "what happens after the small square moves left?"}]
    for adapter in (adapters[0], adapters[1], None):
        own = list(messages)
        for _ in range(3):
            (expected,) = model.answer(own, adapter, max_new_tokens=8)
            (answer,) = model.answer(own, adapter, max_new_tokens=8, prefix_cache=cache)
            assert answer.text == expected.text
            own += [{"role": "assistant", "content": answer.text}, messages[0]]
    assert cache.bytes > 0


def test_equal_adapters_have_one_content(model, adapters):
    first = adapters[0]
    copy = Adapter(
        {m: t.clone() for m, t in first.A.items()}, dict(first.B), first.scale, first.bias
    )
    assert copy.content_hash == first.content_hash
    other = Adapter(first.A, first.B, first.scale * 2, first.bias)
    bare = Adapter(first.A, first.B, first.scale)
    contents = {a.content_hash for a in (*adapters, other, bare)}
    assert len(contents) == len(adapters) + 2
