"""The contexts of a batch as embedded prompts, grouped so that hardly anything is padded.

Responsible for the frozen part before the decoder: vision tower and connector over the views of all
videos together, image tokens into the prompts. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from v2l_fast.data.samples import ContextSample
from v2l_fast.errors import ConfigError
from v2l_fast.padding import length_buckets, pad_right
from v2l_fast.training.transfer import send
from v2l_fast.vlm import Backbone


@dataclass(frozen=True)
class ContextGroup:
    """Contexts of similar length.

    members: which of the batch's contexts, [n]; embeddings: [n, S, D]; mask: [n, S], True where a
    token is, or None when all are of length S; places: float32 [n, 2].
    """

    members: list[int]
    embeddings: Tensor
    mask: Tensor | None
    places: Tensor


@torch.no_grad()
def visual_features(backbone: Backbone, contexts: Sequence[ContextSample]) -> list[Tensor]:
    """Connector outputs [V, t, D] of each context, on the model's device and in its dtype.

    The vision tower sees the views of all contexts in chunks of the backbone's choice.
    """
    device, dtype = backbone.decoder.device, backbone.decoder.dtype
    views = [send(c.pixels, device) for c in contexts if c.pixels is not None]
    encoded = iter(())
    if views:
        encoded = iter(backbone.encode_views(torch.cat(views)).split([len(v) for v in views]))
    return [
        next(encoded) if c.features is None else send(c.features, device, dtype) for c in contexts
    ]


@torch.no_grad()
def embed_ids(backbone: Backbone, ids: Tensor, features: Sequence[Tensor]) -> Tensor:
    """CPU ids [n, S] to embeddings [n, S, D], the features in place of the image tokens in order.

    Raises ConfigError when there are not as many image tokens as features.
    """
    rows = torch.cat([f.flatten(0, 1) for f in features])
    # Counted on the CPU, where the ids come from.
    count = np.count_nonzero(ids.numpy() == backbone.image_token_id)
    if count != len(rows):
        raise ConfigError(
            f"{count} image tokens in the prompts for {len(rows)} visual features: were they made "
            f"for {backbone.name_or_path}?"
        )
    ids = send(ids, backbone.decoder.device)
    words = backbone.decoder.embed(ids)
    return words.masked_scatter((ids == backbone.image_token_id)[..., None], rows.to(words.dtype))


def context_groups(
    backbone: Backbone,
    contexts: Sequence[ContextSample],
    features: Sequence[Tensor],
    max_padding: float,
    max_tokens: int,
) -> Iterator[ContextGroup]:
    """Embedded contexts in groups by `length_buckets`; `features` as from `visual_features`."""
    device = backbone.decoder.device
    for members in length_buckets([len(c.ids) for c in contexts], max_padding, max_tokens):
        rows = [contexts[i].ids for i in members]
        ids, mask = pad_right(rows, backbone.tokenizer.pad_token_id)
        places = torch.tensor([contexts[i].place for i in members], dtype=torch.float32)
        yield ContextGroup(
            members,
            embed_ids(backbone, ids, [features[i] for i in members]),
            None if mask is None else send(mask, device),
            send(places, device),
        )
