"""From pixels to answers, loss and gradients against the released code on one tiny SmolVLM."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import SmolVLMForConditionalGeneration

from tests.golden import FOLDER, load, network, relative
from v2l_fast.generation import SamplingParams, generate
from v2l_fast.hypernet.adapter import Adapter, AdapterBatch
from v2l_fast.hypernet.adapter_bank import AdapterBank, LayerAdapters
from v2l_fast.training.step import example_means, token_kl
from v2l_fast.vlm.smolvlm import SmolVLM

M = "down_proj"
EOS = 2


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load("e2e/e2e")


@pytest.fixture(scope="module")
def vlm() -> SmolVLM:
    model = SmolVLMForConditionalGeneration.from_pretrained(
        FOLDER / "e2e" / "base_model", dtype=torch.float32
    )
    return SmolVLM(model, SimpleNamespace(eos_token_id=EOS), "e2e")


@pytest.fixture(scope="module")
def net():
    return network("a").eval()


@pytest.fixture(scope="module")
def batch(net, golden):
    with torch.no_grad():
        return net(golden["ctx_right.ctx_features"], golden["ctx_right.attention_mask"])


def adapter(golden, net, index: int) -> Adapter:
    factors = ({M: golden[f"generate.single{index}.{side}.{M}"][0]} for side in "AB")
    return Adapter(*factors, net.config.scale, net.bias_adapter())


def frames(golden, video: int) -> torch.Tensor:
    """The video's real frames; the released code pads to the longest video with zeros."""
    pixels = golden["ctx.pixel_values"][video]
    return pixels[pixels.flatten(1).any(1)]


def test_vision(vlm, golden):
    with torch.no_grad():
        actual = torch.cat([vlm.encode_pixels(frames(golden, video)) for video in (0, 1)])
    assert relative(actual, golden["ctx.image_hidden_states"]) <= 1e-6


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("video", [0, 1])
@torch.no_grad()
def test_context_features_and_adapter(video, padding, vlm, net, golden):
    """Padding of the released batch is nothing to us: a video alone gives the same."""
    case = f"ctx_{padding}"
    real = golden[f"{case}.attention_mask"][video] == 1
    ids = golden[f"{case}.input_ids"][video][real]
    assert (ids == vlm.image_token_id).sum() == [12, 8][video]
    embeddings = vlm.embed(ids, [vlm.encode_pixels(frames(golden, video))])
    features = torch.stack(list(vlm.decoder.layer_inputs(embeddings[None])), 1)
    assert relative(features[0], golden[f"{case}.ctx_features"][video][:, real]) <= 1e-5
    actual = net(features)
    assert relative(actual.A[M][0], golden[f"{case}.A.{M}"][video]) <= 1e-5
    assert relative(actual.B[M][0], golden[f"{case}.B.{M}"][video]) <= 1e-5


def logits(
    vlm: SmolVLM, ids: torch.Tensor, slots: AdapterBank | list[LayerAdapters] | None
) -> torch.Tensor:
    """slots: for all layers, as when answering, or one for each, as in training."""
    decoder = vlm.decoder
    hidden, span = decoder.embed(ids), decoder.prefill_metadata(*ids.shape)
    for index in range(decoder.num_layers):
        chosen = slots[index] if isinstance(slots, list) else slots
        hidden = decoder.layer(index, hidden, span, None, chosen)
    return decoder.logits(decoder.text_model.norm(hidden))


def composed(batch: AdapterBatch, n_chunks: list[int]) -> list[LayerAdapters]:
    """Each layer's adapters, as in training."""
    sides = batch.A[M].unbind(1), batch.B[M].unbind(1)
    per_layer = [({M: a}, {M: b}) for a, b in zip(*sides, strict=True)]
    return LayerAdapters.compose([per_layer], range(2), n_chunks, batch.scale, batch.bias)


