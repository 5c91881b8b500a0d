"""Prefill and decode of a batch of prompts, each with an adapter of its own or none.

Plain functions over :class:`~v2l_fast.backbones.decoder.Decoder` with a static cache. The file
knows nothing about tokenizers, videos or prompts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from v2l_fast.adapted import AdapterSlots
from v2l_fast.backbones.decoder import Decoder
from v2l_fast.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: limit of generated tokens, the stop token included.
        temperature: 0 is greedy.
        top_p: smallest set of tokens whose probability reaches it.
        top_k: the k most likely tokens; 0 for no limit.
        seed: example i draws from its own generator seeded ``seed + i``, so an answer does not
            depend on what it is batched with.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise ConfigError(f"top_k must be 0 (no limit) or more, not {self.top_k}")


@dataclass(frozen=True)
class Generated:
    """Generated token ids per example, without the stop token, and the time to first token (s)."""

    tokens: list[list[int]]
    time_to_first_token: float


@torch.inference_mode()
def generate(
    decoder: Decoder,
    prompts: Sequence[Tensor],
    stop_ids: Sequence[int],
    sampling: Sampling,
    adapters: AdapterSlots | None = None,
) -> Generated:
    """Answer E prompts.

    Args:
        prompts: E tensors [T_e, D], embedded; lengths may differ.
        stop_ids: token ids that end an answer.
        adapters: slots whose ``index`` has E entries, or None.

    Returns:
        :class:`Generated`. ``time_to_first_token`` is that of the whole batch, from embedded
        prompts to chosen tokens.
    """
    start = time.perf_counter()
    lengths = torch.tensor([len(p) for p in prompts], device=decoder.device)
    longest = int(lengths.max())
    embeddings = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
    cache = decoder.new_cache(len(prompts), longest + sampling.max_new_tokens)
    chooser = _Chooser(sampling, len(prompts))
    span = decoder.prefill_span(len(prompts), longest)
    hidden = decoder.forward(embeddings, span, cache, adapters)
    last = hidden[torch.arange(len(prompts), device=decoder.device), lengths - 1]
    chosen = chooser(decoder.logits(last))
    tokens: list[list[int]] = [[] for _ in prompts]
    running = _append(tokens, chosen, stop_ids, [True] * len(prompts))
    first = time.perf_counter() - start
    for step in range(sampling.max_new_tokens - 1):
        if not any(running):
            break
        span = decoder.step_span(lengths + step, longest + step + 1)
        hidden = decoder.forward(decoder.embed(chosen[:, None]), span, cache, adapters)
        chosen = chooser(decoder.logits(hidden[:, 0]))
        running = _append(tokens, chosen, stop_ids, running)
    return Generated(tokens, first)


def _append(
    tokens: list[list[int]], chosen: Tensor, stop_ids: Sequence[int], running: list[bool]
) -> list[bool]:
    """Add the chosen ids to the rows still running; tell which run on."""
    still = []
    for row, (token, runs) in enumerate(zip(chosen.tolist(), running, strict=True)):
        runs = runs and token not in stop_ids
        if runs:
            tokens[row].append(token)
        still.append(runs)
    return still


class _Chooser:
    """Logits [E, V] to token ids [E], greedy or sampled with a generator per example."""

    def __init__(self, sampling: Sampling, batch: int) -> None:
        self.sampling = sampling
        self.generators = [
            torch.Generator().manual_seed(sampling.seed + i) for i in range(batch)
        ]

    def __call__(self, logits: Tensor) -> Tensor:
        if self.sampling.temperature == 0:
            return logits.argmax(-1)
        probs = torch.softmax(logits.cpu() / self.sampling.temperature, dim=-1)
        ordered, order = probs.sort(dim=-1, descending=True)
        # A token is kept while the probability before it is below top_p: at least one always is.
        keep = ordered.cumsum(-1) - ordered < self.sampling.top_p
        if self.sampling.top_k:
            keep[:, self.sampling.top_k :] = False
        ordered = ordered * keep
        picks = [
            torch.multinomial(row, 1, generator=generator)
            for row, generator in zip(ordered, self.generators, strict=True)
        ]
        return order.gather(-1, torch.stack(picks))[:, 0].to(logits.device)
