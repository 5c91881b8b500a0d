"""Viewers who do not say which of two objects they mean, with the shipped pair."""

import pytest

from v2l_fast.model import Video2LoRA
from v2l_fast.shapes.viewers import ambiguous_scenes, evaluate_viewers, view
from v2l_fast.shapes.world import sample_scenes


@pytest.fixture(scope="module")
def shipped() -> Video2LoRA:
    return Video2LoRA.from_pretrained("shapes")


@pytest.mark.slow
def test_asking_beats_guessing_and_a_known_viewer_is_not_asked(shipped):
    record = evaluate_viewers(shipped, sample_scenes("test", 48, 0))
    arms = record["arms"]
    assert record["ask minus guess"]["later questions"]["low"] > 0
    # The persona carried over saves the question and answers as well as asking does.
    assert arms["guess"]["questions asked"] == arms["persona"]["questions asked"] == 0
    assert arms["persona"]["first question"]["estimate"] >= 0.9
    assert arms["persona"]["later questions"]["estimate"] >= 0.9
    assert record["persona minus guess"]["first question"]["low"] > 0
    assert record["persona minus guess"]["later questions"]["low"] > 0
    assert (
        arms["other video"]["later questions"]["estimate"]
        < arms["guess"]["later questions"]["estimate"]
    )
    assert record["auroc of the uncertainty"]["color"] > 0.8


def test_one_answered_question_serves_the_later_ones(shipped):
    from v2l_fast.shapes.evaluate import rendered_clips

    scenes = ambiguous_scenes(sample_scenes("test", 12, 0))[:4]
    adapters = shipped.internalize(rendered_clips(scenes))
    viewings = [
        view(shipped, a, s, i % 2, "ask")
        for i, (a, s) in enumerate(zip(adapters, scenes, strict=True))
    ]
    assert all(viewing.questions <= 1 for viewing in viewings)
    assert all(viewing.correct[-1] for viewing in viewings if viewing.questions)
