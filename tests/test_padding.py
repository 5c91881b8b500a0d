"""Grouping of sequences by length, and padding."""

from __future__ import annotations

import torch

from v2l_fast.padding import length_buckets, pad_right


def test_length_buckets():
    lengths = [10, 100, 9, 95, 10, 50]
    assert length_buckets(lengths, 0.0, 10**6) == [[2], [0, 4], [5], [3], [1]]
    assert length_buckets(lengths, 0.1, 10**6) == [[2, 0, 4], [5], [3, 1]]
    assert length_buckets(lengths, 0.1, 20) == [[2, 0], [4], [5], [3], [1]]
    assert length_buckets([], 0.1, 20) == []


def test_padding_is_on_the_right_and_masked():
    padded, mask = pad_right([torch.tensor([1, 2, 3]), torch.tensor([4])], 9)
    assert padded.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert mask.tolist() == [[True] * 3, [True, False, False]]
    rows = [torch.ones(2, 3), torch.zeros(2, 3)]
    padded, mask = pad_right(rows)
    assert torch.equal(padded, torch.stack(rows)) and mask is None
