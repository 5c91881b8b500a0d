"""Losses over answer tokens: mean per example, then mean over the batch.

Logits are flat, one row per answer token, as only those positions are computed; `owner` says which
example (one question with its answer) a token belongs to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def example_means(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """Mean of `values` [N] over the tokens of each of `count` examples: [count].

    owner: int64 [N]. An example without tokens is 0.
    """
    zeros = torch.zeros(count, dtype=values.dtype, device=values.device)
    tokens = zeros.index_add(0, owner, torch.ones_like(values))
    return zeros.index_add(0, owner, values) / tokens.clamp_min(1)


def answer_cross_entropy(logits: Tensor, targets: Tensor, owner: Tensor, count: int) -> Tensor:
    """Cross-entropy per example, [count]: logits [N, V], targets int64 [N]; computed in fp32."""
    return example_means(F.cross_entropy(logits.float(), targets, reduction="none"), owner, count)


def answer_kl(
    logits: Tensor, teacher_logits: Tensor, owner: Tensor, count: int, temperature: float = 1.0
) -> Tensor:
    """T² KL(teacher || student) of the distributions at temperature T, per example: [count]."""
    student = F.log_softmax(logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    divergence = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    return temperature**2 * example_means(divergence, owner, count)
