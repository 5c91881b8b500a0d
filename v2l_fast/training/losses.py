"""Losses of answer tokens, and the teacher of the optional KL divergence.

Values are flat, one per answer token in the order of `batches.ResponseRows`, because logits are
computed at those positions only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from v2l_fast.data.samples import Sample
from v2l_fast.errors import ConfigError
from v2l_fast.pipeline import length_buckets
from v2l_fast.training.batches import pack_pairs
from v2l_fast.vlm import Backbone


def example_means(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """Mean of `values` [N] over the tokens of each of `count` examples: [count].

    owner: int64 [N], the example of each token. An example without tokens gives 0.
    """
    zeros = torch.zeros(count, dtype=values.dtype, device=values.device)
    tokens = zeros.index_add(0, owner, torch.ones_like(values))
    return zeros.index_add(0, owner, values) / tokens.clamp_min(1)


def token_kl(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T² KL(teacher || student) of the distributions at temperature T: [N, V] twice -> [N]."""
    student = F.log_softmax(logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    divergence = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    return temperature**2 * divergence


@torch.no_grad()
def teacher_states(
    backbone: Backbone,
    samples: Sequence[Sample],
    features: Sequence[Tensor],
    max_padding: float,
    max_tokens: int,
) -> Tensor:
    """Normed hidden states [N, D] before every answer token, with the video in context.

    Args:
        features: visual features of the samples, each of which has one chunk.
        max_padding, max_tokens: bounds of the rows computed together.

    Raises:
        ConfigError: a sample has several chunks, or no `teacher_prefix`.
    """
    prefixes = []
    for sample in samples:
        if len(sample.chunks) > 1 or sample.teacher_prefix is None:
            raise ConfigError(
                f"{sample.video}: no teacher for its KL divergence, which needs a video in one "
                f"chunk (it has {len(sample.chunks)}) with a teacher_prefix; set kl_weight to 0"
            )
        prefixes.append(sample.teacher_prefix)
    decoder = backbone.decoder
    lengths = [
        len(prefix) + sum(len(question) + len(answer) for question, answer in sample.qa_pairs)
        for prefix, sample in zip(prefixes, samples, strict=True)
    ]
    states: dict[int, Tensor] = {}
    for members in length_buckets(lengths, max_padding, max_tokens):
        pairs = [samples[i].qa_pairs for i in members]
        packed = pack_pairs([prefixes[i] for i in members], pairs, backbone.tokenizer.pad_token_id)
        embeddings = backbone.embed(packed.ids, [features[i] for i in members])
        packed = packed.to(decoder.device)
        hidden = decoder.forward(
            embeddings, decoder.attention_metadata(packed.positions, packed.mask)
        )
        sizes = [sum(len(answer) for _, answer in row) for row in pairs]
        states |= zip(members, hidden[packed.rows, packed.columns].split(sizes), strict=True)
    return torch.cat([states[i] for i in range(len(samples))])
