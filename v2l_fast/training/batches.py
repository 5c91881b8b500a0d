"""Questions and answers as rows of token ids, with the positions that predict the answers.

Without the video in context, each question is a row of its own (:class:`ResponseRows`): the shared
prefix is a few tokens, so repeating it costs less than the mask that sharing it would need. With
the video in the prefix, the questions of a video are packed into one row (:class:`PackedPairs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from v2l_fast.data.readers import Sample
from v2l_fast.device import send
from v2l_fast.pipeline import length_buckets

# Question ids and answer ids.
QAPair = tuple[list[int], list[int]]


@dataclass(frozen=True)
class ResponseRows:
    """Rows grouped by length; answer tokens are listed flat, in the samples' order.

    Rows are right-padded, where causal attention needs no mask, and end before their last answer
    token, which predicts nothing.

    Attributes:
        groups: token ids int64 [n, T], and the sample of each row, int64 [n].
        positions: int64 [N], where the token before each answer token is in the concatenation of
            all groups' tokens, row by row.
        targets: int64 [N], the answer tokens.
        pair_index: int64 [N], the question of each answer token, counted over the whole batch.
    """

    groups: list[tuple[Tensor, Tensor]]
    positions: Tensor
    targets: Tensor
    pair_index: Tensor

    def to(self, device: torch.device) -> ResponseRows:
        """A copy on another device; does not wait for it."""
        groups = [(send(ids, device), send(owners, device)) for ids, owners in self.groups]
        return ResponseRows(
            groups, *(send(t, device) for t in (self.positions, self.targets, self.pair_index))
        )


def response_rows(
    samples: Sequence[Sample], pad_id: int, max_padding: float, max_tokens: int
) -> ResponseRows:
    """A row for every question of every sample, in groups by `length_buckets`."""
    pairs = [
        (owner, sample.prompt_prefix + question, answer)
        for owner, sample in enumerate(samples)
        for question, answer in sample.qa_pairs
    ]
    rows = [torch.tensor(prompt + answer[:-1]) for _, prompt, answer in pairs]
    groups: list[tuple[Tensor, Tensor]] = []
    starts = [0] * len(rows)
    total = 0
    for members in length_buckets([len(row) for row in rows], max_padding, max_tokens):
        ids = pad_sequence([rows[i] for i in members], batch_first=True, padding_value=pad_id)
        groups.append((ids, torch.tensor([pairs[i][0] for i in members])))
        for member in members:
            starts[member] = total
            total += ids.shape[1]
    positions: list[int] = []
    targets: list[int] = []
    index: list[int] = []
    for number, (start, (_, prompt, answer)) in enumerate(zip(starts, pairs, strict=True)):
        first = start + len(prompt) - 1
        positions += range(first, first + len(answer))
        targets += answer
        index += [number] * len(answer)
    return ResponseRows(groups, torch.tensor(positions), torch.tensor(targets), torch.tensor(index))


@dataclass(frozen=True)
class PackedPairs:
    """Rows of a prefix and several question-answer pairs, each of which sees only the prefix and
    itself; answer tokens are listed flat, row by row.

    The positions of every pair start after the prefix, so a packed pair computes what it would
    compute alone.

    Attributes:
        ids, positions: int64 [B, T].
        segments: int64 [B, T], 0 for the prefix, 1, 2, ... for the pairs, -1 for padding.
        rows, columns: int64 [N], where the token before each answer token is.
        targets: int64 [N], the answer tokens.
        pair_index: int64 [N], the pair of each answer token, counted over the whole batch.
    """

    ids: Tensor
    positions: Tensor
    segments: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor
    pair_index: Tensor

    @property
    def mask(self) -> Tensor:
        """Attention mask, bool [B, 1, T, T], on the device of the segments."""
        rows, columns = self.segments[:, :, None], self.segments[:, None, :]
        shared = (columns == 0) & (rows >= 0)
        order = torch.arange(self.segments.shape[1], device=self.segments.device)
        return (((rows == columns) | shared) & (order <= order[:, None]))[:, None]

    def to(self, device: torch.device) -> PackedPairs:
        """A copy on another device; does not wait for it."""
        return PackedPairs(*(send(getattr(self, field.name), device) for field in fields(self)))


def pack_pairs(
    prefixes: Sequence[list[int]], pairs: Sequence[Sequence[QAPair]], pad_id: int
) -> PackedPairs:
    """Pack each prefix and its pairs into a row; rows are right-padded."""
    lengths = [
        len(prefix) + sum(len(question) + len(answer) for question, answer in row)
        for prefix, row in zip(prefixes, pairs, strict=True)
    ]
    ids = torch.full((len(prefixes), max(lengths)), pad_id)
    positions = torch.zeros_like(ids)
    segments = torch.full_like(ids, -1)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    index: list[int] = []
    number = 0
    for b, (prefix, row) in enumerate(zip(prefixes, pairs, strict=True)):
        start = len(prefix)
        tokens, order, segment = list(prefix), list(range(start)), [0] * start
        for k, (question, answer) in enumerate(row, 1):
            first = len(tokens) + len(question)
            length = len(question) + len(answer)
            tokens += question + answer
            order += range(start, start + length)
            segment += [k] * length
            rows += [b] * len(answer)
            columns += range(first - 1, first - 1 + len(answer))
            targets += answer
            index += [number] * len(answer)
            number += 1
        for tensor, values in ((ids, tokens), (positions, order), (segments, segment)):
            tensor[b, : len(values)] = torch.tensor(values)
    flat = (torch.tensor(values) for values in (rows, columns, targets, index))
    return PackedPairs(ids, positions, segments, *flat)
