"""Greedy answers in batches: the decoder on prompt embeddings, with a key-value cache.

Responsible for padding and stopping. Prompts are padded on the left, so that the last position is
the last prompt token of every row; positions count real tokens only. An adapter, if there is one,
is already attached to the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, SmolVLMForConditionalGeneration

from v2l_fast.shapes.prompts import Prompts


@torch.no_grad()
def answer_batch(
    model: SmolVLMForConditionalGeneration,
    prompts: Prompts,
    questions: Sequence[str],
    visual: Tensor | None = None,
    max_new_tokens: int = 40,
) -> list[str]:
    """One greedy answer a question.

    visual: visual tokens [B, F, T, D] of each question's own video; None asks without a video.
    """
    prefix = prompts.text_prefix if visual is None else prompts.video_prefix
    rows = [prefix + prompts.question(text) for text in questions]
    width = max(map(len, rows))
    pad = prompts.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    embed = model.get_input_embeddings()
    embeds = embed(ids)
    if visual is not None:
        image = ids == model.config.image_token_id
        embeds = embeds.masked_scatter(image[..., None], visual.to(embeds.dtype).flatten(0, 2))
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = DynamicCache(config=model.config.text_config)
    stop = prompts.tokenizer.eos_token_id
    done = torch.zeros(len(rows), dtype=torch.bool)
    written = []
    for _ in range(max_new_tokens):
        hidden = model.model.text_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        token = model.lm_head(hidden[:, -1]).argmax(-1).masked_fill(done, pad)
        written.append(token)
        done |= token == stop
        if done.all():
            break
        embeds = embed(token)[:, None]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        positions = positions[:, -1:] + 1
    return prompts.tokenizer.batch_decode(torch.stack(written, dim=1), skip_special_tokens=True)
