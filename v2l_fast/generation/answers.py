"""From prompts to answers: one batch, any number of questions, and what an adapter changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from v2l_fast.errors import V2LError
from v2l_fast.generation.prefix_cache import CacheKey, PrefixCache
from v2l_fast.generation.runner import ModelRunner, Request
from v2l_fast.generation.sampling import SamplingParams, TokenLogprobs
from v2l_fast.hypernet.adapter import Adapter
from v2l_fast.hypernet.adapter_bank import AdapterBank
from v2l_fast.vlm import Backbone, Prompt
from v2l_fast.vlm.decoder import Decoder

# Questions answered in one batch; more are split.
MAX_BATCH = 32


@dataclass(frozen=True)
class GenerationOutput:
    """Generated answers, ``n`` for each prompt, one prompt after the other.

    Attributes:
        tokens: token ids of each answer, without the stop token.
        time_to_first_token: seconds, of the whole batch.
        logprobs: of the tokens of each answer; empty lists if the parameters do not ask for them.
    """

    tokens: list[list[int]]
    time_to_first_token: float
    logprobs: list[list[TokenLogprobs]] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """An answer and its cost.

    Attributes:
        text: the answer.
        prompt_tokens: tokens in context, visual tokens included.
        visual_tokens: image tokens in context; 0 with an adapter.
        new_tokens: generated tokens, without the stop token.
        time_to_first_token: seconds from the call to the first token of its batch, including the
            prompt (for the direct baseline: resizing and vision tower).
        logprobs: of the new tokens, if the sampling parameters ask for them.
    """

    text: str
    prompt_tokens: int
    visual_tokens: int
    new_tokens: int
    time_to_first_token: float
    logprobs: tuple[TokenLogprobs, ...] = ()


@torch.inference_mode()
def generate(
    decoder: Decoder,
    prompts: Sequence[Tensor],
    stop_ids: Sequence[int],
    sampling: SamplingParams,
    adapters: AdapterBank | None = None,
    prefix_cache: PrefixCache | None = None,
    keys: Sequence[CacheKey] = (),
) -> GenerationOutput:
    """Answer E prompts in one batch.

    Args:
        prompts: E tensors [T_e, D], embedded; lengths may differ.
        stop_ids: token ids that end an answer.
        sampling: parameters for every prompt; answer i, of E · ``n``, uses ``seed + i``.
        adapters: a bank whose ``index`` has E entries, or None for the plain model.
        prefix_cache: keys and values of earlier prompts and answers, to reuse and to extend.
        keys: of the prompts, E if there is a ``prefix_cache``.

    Returns:
        :class:`GenerationOutput`. ``time_to_first_token`` is that of the whole batch, from embedded
        prompts to first tokens.

    Raises:
        V2LError: the logits of a prompt are NaN or infinite.
    """
    start = time.perf_counter()
    slots = [-1] * len(prompts) if adapters is None else adapters.index.tolist()
    slots = [slot for slot in slots for _ in range(sampling.n)]
    repeated = [prompt for prompt in prompts for _ in range(sampling.n)]
    requests = [Request(sampling.for_example(i), slot) for i, slot in enumerate(slots)]
    if prefix_cache is not None:
        for i, request in enumerate(requests):
            request.cache_key = keys[i // sampling.n]
    longest = max(len(prompt) for prompt in prompts)
    runner = ModelRunner(
        decoder, len(requests), longest + sampling.max_new_tokens, stop_ids,
        prefix_cache=prefix_cache,
    )  # fmt: skip
    runner.prefill(requests, repeated, adapters)
    first = time.perf_counter() - start
    while runner.retire_finished():
        runner.decode(adapters)
    for i, request in enumerate(requests):
        if isinstance(request.error, V2LError):
            raise type(request.error)(f"example {i // sampling.n}: {request.error}")
        if request.error is not None:
            raise request.error
    return GenerationOutput(
        [request.tokens for request in requests], first, [request.logprobs for request in requests]
    )


def answer_prompts(
    backbone: Backbone,
    prompts: Sequence[Callable[[], Prompt]],
    adapters: Sequence[Adapter | None],
    sampling: SamplingParams,
    prefix_cache: PrefixCache | None = None,
) -> Iterator[Answer]:
    """Answer any number of prompts in batches of at most :data:`MAX_BATCH`.

    Args:
        prompts: build one prompt each; called, and timed, when its batch is computed.
        adapters: one per prompt, with its bias; None for the plain model.
        sampling: parameters for every prompt; answer i uses ``seed + i``.
        prefix_cache: keys and values of earlier prompts and answers, to reuse and to extend; for
            prompts without a video.

    Yields:
        ``n`` answers for each prompt, in order.

    Raises:
        V2LError: the logits of a prompt are NaN or infinite.
    """
    decoder = backbone.decoder
    # A prompt with more answers than a batch has rows is a batch of its own.
    count = max(1, MAX_BATCH // sampling.n)
    for first in range(0, len(prompts), count):
        start = time.perf_counter()
        part = slice(first, first + count)
        batch = [build() for build in prompts[part]]
        bank = AdapterBank.pack(adapters[part], decoder.device, decoder.dtype)
        keys = [
            CacheKey(prompt.ids, None if adapter is None else adapter.content_hash)
            for prompt, adapter in zip(batch, adapters[part], strict=True)
            if prefix_cache is not None
        ]
        prompt_seconds = time.perf_counter() - start
        output = generate(
            decoder,
            [prompt.embeddings for prompt in batch],
            backbone.stop_ids,
            replace(sampling.for_example(first * sampling.n), n=sampling.n),
            bank,
            prefix_cache,
            keys,
        )
        answers = zip(output.tokens, output.logprobs, strict=True)
        for index, (tokens, logprobs) in enumerate(answers):
            prompt = batch[index // sampling.n]
            yield Answer(
                backbone.decode(tokens),
                len(prompt),
                prompt.visual_tokens,
                len(tokens),
                prompt_seconds + output.time_to_first_token,
                tuple(logprobs),
            )


@dataclass(frozen=True)
class Effect:
    """Did the adapter do anything?

    Attributes:
        update_norms: module -> Frobenius norm of each layer's generated update, [L].
        relative_norms: the same divided by the norm of the layer's frozen weight, [L].
        logit_shift: largest change of any logit of the first answer token.
        divergence: KL(with adapter ‖ without) of the first answer token's distribution, nats.
        answer: the answer with the adapter.
        answer_without: the answer of the same model without it.
    """

    update_norms: dict[str, list[float]]
    relative_norms: dict[str, list[float]]
    logit_shift: float
    divergence: float
    answer: str
    answer_without: str


@torch.inference_mode()
def measure_effect(backbone: Backbone, adapter: Adapter, question: str) -> Effect:
    """:class:`Effect` of an adapter, its bias included, on the greedy answer to a question."""
    decoder = backbone.decoder
    prompt = backbone.question(question)
    slots = AdapterBank.pack([adapter], decoder.device, decoder.dtype)
    plain, adapted = (
        decoder.logits(decoder.forward(prompt.embeddings[None], adapters=s)[0, -1])
        for s in (None, slots)
    )
    log_plain, log_adapted = plain.log_softmax(-1), adapted.log_softmax(-1)
    norms = adapter.norms()["layer"]
    answers = answer_prompts(backbone, [lambda: prompt] * 2, [adapter, None], SamplingParams())
    with_adapter, without = (answer.text for answer in answers)
    return Effect(
        {m: n.tolist() for m, n in norms.items()},
        {m: (n.cpu() / _weight_norms(backbone, m)).tolist() for m, n in norms.items()},
        (adapted - plain).abs().max().item(),
        (log_adapted.exp() * (log_adapted - log_plain)).sum().item(),
        with_adapter,
        without,
    )


def _weight_norms(backbone: Backbone, module: str) -> Tensor:
    linears = (backbone.linear(i, module) for i in range(backbone.decoder.num_layers))
    return torch.stack([linear.weight.float().norm().cpu() for linear in linears])
