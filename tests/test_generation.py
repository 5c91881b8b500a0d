"""Generation equals that of transformers on the tiny model with merged adapters."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from tests.rounding import RoundingCheck
from v2l_fast.errors import AdapterError
from v2l_fast.generation import ModelRunner, Request, SamplingParams, generate
from v2l_fast.hypernet.adapter_bank import AdapterBank
from v2l_fast.vlm.decoder import Decoder

M = "down_proj"
PROMPTS = [[2, 20, 30, 40, 12], [2, 21], [2, 33, 17, 17, 50, 51, 52, 53, 54], [2]]


def slots(adapters) -> AdapterBank | None:
    return AdapterBank.pack(adapters, "cpu", torch.float32)


def run(backbone, prompts, adapters=None, stop=(), **sampling) -> list[list[int]]:
    """Generated ids of token-id prompts."""
    embedded = [backbone.decoder.embed(torch.tensor(p)) for p in prompts]
    packed = None if adapters is None else slots(adapters)
    return generate(backbone.decoder, embedded, stop, SamplingParams(**sampling), packed).tokens


def transformers_greedy(backbone, prompt, adapter, new_tokens) -> list[int]:
    model = copy.deepcopy(backbone.model)
    if adapter is not None:
        a, b = (side[M] for side in adapter.merged())
        with torch.no_grad():
            for index, layer in enumerate(model.model.text_model.layers):
                layer.mlp.down_proj.weight += adapter.scale * b[index].mT @ a[index]
    ids = torch.tensor([prompt])
    actual = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
    )
    return actual[0, len(prompt) :].tolist()


@pytest.mark.parametrize("prompt", PROMPTS[:3])
@pytest.mark.parametrize("which", [None, 0, 2])
def test_greedy_equals_transformers(prompt, which, backbone, adapters):
    adapter = None if which is None else adapters[which]
    expected = transformers_greedy(backbone, prompt, adapter, 12)
    # transformers bans the end token until min_new_tokens, we stop nowhere without stop ids.
    actual = run(backbone, [prompt], [adapter], max_new_tokens=12)[0]
    same = actual.index(3) if 3 in actual else len(actual)
    assert actual[:same] == expected[:same] and same > 4


def test_ragged_batch_equals_single_prompts(backbone, adapters):
    chosen = [adapters[0], None, adapters[1], adapters[0]]
    together = run(backbone, PROMPTS, chosen, max_new_tokens=16)
    for prompt, adapter, actual in zip(PROMPTS, chosen, together, strict=True):
        assert run(backbone, [prompt], [adapter], max_new_tokens=16) == [actual]
    assert len({tuple(t) for t in together}) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_batching_changes_half_precision_by_rounding_alone(dtype, backbone, adapters):
    """The promise of docs/serving.md. The check refuses answers from another adapter."""
    check = RoundingCheck(backbone, dtype)
    decoder = check.backbone.decoder
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(20, len(backbone.tokenizer), (24, 30), generator=generator)
    prompts = [[2, *words[i, : 1 + 5 * i % 29].tolist()] for i in range(24)]
    chosen = [[*adapters, None][i % 4] for i in range(24)]

    def answers(prompts, adapters) -> list[list[int]]:
        embedded = [decoder.embed(torch.tensor(prompt)) for prompt in prompts]
        bank = AdapterBank.pack(adapters, "cpu", dtype)
        return generate(decoder, embedded, (), SamplingParams(max_new_tokens=12), bank).tokens

    together = answers(prompts, chosen)
    assert answers(prompts, chosen) == together
    refused = 0
    for prompt, adapter, answer in zip(prompts, chosen, together, strict=True):
        check.same(prompt, adapter, answers([prompt], [adapter])[0], answer)
        other = adapters[1] if adapter is adapters[0] else adapters[0]
        try:
            check.same(prompt, adapter, answers([prompt], [other])[0], answer)
        except AssertionError:
            refused += 1
    assert refused > 0


def test_stop_ids_end_an_answer(backbone):
    free = run(backbone, PROMPTS, max_new_tokens=16)
    stop = free[0][5]
    stopped = run(backbone, PROMPTS, stop=(stop,), max_new_tokens=16)
    for actual, whole in zip(stopped, free, strict=True):
        assert actual == (whole[: whole.index(stop)] if stop in whole else whole)
    assert len(stopped[0]) <= 5


def test_all_requests_stop_in_one_step(backbone):
    first = run(backbone, [PROMPTS[0]], max_new_tokens=1)[0][0]
    assert run(backbone, [PROMPTS[0]] * 2, stop=(first,), max_new_tokens=50) == [[], []]


@pytest.mark.parametrize("new_tokens", [1, 2, 7])
def test_length_limit(new_tokens, backbone):
    actual = run(backbone, PROMPTS, max_new_tokens=new_tokens)
    assert [len(t) for t in actual] == [new_tokens] * 4


def test_time_to_first_token_is_positive(backbone):
    embedded = [backbone.decoder.embed(torch.tensor(PROMPTS[0]))]
    assert generate(backbone.decoder, embedded, (), SamplingParams()).time_to_first_token > 0


SAMPLED = {"max_new_tokens": 12, "temperature": 1.5, "seed": 5}


def test_sampling_is_reproducible(backbone):
    assert run(backbone, PROMPTS, **SAMPLED) == run(backbone, PROMPTS, **SAMPLED)
    assert run(backbone, PROMPTS, **SAMPLED) != run(backbone, PROMPTS, **{**SAMPLED, "seed": 6})
    same_prompt = run(backbone, [PROMPTS[0]] * 4, **SAMPLED)
    assert len({tuple(t) for t in same_prompt}) > 1


def test_sampling_does_not_depend_on_the_batch(backbone, adapters):
    chosen = [adapters[0], None, adapters[1], None]
    together = run(backbone, PROMPTS, chosen, **SAMPLED)
    for i, (prompt, adapter) in enumerate(zip(PROMPTS, chosen, strict=True)):
        alone = run(backbone, [prompt], [adapter], **{**SAMPLED, "seed": 5 + i})
        assert alone == [together[i]]


def test_sampling_leaves_the_global_generator_alone(backbone):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    run(backbone, PROMPTS, **SAMPLED)
    assert torch.equal(torch.get_rng_state(), state)


def test_top_k_and_top_p_exclude_unlikely_tokens(backbone):
    decoder = backbone.decoder
    prompt = decoder.embed(torch.tensor(PROMPTS[0]))
    with torch.no_grad():
        probs = decoder.logits(decoder.forward(prompt[None]))[0, -1].softmax(-1)
    ordered, order = probs.sort(descending=True)
    nucleus = int((ordered.cumsum(0) < 0.5).sum()) + 1
    for limit, allowed in (({"top_k": 3}, 3), ({"top_p": 0.5}, nucleus)):
        sampled = {
            run(backbone, [PROMPTS[0]], max_new_tokens=1, temperature=1.0, seed=s, **limit)[0][0]
            for s in range(60)
        }
        assert sampled <= set(order[:allowed].tolist()) and len(sampled) > 1


def test_frequencies_follow_the_distribution(backbone):
    decoder = backbone.decoder
    prompt = decoder.embed(torch.tensor(PROMPTS[1]))
    with torch.no_grad():
        probs = (decoder.logits(decoder.forward(prompt[None]))[0, -1] / 0.7).softmax(-1)
    count = 600
    sampled = run(backbone, [PROMPTS[1]] * count, max_new_tokens=1, temperature=0.7)
    frequency = torch.bincount(torch.tensor(sampled).flatten(), minlength=len(probs)) / count
    # Five standard deviations of a binomial frequency.
    spread = 5 * (probs * (1 - probs) / count).sqrt() + 1e-3
    assert ((frequency - probs).abs() <= spread).all()


# --- a failure belongs to the request that causes it ----------------------------------------------


def running(backbone, adapters=None, count=5, **sampling) -> tuple[ModelRunner, list[Request]]:
    """A runner whose request i starts with token 20 + i and has the adapter in slot i, if any."""
    runner = ModelRunner(backbone.decoder, count, 40, ())
    requests = [Request(SamplingParams(max_new_tokens=9, **sampling), -1 if adapters is None else i)
            for i in range(count)]  # fmt: skip
    prompts = [backbone.decoder.embed(torch.tensor([2, 20 + i, 30])) for i in range(count)]
    runner.prefill(requests, prompts, adapters)
    return runner, requests


def finish(runner, adapters=None) -> None:
    while runner.retire_finished():
        runner.decode(adapters)


@pytest.fixture
def bad_token(monkeypatch) -> list[int]:
    """Tokens whose embedding raises in any pass that contains them."""
    bad, embed = [], Decoder.embed

    def checked(self, ids):
        if any(token in bad for token in ids.flatten().tolist()):
            raise RuntimeError("this token breaks the pass")
        return embed(self, ids)

    monkeypatch.setattr(Decoder, "embed", checked)
    return bad


@torch.inference_mode()
@pytest.mark.parametrize("guilty", range(5))
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.3, "top_p": 0.9}])
def test_a_failing_decode_ends_one_request(guilty, sampling, backbone, bad_token):
    runner, expected = running(backbone, **sampling)
    finish(runner)
    runner, requests = running(backbone, **sampling)
    runner.decode()
    # A token that other requests have chosen too makes them fail as well.
    token = requests[guilty].tokens[-1]
    also = [i for i, request in enumerate(requests) if request.tokens[-1] == token]
    bad_token.append(token)
    runner.decode()
    bad_token.clear()
    finish(runner)
    for i, (request, whole) in enumerate(zip(requests, expected, strict=True)):
        if i in also:
            assert request.finish_reason == "error" and "breaks the pass" in str(request.error)
            assert request.tokens == whole.tokens[:2]
        else:
            assert (request.finish_reason, request.tokens) == (whole.finish_reason, whole.tokens)


@torch.inference_mode()
def test_a_failing_prefill_ends_one_request(backbone, monkeypatch):
    runner, expected = running(backbone)
    finish(runner)
    prefill = ModelRunner.run_prefill

    def fails(self, embeddings, rows, last, adapters):
        if 3 in rows:
            raise RuntimeError("request 3")
        return prefill(self, embeddings, rows, last, adapters)

    monkeypatch.setattr(ModelRunner, "run_prefill", fails)
    runner, requests = running(backbone)
    finish(runner)
    assert [request.finish_reason for request in requests] == ["length"] * 3 + ["error", "length"]
    kept = [0, 1, 2, 4]
    assert [requests[i].tokens for i in kept] == [expected[i].tokens for i in kept]


@torch.inference_mode()
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38, -1e30])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.3, "top_k": 5}])
def test_a_nan_adapter_ends_only_its_request(value, sampling, backbone, adapters):
    """Requests that use its cache row afterwards are not affected either."""
    own = [adapters[0], adapters[1], adapters[2], adapters[0], adapters[1]]
    good = slots([*own[:3], adapters[0].to(), adapters[1].to()])
    runner, expected = running(backbone, good, **sampling)
    finish(runner, good)
    bad = replace(good, B={M: good.B[M].clone()})
    bad.B[M][:, 1] = value
    runner = ModelRunner(backbone.decoder, 5, 40, ())
    for _ in range(2):
        requests = [Request(SamplingParams(max_new_tokens=9, **sampling), i) for i in range(5)]
        prompts = [backbone.decoder.embed(torch.tensor([2, 20 + i, 30])) for i in range(5)]
        runner.prefill(requests, prompts, bad)
        finish(runner, bad)
        for i in (0, 2, 3, 4):
            assert requests[i].tokens == expected[i].tokens
        request = requests[1]
        if value != -1e30:
            assert request.finish_reason == "error" and isinstance(request.error, AdapterError)
            assert "NaN or infinite" in str(request.error) and request.tokens == []
        assert runner.cache.keys.isfinite().all() and runner.cache.values.isfinite().all()
    one = Request(SamplingParams(max_new_tokens=9, **sampling), 1)
    runner.prefill([one], [prompts[1]], good)
    finish(runner, good)
    assert one.tokens == expected[1].tokens


def test_an_error_names_the_example(backbone, adapters):
    bad = replace(adapters[1], B={M: torch.full_like(adapters[1].B[M], 1e38)})
    with pytest.raises(AdapterError, match="example 1: the logits are NaN or infinite"):
        run(backbone, PROMPTS[:2], [adapters[0], bad], max_new_tokens=3)


# --- several answers, log probabilities, constraints ----------------------------------------------


def test_n_answers_come_from_one_prefill(backbone, adapters, prefill_rows):
    own = [adapters[0], None, adapters[1], None]
    chosen = slots(own)
    embedded = [backbone.decoder.embed(torch.tensor(p)) for p in PROMPTS]
    params = SamplingParams(**SAMPLED, n=3)
    together = generate(backbone.decoder, embedded, (), params, chosen).tokens
    assert prefill_rows == [4] and len(together) == 12
    alone = [
        run(backbone, [p], [a], **{**SAMPLED, "seed": 5 + 3 * i + j})[0]
        for i, (p, a) in enumerate(zip(PROMPTS, own, strict=True))
        for j in range(3)
    ]
    assert together == alone and len({tuple(t) for t in together[:3]}) > 1


@torch.inference_mode()
def test_a_shared_prompt_is_computed_per_adapter(backbone, adapters):
    """Equal prompts under different adapters, or none, share nothing."""
    bank = slots([adapters[0], adapters[1]])
    prompt = backbone.decoder.embed(torch.tensor(PROMPTS[2]))
    runner = ModelRunner(backbone.decoder, 6, 40, ())
    requests = [Request(SamplingParams(9), slot) for slot in (0, 1, -1, 1, 0, -1)]
    runner.prefill(requests, [prompt] * 6, bank)
    finish(runner, bank)
    expected = [
        run(backbone, [PROMPTS[2]], [a], max_new_tokens=9)[0] for a in (*adapters[:2], None)
    ]
    assert [one.tokens for one in requests] == [expected[i] for i in (0, 1, 2, 1, 0, 2)]


def test_logprobs_are_those_of_the_logits(backbone, adapters):
    adapter = adapters[0]
    embedded = [backbone.decoder.embed(torch.tensor(PROMPTS[0]))]
    bank = slots([adapter])
    params = SamplingParams(**SAMPLED, top_k=3, logprobs=4)
    output = generate(backbone.decoder, embedded, (), params, bank)
    ids = torch.tensor([[*PROMPTS[0], *output.tokens[0]]])
    with torch.inference_mode():
        hidden = backbone.decoder.forward(backbone.decoder.embed(ids), adapters=bank)
        expected = backbone.decoder.logits(hidden)[0, len(PROMPTS[0]) - 1 :].log_softmax(-1)
    assert [one.token for one in output.logprobs[0]] == output.tokens[0]
    for row, one in zip(expected, output.logprobs[0], strict=False):
        values, order = row.topk(4)
        assert [token for token, _ in one.top] == order.tolist()
        assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=1e-5)
        assert one.logprob == pytest.approx(row[one.token].item(), abs=1e-5)


@torch.inference_mode()
def test_logprobs_are_computed_for_those_who_ask(backbone):
    runner = ModelRunner(backbone.decoder, 3, 40, ())
    requests = [Request(SamplingParams(4, logprobs=count)) for count in (None, 0, 1000)]
    runner.prefill(requests, [backbone.decoder.embed(torch.tensor(PROMPTS[0]))] * 3)
    finish(runner)
    nobody, chosen_only, everything = (request.logprobs for request in requests)
    assert nobody == [] and [one.top for one in chosen_only] == [()] * 4
    assert len(everything[0].top) == backbone.decoder.lm_head.weight.shape[0]
    assert requests[0].tokens == requests[1].tokens == requests[2].tokens


class Only:
    """Allows token i of an answer to be one of ``allowed[i]``; fails where that is None."""

    def __init__(self, *allowed) -> None:
        self.allowed, self.accepted = allowed, []

    def bitmask(self):
        ids = self.allowed[len(self.accepted)]
        if ids is None:
            raise RuntimeError("no mask")
        mask = torch.zeros(3, dtype=torch.int32)
        for token in ids:
            # Bit 31 is the sign.
            mask[token // 32] |= torch.tensor(1 << token % 32).to(torch.int32)
        return mask

    def accept(self, token) -> None:
        self.accepted.append(token)


@torch.inference_mode()
@pytest.mark.parametrize("sampling", [{}, {"temperature": 2.0, "top_p": 0.9, "top_k": 50}])
def test_a_constraint_limits_its_request_alone(sampling, backbone):
    runner, expected = running(backbone, **sampling)
    finish(runner)
    runner = ModelRunner(backbone.decoder, 5, 40, (7,))
    only = Only([31], [63, 64], [7, 5], [7])
    prompts = [backbone.decoder.embed(torch.tensor([2, 20 + i, 30])) for i in range(5)]
    requests = [Request(SamplingParams(max_new_tokens=9, **sampling)) for _ in range(5)]
    requests[1].constraint = only
    requests[3].constraint = Only([5], None)
    requests[4].constraint = Only([5], [])
    runner.prefill(requests, prompts)
    finish(runner)
    for i in (0, 2):
        whole = expected[i].tokens
        assert requests[i].tokens == (whole[: whole.index(7)] if 7 in whole else whole)
    assert requests[1].finish_reason == "stop" and requests[1].tokens == only.accepted
    assert [token in ids for token, ids in zip(requests[1].tokens, only.allowed, strict=False)] == [
        True
    ] * len(requests[1].tokens)
    assert "no mask" in str(requests[3].error) and requests[3].tokens == [5]
    assert "allows no further token" in str(requests[4].error) and requests[4].tokens == [5]
