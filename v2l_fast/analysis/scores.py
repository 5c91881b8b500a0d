"""Teacher-forced scores of reference strings (paper Eqs. 10 and 11).

A candidate's tokens are those the model would generate for it, without the stop token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from v2l_fast.errors import ConfigError
from v2l_fast.hypernet.adapted_linear import AdapterBank
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.model import Video2LoRA

# Rows of one forward pass: every row may carry an adapter of its own.
_ROWS = 8


def candidate_ids(model: Video2LoRA, candidates: Sequence[str]) -> list[list[int]]:
    """Token ids z of each candidate string as an answer.

    Raises:
        ConfigError: a candidate has no tokens.
    """
    ids = [model.backbone.prompt_builder.answer(text, finished=False) for text in candidates]
    for text, found in zip(candidates, ids, strict=True):
        if not found:
            raise ConfigError(f"the reference {text!r} has no tokens: give one that says something")
    return ids


@torch.inference_mode()
def log_probabilities(
    model: Video2LoRA,
    prompt: str,
    candidates: Sequence[str],
    adapters: Sequence[Adapter | None],
) -> Tensor:
    """Length-normalized log-probability of every candidate under every adapter (Eq. 10).

    Returns:
        [len(adapters), len(candidates)] float64 on the CPU, nats a token.
    """
    decoder = model.backbone.decoder
    question = model.backbone.prompt_builder.question(prompt)
    answers = candidate_ids(model, candidates)
    pairs = [(adapter, answer) for adapter in adapters for answer in answers]
    found = []
    for start in range(0, len(pairs), _ROWS):
        part = pairs[start : start + _ROWS]
        rows = [torch.tensor(question + answer[:-1]) for _, answer in part]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(decoder.device)
        attached = [None if a is None else model.attach(a) for a, _ in part]
        slots = AdapterBank.pack(attached, decoder.device, decoder.dtype)
        hidden = decoder.forward(decoder.embed(ids), adapters=slots)
        for row, (_, answer) in enumerate(part):
            # Position of the token before each answer token.
            first = len(question) - 1
            logits = decoder.logits(hidden[row, first : first + len(answer)])
            chosen = torch.tensor(answer, device=logits.device)[:, None]
            found.append(logits.double().log_softmax(-1).gather(1, chosen).mean().cpu())
    return torch.stack(found).view(len(adapters), len(answers))


def diagnostic_scores(
    model: Video2LoRA,
    prompt: str,
    references: Sequence[str],
    adapters: Sequence[Adapter | None],
) -> Tensor:
    """S of each adapter: its best reference's log-probability (Eq. 11), [len(adapters)]."""
    return log_probabilities(model, prompt, references, adapters).amax(1)
