"""Samples as tensors on the model's device: embedded contexts, rows of responses, packed rows.

Contexts and rows are grouped by length, so that hardly anything is padded. Nothing here waits for
the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from v2l_fast.data.samples import ContextSample, Sample
from v2l_fast.errors import ConfigError
from v2l_fast.padding import length_buckets, pad_right
from v2l_fast.vlm import Backbone


@dataclass(frozen=True)
class ResponseRows:
    """Groups of rows of similar length; answers are listed flat, in the samples' order.

    groups: ids int64 [n, T] and the sample of each row, int64 [n]. A row ends before its last
    answer token, which nothing is predicted from. places: int64 [N], where the token before each
    answer token stands in all groups' tokens, row by row; targets: int64 [N], the answer token;
    turns: int64 [N], which turn (counted over the whole batch) the answer token belongs to.
    """

    groups: list[tuple[Tensor, Tensor]]
    places: Tensor
    targets: Tensor
    turns: Tensor

    def to(self, device: torch.device) -> ResponseRows:
        """The same on another device, without waiting for it."""
        groups = [(send(ids, device), send(owners, device)) for ids, owners in self.groups]
        return ResponseRows(
            groups, *(send(t, device) for t in (self.places, self.targets, self.turns))
        )


def turn_rows(
    samples: Sequence[Sample], pad_id: int, max_padding: float, max_tokens: int
) -> ResponseRows:
    """Every turn of every sample, in groups by `length_buckets`."""
    turns = [
        (owner, sample.prefix + question, answer)
        for owner, sample in enumerate(samples)
        for question, answer in sample.turns
    ]
    rows = [torch.tensor(prompt + answer[:-1]) for _, prompt, answer in turns]
    groups: list[tuple[Tensor, Tensor]] = []
    starts = [0] * len(rows)
    filled = 0
    for members in length_buckets([len(row) for row in rows], max_padding, max_tokens):
        ids = pad_sequence([rows[i] for i in members], batch_first=True, padding_value=pad_id)
        groups.append((ids, torch.tensor([turns[i][0] for i in members])))
        for member in members:
            starts[member] = filled
            filled += ids.shape[1]
    places, targets, numbers = [], [], []
    for number, (start, (_, prompt, answer)) in enumerate(zip(starts, turns, strict=True)):
        first = start + len(prompt) - 1
        places += range(first, first + len(answer))
        targets += answer
        numbers += [number] * len(answer)
    return ResponseRows(groups, torch.tensor(places), torch.tensor(targets), torch.tensor(numbers))


def send(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`tensor` on `device`, in `dtype` when given.

    A copy to a GPU from ordinary memory would wait for everything enqueued before it.
    """
    if device.type == "cuda" and not tensor.is_cuda and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True).to(dtype or tensor.dtype)


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


@dataclass(frozen=True)
class PackedTurns:
    """A batch of rows; answers are listed flat, row-major.

    ids, positions: int64 [B, T]; segments: int64 [B, T], 0 for the prefix, 1, 2, ... for the row's
    turns, -1 for padding; rows, columns: int64 [N], where the token before each answer token
    stands; targets: int64 [N], the answer token; turns: int64 [N], which turn (counted over the
    whole batch) the answer token belongs to.
    """

    ids: Tensor
    positions: Tensor
    segments: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor
    turns: Tensor

    @property
    def mask(self) -> Tensor:
        """What attention may see, bool [B, 1, T, T]; computed where the segments are."""
        rows, columns = self.segments[:, :, None], self.segments[:, None, :]
        shared = (columns == 0) & (rows >= 0)
        places = torch.arange(self.segments.shape[1], device=self.segments.device)
        return (((rows == columns) | shared) & (places <= places[:, None]))[:, None]

    def to(self, device: torch.device) -> PackedTurns:
        """The same on another device, without waiting for it."""
        return PackedTurns(*(send(getattr(self, field.name), device) for field in fields(self)))


def pack_turns(
    prefixes: Sequence[list[int]],
    turns: Sequence[Sequence[tuple[list[int], list[int]]]],
    pad_id: int,
) -> PackedTurns:
    """Pack each row's prefix and (question ids, answer ids) turns; rows are padded on the right."""
    lengths = [
        len(prefix) + sum(len(q) + len(a) for q, a in row)
        for prefix, row in zip(prefixes, turns, strict=True)
    ]
    width = max(lengths)
    ids = torch.full((len(prefixes), width), pad_id)
    positions = torch.zeros(len(prefixes), width, dtype=torch.int64)
    segments = torch.full((len(prefixes), width), -1)
    rows, columns, targets, owners = [], [], [], []
    owner = 0
    for b, (prefix, row) in enumerate(zip(prefixes, turns, strict=True)):
        start = len(prefix)
        flat, places, marks = list(prefix), list(range(start)), [0] * start
        for k, (question, answer) in enumerate(row):
            first = len(flat) + len(question)
            length = len(question) + len(answer)
            flat += question + answer
            places += range(start, start + length)
            marks += [k + 1] * length
            rows += [b] * len(answer)
            columns += range(first - 1, first - 1 + len(answer))
            targets += answer
            owners += [owner] * len(answer)
            owner += 1
        ids[b, : len(flat)] = torch.tensor(flat)
        positions[b, : len(flat)] = torch.tensor(places)
        segments[b, : len(flat)] = torch.tensor(marks)
    return PackedTurns(
        ids=ids,
        positions=positions,
        segments=segments,
        rows=torch.tensor(rows),
        columns=torch.tensor(columns),
        targets=torch.tensor(targets),
        turns=torch.tensor(owners),
    )
