"""Answering: a batch of prompts, each with an adapter of its own or none, token by token.

Works on embedded prompts and a :class:`~v2l_fast.vlm.decoder.Decoder`; tokenizers, videos
and threads are other files' business. ``sampling`` chooses tokens, ``batch`` keeps the running
answers, and this file runs one batch from its prompts to its end.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from v2l_fast.errors import V2LError
from v2l_fast.generation.batch import Batch, Row
from v2l_fast.generation.sampling import SamplingParams
from v2l_fast.hypernet.adapted_linear import AdapterBank
from v2l_fast.vlm.decoder import Decoder

__all__ = ["Batch", "GenerationOutput", "Row", "SamplingParams", "generate"]


@dataclass(frozen=True)
class GenerationOutput:
    """Generated token ids per example, without the stop token, and the time to first token (s)."""

    tokens: list[list[int]]
    time_to_first_token: float


@torch.inference_mode()
def generate(
    decoder: Decoder,
    prompts: Sequence[Tensor],
    stop_ids: Sequence[int],
    sampling: SamplingParams,
    adapters: AdapterBank | None = None,
) -> GenerationOutput:
    """Answer E prompts.

    Args:
        prompts: E tensors [T_e, D], embedded; lengths may differ.
        stop_ids: token ids that end an answer.
        sampling: parameters for every prompt; prompt i uses ``seed + i``.
        adapters: slots whose ``index`` has E entries, or None.

    Returns:
        :class:`GenerationOutput`. ``time_to_first_token`` is that of the whole batch, from embedded
        prompts to chosen tokens.

    Raises:
        V2LError: the logits of an example are NaN or infinite.
    """
    start = time.perf_counter()
    slots = [-1] * len(prompts) if adapters is None else adapters.index.tolist()
    rows = [Row(sampling.for_example(index), slot) for index, slot in enumerate(slots)]
    longest = max(len(prompt) for prompt in prompts)
    batch = Batch(decoder, len(rows), longest + sampling.max_new_tokens, stop_ids)
    batch.join(rows, prompts, adapters)
    first = time.perf_counter() - start
    while batch.drop_finished():
        batch.step(adapters)
    for index, row in enumerate(rows):
        if isinstance(row.error, V2LError):
            raise type(row.error)(f"example {index}: {row.error}")
        if row.error is not None:
            raise row.error
    return GenerationOutput([row.tokens for row in rows], first)
