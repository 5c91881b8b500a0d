"""Losses of answer tokens and their means per example (one question with its answer).

Values are flat, one per answer token, as only those positions are computed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
