"""Packed turns, greedy decoding and adapters equal one row computed alone."""

import torch

from v2l_fast.adapter import AdapterBatch, BiasAdapter
from v2l_fast.shapes.adapt import adapted
from v2l_fast.shapes.decode import answer_batch
from v2l_fast.shapes.scene import sample_scenes
from v2l_fast.shapes.train_language import answer_logits, cache_visual_tokens
from v2l_fast.shapes.turns import pack_turns

QUESTIONS = ["What happens?", "What color is the ring?", "Describe the video.", "Yes?"]


def alone(model, prompts, question, visual, steps):
    """Greedy decoding of one row, everything computed anew at every step."""
    prefix = prompts.text_prefix if visual is None else prompts.video_prefix
    ids = prefix + prompts.question(question)
    start = len(ids)
    for _ in range(steps):
        row = torch.tensor([ids])
        embeds = model.get_input_embeddings()(row)
        if visual is not None:
            image = row == model.config.image_token_id
            embeds = embeds.masked_scatter(image[..., None], visual.flatten(0, 1))
        hidden = model.model.text_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        ids = [*ids, model.lm_head(hidden[0, -1]).argmax().item()]
        if ids[-1] == prompts.tokenizer.eos_token_id:
            break
    return prompts.tokenizer.decode(ids[start:], skip_special_tokens=True)


def some_adapters(model, count):
    generator = torch.Generator().manual_seed(2)
    text = model.config.text_config
    shape = (count, text.num_hidden_layers, 3)

    def normal(*size):
        return torch.randn(*size, generator=generator) * 0.1

    return AdapterBatch(
        {"down_proj": normal(*shape, text.intermediate_size)},
        {"down_proj": normal(*shape, text.hidden_size)},
        2.0,
        BiasAdapter(
            {"down_proj": normal(*shape[1:], text.intermediate_size)},
            {"down_proj": normal(*shape[1:], text.hidden_size)},
        ),
    )


def test_packed_turns_equal_single_turns(base, prompts):
    scenes = sample_scenes("train", 2, 0)
    visual = cache_visual_tokens(base, scenes, None)
    prefixes = [prompts.video_prefix, prompts.text_prefix]
    turns = [
        [(prompts.question(q), prompts.answer(a)) for q, a in row]
        for row in (
            [("What happens?", "a small red bar moves up"), ("What color is the bar?", "red")],
            [("How many objects are there?", "two"), ("What happens?", "yes"), ("Yes?", "no")],
        )
    ]
    pad = prompts.tokenizer.pad_token_id
    packed = pack_turns(prefixes, turns, pad)
    together = answer_logits(base, packed, visual[0].flatten(0, 1))
    parts = []
    for prefix, row in zip(prefixes, turns, strict=True):
        for turn in row:
            shown = visual[0] if prefix is prompts.video_prefix else visual[0, :0]
            single = pack_turns([prefix], [[turn]], pad)
            parts.append(answer_logits(base, single, shown.flatten(0, 1)))
    assert torch.allclose(together, torch.cat(parts), atol=1e-4)
    assert packed.targets.tolist() == [i for row in turns for _, answer in row for i in answer]
    assert packed.turns.unique_consecutive().tolist() == [0, 1, 2, 3, 4]


def test_decoding_in_a_batch_equals_one_row(base, prompts):
    scenes = sample_scenes("train", len(QUESTIONS), 1)
    visual = cache_visual_tokens(base, scenes, None)
    assert answer_batch(base, prompts, QUESTIONS, visual, 6) == [
        alone(base, prompts, q, v, 6) for q, v in zip(QUESTIONS, visual, strict=True)
    ]
    assert answer_batch(base, prompts, QUESTIONS, None, 6) == [
        alone(base, prompts, q, None, 6) for q in QUESTIONS
    ]


def test_adapters_in_a_batch_equal_changed_weights(base, prompts):
    batch = some_adapters(base, 2)
    index = torch.tensor([1, -1, 0, 1])
    plain = answer_batch(base, prompts, QUESTIONS, None, 6)
    with adapted(base, batch, index):
        found = answer_batch(base, prompts, QUESTIONS, None, 6)
    assert answer_batch(base, prompts, QUESTIONS, None, 6) == plain
    layers = base.model.text_model.layers
    kept = [layer.mlp.down_proj.weight.clone() for layer in layers]
    for question, i, answer in zip(QUESTIONS, index.tolist(), found, strict=True):
        for number, layer in enumerate(layers):
            update = torch.zeros_like(kept[number])
            if i >= 0:
                a, b = batch[i].merged()
                update = batch.scale * b["down_proj"][number].T @ a["down_proj"][number]
            layer.mlp.down_proj.weight.copy_(kept[number] + update)
        assert alone(base, prompts, question, None, 6) == answer
    assert found[0] != plain[0] and found[1] == plain[1]
