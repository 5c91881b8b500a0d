"""Intervals of analyses: questions about one video are not independent."""

from __future__ import annotations

import dataclasses

import pytest

from v2l_fast.evaluation.examples import EvalExample, interval
from v2l_fast.evaluation.statistics import mean_interval


def test_examples_of_one_video_are_resampled_together():
    """Ten questions that agree within their video tell no more than one."""
    values = [index % 3 / 2 for index in range(30)]
    once = [EvalExample(f"{index}.mp4", "what?", ("x",)) for index in range(30)]
    many = [example for example in once for _ in range(10)]
    result = interval([value for value in values for _ in range(10)], many)
    assert result == pytest.approx(interval(values, once))
    assert result == pytest.approx(dataclasses.asdict(mean_interval(values)))
    apart = mean_interval([value for value in values for _ in range(10)])
    assert result["high"] - result["low"] > 2 * (apart.high - apart.low)


def test_videos_weigh_by_their_examples():
    examples = [EvalExample(f"{name}.mp4", "what?", ("x",)) for name in "aab"]
    assert interval([1.0, 0.0, 1.0], examples)["estimate"] == pytest.approx(2 / 3)
