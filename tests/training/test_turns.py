"""Turns as rows of their own: what is in a row, who owns it, where its answer is read."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.training import plain
from v2l_fast.data.samples import ContextSample, Sample
from v2l_fast.training.turns import turn_rows

PAD = 99


def sample(prefix: list[int], *turns: tuple[list[int], list[int]]) -> Sample:
    context = ContextSample(torch.zeros(1, dtype=torch.int64), features=torch.zeros(1, 1, 1))
    return Sample("v", (context,), prefix, turns, ("qa",) * len(turns))


SAMPLES = [
    sample([1, 2], ([3], [4, 5]), ([6, 7, 8, 9, 10], [11])),
    sample([1], ([12], [13, 14, 15]), ([16], [])),
]


def test_rows_of_any_length_in_one_group():
    rows = turn_rows(SAMPLES, PAD, 1.0, 10**6).to(torch.device("cpu"))
    ((ids, owners),) = rows.groups
    # The shortest first; the last answer token is predicted, never read.
    assert ids.tolist() == [
        [1, 16, PAD, PAD, PAD, PAD, PAD],
        [1, 2, 3, 4, PAD, PAD, PAD],
        [1, 12, 13, 14, PAD, PAD, PAD],
        [1, 2, 6, 7, 8, 9, 10],
    ]
    assert owners.tolist() == [1, 0, 1, 0]
    # In the samples' order: the tokens before 4, 5, 11, 13, 14, 15.
    assert rows.targets.tolist() == [4, 5, 11, 13, 14, 15]
    assert ids.flatten()[rows.places].tolist() == [3, 4, 10, 12, 13, 14]
    assert rows.turns.tolist() == [0, 0, 1, 2, 2, 2]


def test_no_padding_where_none_is_allowed():
    rows = turn_rows(SAMPLES, PAD, 0.0, 10**6)
    assert [list(ids.shape) for ids, _ in rows.groups] == [[1, 2], [2, 4], [1, 7]]
    flat = torch.cat([ids.flatten() for ids, _ in rows.groups])
    assert not (flat == PAD).any()
    assert flat[rows.places].tolist() == [3, 4, 10, 12, 13, 14]


@pytest.mark.parametrize("max_padding", [0.0, 0.1, 0.5])
def test_groups_keep_their_bounds(max_padding):
    samples = plain.batch(tiny.backbone())
    rows = turn_rows(samples, PAD, max_padding, 30)
    for ids, owners in rows.groups:
        assert len(owners) == len(ids)
        assert (ids == PAD).sum() <= max_padding * ids.numel()
        assert len(ids) == 1 or ids.numel() <= 30
    assert sum(len(ids) for ids, _ in rows.groups) == sum(len(one.turns) for one in samples)
