"""Several turns about one video in one row, each seeing the video and itself only.

Responsible for packing ids, positions and the block-diagonal mask. Every turn's positions restart
after the shared prefix, so a packed turn computes what it would compute alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedTurns:
    """A batch of rows. `mask` is what attention may see; answers are listed flat, row-major.

    ids, positions: int64 [B, T]; mask: bool [B, 1, T, T]; rows, columns: int64 [N], where the token
    before each answer token stands; targets: int64 [N], the answer token; turns: int64 [N], which
    turn (counted over the whole batch) the answer token belongs to.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor
    turns: Tensor


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
    same = segments[:, :, None] == segments[:, None, :]
    shared = (segments == 0)[:, None, :] & (segments >= 0)[:, :, None]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    return PackedTurns(
        ids=ids,
        positions=positions,
        mask=((same | shared) & causal)[:, None],
        rows=torch.tensor(rows),
        columns=torch.tensor(columns),
        targets=torch.tensor(targets),
        turns=torch.tensor(owners),
    )
