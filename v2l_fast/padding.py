"""Batches of sequences of different lengths: grouping by length, and padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def length_buckets(lengths: Sequence[int], max_padding: float, max_tokens: int) -> list[list[int]]:
    """Indices grouped by length, shortest first.

    Padded to its longest member, a group is at most the share `max_padding` padding. A group of
    more than one sequence holds at most `max_tokens` tokens, padding included.
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
    """Rows [T_i, ...] as one tensor [n, T, ...], padded with `value`, and their mask.

    The mask is bool [n, T] on the rows' device, True where a token is, or None if all rows have
    length T.
    """
    lengths = [len(row) for row in rows]
    padded = pad_sequence(list(rows), batch_first=True, padding_value=value)
    if min(lengths) == max(lengths):
        return padded, None
    ends = torch.tensor(lengths, device=padded.device)[:, None]
    return padded, torch.arange(max(lengths), device=padded.device) < ends
