"""How the next token is chosen: greedy, or drawn with a generator of the answer's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from v2l_fast.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: limit of generated tokens, the stop token included.
        temperature: 0 is greedy.
        top_p: smallest set of tokens whose probability reaches it.
        top_k: the k most likely tokens; 0 for no limit.
        seed: of the answer's own generator, so it does not depend on what it is batched with;
            example i of a batch asked together has ``seed + i``.
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


class Drawer:
    """Draws the tokens of one answer."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.generator = torch.Generator().manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> int:
        """Logits [V] on the CPU to a token id."""
        probs = torch.softmax(logits / self.sampling.temperature, dim=-1)
        ordered, order = probs.sort(descending=True)
        # A token is kept while the probability before it is below top_p: at least one always is.
        keep = ordered.cumsum(-1) - ordered < self.sampling.top_p
        if self.sampling.top_k:
            keep[self.sampling.top_k :] = False
        return int(order[torch.multinomial(ordered * keep, 1, generator=self.generator)])


def choose(logits: Tensor, drawers: Sequence[Drawer | None]) -> Tensor:
    """Logits [E, V] to token ids [E] on their device; the most likely one where there is no
    drawer."""
    chosen = logits.argmax(-1)
    drawn = [row for row, drawer in enumerate(drawers) if drawer is not None]
    if drawn:
        # One transfer for all that are drawn.
        found = logits[drawn].cpu()
        picks = [drawers[row](one) for row, one in zip(drawn, found, strict=True)]
        chosen[drawn] = torch.tensor(picks, device=logits.device)
    return chosen
