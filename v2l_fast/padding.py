"""Sequences of different lengths in one tensor: which go together, and how they are padded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def length_buckets(lengths: Sequence[int], max_padding: float, max_tokens: int) -> list[list[int]]:
    """Indices in groups by length, shortest first.

    At most the share `max_padding` of a group padded to its longest member is padding, and a group
    of more than one holds at most `max_tokens` tokens with it.
    """
    groups: list[list[int]] = []
    filled = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[index]
        area = length * (len(groups[-1]) + 1) if groups else 0
        if groups and area <= max_tokens and filled + length >= (1 - max_padding) * area:
            groups[-1].append(index)
            filled += length
        else:
            groups.append([index])
            filled = length
    return groups


def pad_right(rows: Sequence[Tensor], value: float = 0) -> tuple[Tensor, Tensor | None]:
    """Rows [T_i, ...] as one tensor [n, T, ...], `value` behind each, and their mask.

    The mask, bool [n, T] on the rows' device, is True where a token is; None when all rows are of
    length T.
    """
    lengths = [len(row) for row in rows]
    padded = pad_sequence(list(rows), batch_first=True, padding_value=value)
    if min(lengths) == max(lengths):
        return padded, None
    ends = torch.tensor(lengths, device=padded.device)[:, None]
    return padded, torch.arange(max(lengths), device=padded.device) < ends
