"""Questions to answers: prompts built and answered in batches, with what each cost.

Responsible for batches of bounded size and for their times; how one batch runs is the package's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from v2l_fast.generation import SamplingParams, generate
from v2l_fast.hypernet.adapted_linear import AdapterBank
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.vlm import Backbone, Prompt

# Questions answered in one forward pass; more are split.
MAX_BATCH = 32


@dataclass(frozen=True)
class Answer:
    """One answer and what it cost.

    Attributes:
        text: the answer.
        prompt_tokens: tokens in context, visual ones included.
        visual_tokens: tokens that stand for pixels; 0 with an adapter.
        new_tokens: tokens generated.
        time_to_first_token: seconds from the call to the first token of its batch, building the
            prompt (for the direct baseline: resizing and vision tower) included.
    """

    text: str
    prompt_tokens: int
    visual_tokens: int
    new_tokens: int
    time_to_first_token: float


def answer_prompts(
    backbone: Backbone,
    builders: Sequence[Callable[[], Prompt]],
    adapters: Sequence[Adapter | None],
    sampling: SamplingParams,
) -> Iterator[Answer]:
    """Answer in batches; each prompt is built, and its cost timed, when its turn comes.

    Args:
        builders: of the prompts.
        adapters: one for each prompt, with its bias; None for the plain model.
        sampling: parameters for every prompt; prompt i uses ``seed + i``.
    """
    decoder = backbone.decoder
    for first in range(0, len(builders), MAX_BATCH):
        start = time.perf_counter()
        part = slice(first, first + MAX_BATCH)
        prompts = [build() for build in builders[part]]
        slots = AdapterBank.pack(adapters[part], decoder.device, decoder.dtype)
        built = time.perf_counter() - start
        generated = generate(
            decoder,
            [prompt.embeddings for prompt in prompts],
            backbone.stop_ids,
            sampling.for_example(first),
            slots,
        )
        for prompt, tokens in zip(prompts, generated.tokens, strict=True):
            yield Answer(
                backbone.decode(tokens),
                len(prompt),
                prompt.visual_tokens,
                len(tokens),
                built + generated.time_to_first_token,
            )
