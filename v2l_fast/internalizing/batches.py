"""Parts to adapters: the contexts of several together through the frozen VLM and the hypernetwork.

Responsible for which contexts share a batch and for its units of work, each bounded. Which parts
there are, what is recorded about them and how they make up a video are the caller's.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from v2l_fast.hypernet.adapter import Adapter, AdapterBatch
from v2l_fast.hypernet.network import HyperNetwork
from v2l_fast.internalizing.parts import Part
from v2l_fast.padding import length_buckets, pad_right
from v2l_fast.video import FrameViews
from v2l_fast.vlm import Backbone, Prompt
from v2l_fast.vlm.base import EncodedVideo, iter_resize, prompt_ids
from v2l_fast.work_units import WorkUnit, label_units, token_chunks, tokens_per_unit

# Tokens of contexts that are computed together; a longer context is alone. Eight videos of twelve
# frames are 7,000. At the widest decoder (MLP of 8,192) a layer then needs 2 GB in bfloat16.
BATCH_TOKENS = 32768
# Share of a batch that may be padding: clips of the same number of frames differ by a few words.
MAX_PADDING = 0.1


@dataclass(frozen=True)
class _Context:
    """A part, resized; `index` among all parts, `ids` of its prompt."""

    index: int
    part: Part
    views: FrameViews
    ids: list[int]


def iter_generate(
    backbone: Backbone,
    hypernet: HyperNetwork,
    parts: Sequence[Part],
    longest_edge: int,
    batch_tokens: int = BATCH_TOKENS,
) -> Generator[WorkUnit, None, list[Adapter | None]]:
    """The adapter of each part, in units of work (see :mod:`v2l_fast.work_units`).

    Batching changes results only by floating-point rounding. Resizing precedes each batch's first
    unit with the model, under the name "decode".

    Args:
        longest_edge: pixels.
        batch_tokens: context tokens computed together; 0 takes each part alone.

    Returns:
        For each part its adapter, or None where a factor is NaN or infinite.
    """
    adapters: list[Adapter | None] = [None] * len(parts)
    remaining = list(enumerate(parts))
    while remaining:
        contexts = yield from _next_batch(
            backbone, hypernet.config.instruction, remaining, longest_edge, batch_tokens
        )
        videos = yield from _encode_steps(backbone, contexts)
        prompts = [
            backbone.video_prompt(
                video, hypernet.config.instruction, answer_follows=False, ids=c.ids
            )
            for video, c in zip(videos, contexts, strict=True)
        ]
        lengths = [len(prompt) for prompt in prompts]
        for members in length_buckets(lengths, MAX_PADDING, batch_tokens):
            batch = yield from _layer_steps(
                backbone,
                hypernet,
                [prompts[i] for i in members],
                [contexts[i].part.place for i in members],
            )
            for member, adapter in zip(members, _finite(batch), strict=True):
                adapters[contexts[member].index] = adapter
    return adapters


def _next_batch(
    backbone: Backbone,
    instruction: str,
    remaining: list[tuple[int, Part]],
    longest_edge: int,
    tokens: int,
) -> Generator[WorkUnit, None, list[_Context]]:
    """Parts taken from ``remaining`` up to (and with the one that reaches) so many visual
    tokens."""
    inputs = backbone.prompt_builder
    batch, filled = [], 0
    while remaining:
        index, part = remaining.pop(0)
        views = yield from iter_resize(part.clip.frames, longest_edge, inputs.tile_size)
        ids = prompt_ids(inputs, part.clip, instruction, longest_edge, answer_follows=False)
        batch.append(_Context(index, part, views, ids))
        filled += len(views.views) * inputs.tokens_per_view
        if filled >= tokens:
            break
    return batch


def _encode_steps(
    backbone: Backbone, contexts: Sequence[_Context]
) -> Generator[WorkUnit, None, list[EncodedVideo]]:
    """Vision tower and connector over the views of all contexts."""
    counts = [len(context.views.views) for context in contexts]
    # One long video's views are not copied.
    views = contexts[0].views.views
    if len(contexts) > 1:
        views = torch.cat([context.views.views for context in contexts])
    features = []
    for chunk in views.split(backbone.views_per_unit):
        yield "encode frames", len(features) * backbone.views_per_unit, len(views)
        features.append(backbone.encode_views(chunk))
    encoded = torch.cat(features).split(counts)
    return [
        EncodedVideo(mine, c.part.clip.timestamps, c.part.clip.duration, c.views.rows, c.views.cols)
        for mine, c in zip(encoded, contexts, strict=True)
    ]


@torch.no_grad()
def _layer_steps(
    backbone: Backbone,
    hypernet: HyperNetwork,
    prompts: Sequence[Prompt],
    places: Sequence[tuple[float, float]],
) -> Generator[WorkUnit, None, AdapterBatch]:
    """Each layer's factors as the decoder produces its input; long contexts in chunks."""
    # The decoder needs no mask: what follows a token does not reach it.
    embeddings, mask = pad_right([prompt.embeddings for prompt in prompts])
    where = torch.tensor(places, device=embeddings.device)
    total = hypernet.config.num_layers
    unit = tokens_per_unit(embeddings.device)
    parts = list(token_chunks(embeddings.shape[1], unit))
    per_layer, hidden = [], embeddings
    for index in range(total):
        step = "generate adapter", index, total
        yield step
        factors = hypernet.iter_layer(index, hidden, mask, where, parts)
        per_layer.append((yield from label_units(factors, step)))
        if index + 1 < total:
            layer = backbone.decoder.iter_layer(index, hidden, unit)
            hidden = yield from label_units(layer, step)
    yield "generate adapter", total, total
    return hypernet.assemble(per_layer)


def _finite(batch: AdapterBatch) -> list[Adapter | None]:
    """The batch's adapters, None for one with a factor that is NaN or infinite."""
    sums = [
        factor.flatten(1).sum(1, dtype=torch.float32)
        for factor in (*batch.A.values(), *batch.B.values())
    ]
    # One wait for the device, after everything is enqueued.
    sound = torch.stack(sums).isfinite().all(0).tolist()
    return [adapter if fine else None for adapter, fine in zip(batch, sound, strict=True)]
