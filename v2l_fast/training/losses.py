"""Losses of answer tokens, and the teacher of the optional KL divergence.

Values are flat, one per answer token in the order of `batches.ResponseRows`, because logits are
computed at those positions only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from v2l_fast.data.samples import Sample
from v2l_fast.errors import ConfigError
from v2l_fast.padding import length_buckets
from v2l_fast.training.batches import pack_turns
from v2l_fast.transfer import send
from v2l_fast.vlm import Backbone


@dataclass(frozen=True)
class Teacher:
    """values: [N, ...] for N answer tokens; logits: slices of them to logits [n, vocabulary].

    Full logits of all tokens need not exist at once.
    """

    values: Tensor
    logits: Callable[[Tensor], Tensor]


def teacher_of(
    backbone: Backbone,
    samples: Sequence[Sample],
    features: Sequence[Tensor],
    max_padding: float,
    max_tokens: int,
) -> Teacher:
    """Stored logits where every sample has them, else the model with the video in context.

    features: visual features of every chunk of every sample. max_padding, max_tokens: of the rows
    computed together.

    Raises ConfigError for a sample whose video cannot be put into context.
    """
    if all(sample.teacher_logits is not None for sample in samples):
        device = backbone.decoder.device
        stored = torch.cat([rows for sample in samples for rows in sample.teacher_logits])
        return Teacher(stored, lambda rows: send(rows, device))
    states = _states_in_context(backbone, samples, features, max_padding, max_tokens)
    return Teacher(states, backbone.decoder.logits)


@torch.no_grad()
def _states_in_context(
    backbone: Backbone,
    samples: Sequence[Sample],
    features: Sequence[Tensor],
    max_padding: float,
    max_tokens: int,
) -> Tensor:
    """Normed hidden states [N, D] before every answer token, the video before the turns."""
    for sample in samples:
        if len(sample.chunks) > 1 or sample.teacher_prefix is None:
            raise ConfigError(
                f"{sample.video}: no teacher for its KL divergence: a video in one chunk needs a "
                f"teacher_prefix, one in several (it has {len(sample.chunks)}) teacher_logits; "
                "give them, or set kl_weight to 0"
            )
    prefixes = [sample.teacher_prefix for sample in samples]
    decoder = backbone.decoder
    lengths = [
        len(prefix) + sum(len(q) + len(a) for q, a in sample.turns)
        for prefix, sample in zip(prefixes, samples, strict=True)
    ]
    states: dict[int, Tensor] = {}
    for members in length_buckets(lengths, max_padding, max_tokens):
        turns = [samples[i].turns for i in members]
        packed = pack_turns([prefixes[i] for i in members], turns, backbone.tokenizer.pad_token_id)
        embeddings = backbone.embed(packed.ids, [features[i] for i in members])
        packed = packed.to(decoder.device)
        hidden = decoder.forward(
            embeddings, decoder.attention_metadata(packed.positions, packed.mask)
        )
        sizes = [sum(len(answer) for _, answer in row) for row in turns]
        found = hidden[packed.rows, packed.columns].split(sizes)
        states |= zip(members, found, strict=True)
    return torch.cat([states[i] for i in range(len(samples))])


def example_means(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """Mean of `values` [N] over the tokens of each of `count` examples: [count].

    owner: int64 [N], which example a token belongs to. An example without tokens is 0.
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
