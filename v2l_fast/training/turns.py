"""Turns without a video in context as rows of their own, grouped so that hardly anything is padded.

Responsible for ids and for where the answers stand among them. The prefix of a text-only chat is a
few tokens, so repeating it costs less than the mask that sharing it needs. Rows are padded on the
right, where causal attention needs no mask. Turns that share a prefix with the video in it are
packed (`v2l_fast.training.packing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from v2l_fast.data.samples import Sample
from v2l_fast.padding import length_buckets
from v2l_fast.training.transfer import send


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
