"""Answering has no side effects: a question gets the same answer whatever preceded it."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from v2l_fast.hypernet.adapter import Adapter

QUESTIONS = ["what happens?", "which color is it?"]
SHORT = {"max_new_tokens": 10}


def digest(model) -> str:
    """Hash of every parameter and buffer of base and hypernetwork."""
    state = hashlib.sha256()
    for module in (model.backbone.model, model.hypernet):
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            state.update(name.encode())
            state.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


@torch.no_grad()
def plain_logits(model) -> torch.Tensor:
    """Logits of transformers' forward and of ours, without an adapter."""
    ids = torch.arange(3, 23)[None]
    decoder = model.backbone.decoder
    return torch.stack(
        [
            model.backbone.model(input_ids=ids, use_cache=False).logits,
            decoder.logits(decoder.forward(decoder.embed(ids))),
        ]
    )


@pytest.fixture
def choices(adapters) -> list[Adapter | None]:
    return [None, adapters[0], adapters[1], Adapter.compose(adapters[:2]), adapters[2].prune(1)]


@pytest.fixture
def alone(model, choices) -> list[list[str]]:
    """Answers to each question with each choice of adapter, one at a time."""
    return [[model.ask(q, c, **SHORT) for q in QUESTIONS] for c in choices]


def test_answers_differ_by_adapter(alone):
    assert len({tuple(answers) for answers in alone}) == len(alone)


def test_weights_and_plain_logits_are_untouched(model, clips, choices):
    before, logits = digest(model), plain_logits(model)
    model.ask(QUESTIONS, choices[1], **SHORT)
    assert torch.equal(plain_logits(model), logits)
    model.ask([QUESTIONS[0]] * 5, choices, **SHORT)
    assert torch.equal(plain_logits(model), logits)
    model.internalize(clips[0])
    model.ask_direct(QUESTIONS[0], clips[0], **SHORT)
    model.effect(choices[1], QUESTIONS[0])
    assert torch.equal(plain_logits(model), logits)
    assert digest(model) == before


def test_one_after_the_other(model, choices, alone):
    for order in ([1, 0, 2, 0, 1], [4, 3, 2, 1, 0], [0, 0, 1, 1, 0]):
        for choice in order:
            assert model.ask(QUESTIONS, choices[choice], **SHORT) == alone[choice]


def test_different_adapters_in_one_batch(model, choices, alone):
    for order in ([1, 2], [1, 0, 2], [0, 1, 2, 3, 4], [4, 1, 1, 0, 3, 2]):
        for place, question in enumerate(QUESTIONS):
            actual = model.ask([question] * len(order), [choices[c] for c in order], **SHORT)
            assert actual == [alone[c][place] for c in order]


def test_two_threads(model, clips, choices, alone):
    logits, adapter = plain_logits(model), model.internalize(clips[0])

    def work(choice: int) -> object:
        if choice == 5:
            return model.internalize(clips[0])
        return model.ask(QUESTIONS, choices[choice], **SHORT)

    order = [0, 1, 2, 5, 3, 0, 4, 1, 5, 0, 2] * 4
    with ThreadPoolExecutor(2) as pool:
        for choice, actual in zip(order, pool.map(work, order), strict=True):
            if choice == 5:
                assert torch.equal(actual.A["down_proj"], adapter.A["down_proj"])
                assert torch.equal(actual.B["down_proj"], adapter.B["down_proj"])
            else:
                assert actual == alone[choice]
    assert torch.equal(plain_logits(model), logits)


def test_a_failed_question_has_no_side_effects(model, choices, alone, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(model.backbone.decoder, "logits", fail)
        model.ask(QUESTIONS, choices[1], **SHORT)
    assert model.ask(QUESTIONS, None, **SHORT) == alone[0]


def test_adapters_are_not_changed_by_their_use(model, adapters):
    before = [(a.A["down_proj"].clone(), a.B["down_proj"].clone()) for a in adapters]
    bias = adapters[0].bias.A["down_proj"].detach().clone()
    model.ask(["what happens?"] * 3, adapters, **SHORT)
    for (a, b), adapter in zip(before, adapters, strict=True):
        assert torch.equal(adapter.A["down_proj"], a) and torch.equal(adapter.B["down_proj"], b)
    assert torch.equal(adapters[0].bias.A["down_proj"], bias)
