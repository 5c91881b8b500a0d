"""Samples as tensors on the model's device: embedded contexts, rows of responses, packed rows.

Contexts and rows are grouped by length, so that hardly anything is padded. Nothing here waits for
the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from v2l_fast.data.samples import Sample
from v2l_fast.padding import length_buckets
from v2l_fast.transfer import send


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