@torch.no_grad()
def test_logits(vlm, batch, golden):
    ids, real = golden["text.input_ids"], golden["text.attention_mask"] == 1
    plain = logits(vlm, ids, None)
    assert relative(plain[real], golden["text.logits_base"][real]) <= 1e-5
    by_adapter = AdapterBank.pack(list(batch), "cpu", torch.float32)
    by_batch = composed(batch, [1, 1])
    for slots in (by_adapter, by_batch):
        actual = logits(vlm, ids, slots)
        assert relative(actual[real], golden["train.logits"][real]) <= 1e-5


@torch.no_grad()
def test_several_questions_to_a_video(vlm, batch, golden):
    owner = torch.arange(2).repeat_interleave(golden["multiq.n_queries"])
    real = golden["multiq.attention_mask"] == 1
    videos = list(batch)
    for slots in (
        [replace(one, index=owner) for one in composed(batch, [1, 1])],
        AdapterBank.pack([videos[i] for i in owner], "cpu", torch.float32),
    ):
        actual = logits(vlm, golden["multiq.input_ids"], slots)
        assert relative(actual[real], golden["multiq.logits"][real]) <= 1e-5


@torch.no_grad()
def test_two_chunks_of_one_video(vlm, batch, golden):
    real = golden["text.attention_mask"][0] == 1
    ids = golden["text.input_ids"][:1]
    for slots in (
        AdapterBank.pack([Adapter.compose(list(batch))], "cpu", torch.float32),
        composed(batch, [2]),
    ):
        actual = logits(vlm, ids, slots)
        assert relative(actual[0, real], golden["chunks2.logits"][0, real]) <= 1e-5


@pytest.mark.parametrize("index", [0, 1])
def test_generation(index, vlm, net, golden):
    prompt = golden[f"generate.single{index}.prompt_ids"][0]
    slots = AdapterBank.pack([adapter(golden, net, index)], "cpu", torch.float32)
    actual = generate(
        vlm.decoder, [vlm.decoder.embed(prompt)], (EOS,), SamplingParams(max_new_tokens=10), slots
    )
    expected = golden[f"generate.single{index}.sequences"][0, len(prompt) :].tolist()
    assert actual.tokens == [expected]


def test_generation_in_one_batch(vlm, net, golden):
    """The released code pads prompts on the left, we on the right: the answers are the same."""
    prompts = [golden[f"generate.single{i}.prompt_ids"][0] for i in (0, 1)]
    adapters = [adapter(golden, net, i) for i in (0, 1)]
    actual = generate(
        vlm.decoder,
        [vlm.decoder.embed(prompt) for prompt in prompts],
        (EOS,),
        SamplingParams(max_new_tokens=10),
        AdapterBank.pack(adapters, "cpu", torch.float32),
    )
    assert actual.tokens == golden["generate.batch.sequences"][:, -10:].tolist()


def answers(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows of logits that predict an answer token, those tokens and their example."""
    owner, position = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    return logits[owner, position], labels[owner, position + 1], owner


def test_loss_and_gradients(vlm, golden):
    net = network("a")
    batch = net(golden["ctx_right.ctx_features"], golden["ctx_right.attention_mask"])
    slots = composed(batch, [1, 1])
    student = logits(vlm, golden["text.input_ids"], slots)
    rows, targets, owner = answers(student, golden["text.labels"])
    teacher, teacher_targets, _ = answers(golden["teacher.logits"], golden["teacher.labels"])
    assert torch.equal(targets, teacher_targets)
    entropy = torch.nn.functional.cross_entropy(rows, targets, reduction="none")
    entropy = example_means(entropy, owner, 2)
    divergence = example_means(token_kl(rows, teacher, temperature=1.5), owner, 2)
    assert relative(entropy, golden["train.ce_per_sample"]) <= 1e-5
    assert relative(divergence, golden["train.kl_per_sample_T1.5"]) <= 1e-5
    assert relative(entropy.mean(), golden["train.ce"][0]) <= 1e-5
    (entropy.mean() + 0.05 * divergence.mean()).backward()
    expected = load("e2e/train_grads")
    grads = {name: p.grad for name, p in net.named_parameters()}
    assert len(expected) > 20
    for key, value in expected.items():
        assert relative(grads[key.removeprefix("grad.")], value) <= 1e-5, key
    assert all(p.grad is None for p in vlm.model.parameters())
