"""Several turns about one video in one row, each seeing the shared prefix and itself only.

Responsible for packing ids, positions and the block-diagonal mask. Every turn's positions restart
after the shared prefix, so a packed turn computes what it would compute alone. It pays where the
prefix holds the video; turns without one are rows of their own (`v2l_fast.training.turns`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from v2l_fast.training.transfer import send


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
