"""Simulated people: asking closes the true gap, and nothing else does."""

import numpy as np
import pytest

from v2l_fast.conversation import CperSettings, Schema
from v2l_fast.conversation.simulate import SimulatedUser, simulate
from v2l_fast.errors import ConfigError

MOVIES = Schema.load("movies")


@pytest.fixture(scope="module")
def conversations():
    return list(simulate(MOVIES, users=100))


def of(conversations, arm):
    return [talk for own, talk in conversations if own == arm]


def true_gap_table(conversations):
    """Arm -> true gaps [users, turns]."""
    arms = dict.fromkeys(arm for arm, _ in conversations)
    return {arm: np.array([talk.true_gaps for talk in of(conversations, arm)]) for arm in arms}


def difference(first, second) -> tuple[float, float]:
    """95% interval of the mean paired difference (normal)."""
    paired = np.asarray(first) - np.asarray(second)
    half = 1.96 * paired.std(ddof=1) / len(paired) ** 0.5
    return paired.mean() - half, paired.mean() + half


def test_targeted_questions_close_the_true_gap(conversations):
    gaps = true_gap_table(conversations)
    assert gaps["targeted"][:, -1].mean() <= 0.05
    assert (gaps["off"][:, -1] == gaps["off"][:, 0]).all()
    assert difference(gaps["random"][:, -1], gaps["targeted"][:, -1])[0] > 0
    assert difference(gaps["off"][:, -1], gaps["random"][:, -1])[0] > 0


def test_every_question_is_about_something_missing(conversations):
    missing = [m for talk in of(conversations, "targeted") for m in talk.was_missing]
    assert missing and all(missing)
    for talk in of(conversations, "targeted"):
        asked = [target for target in talk.targets if target is not None]
        assert len(asked) == len(set(asked))
        covered = talk.true_gaps.index(0.0) if 0.0 in talk.true_gaps else len(talk.targets)
        assert all(target is None for target in talk.targets[covered:])


def test_the_gap_of_slots_falls_when_asking_and_is_flat_otherwise(conversations):
    def mean(arm):
        return np.mean([[gap.value for gap in t.gaps] for t in of(conversations, arm)], axis=0)

    assert mean("targeted")[-1] == pytest.approx(0.5) and mean("targeted")[0] > 1.1
    assert np.ptp(mean("off")) < 0.04


def test_the_papers_gap_also_falls_when_nothing_is_learned():
    """A person who adds nothing agrees with what is known: alignment rises, and nothing was
    learned. So the paper's gap is no evidence that a gap closed; this is no error to repair."""
    settings = CperSettings(gap="cper", policy="slots", max_questions=None)
    talks = list(simulate(MOVIES, users=30, arms=("off",), settings=settings))
    gaps = np.mean([[gap.value for gap in talk.gaps] for _, talk in talks], axis=0)
    assert gaps[0] - gaps[-1] > 0.3
    assert all(talk.true_gaps[0] == talk.true_gaps[-1] for _, talk in talks)


def test_confident_guesses_are_still_asked_about():
    talks = list(simulate(MOVIES, users=40, arms=("targeted",), guess="peaked"))
    assert true_gap_table(talks)["targeted"][:, -1].mean() <= 0.05
    assert all(all(talk.was_missing) for _, talk in talks)


def test_a_change_of_mind_is_noticed():
    talks = list(simulate(MOVIES, users=20, arms=("targeted",), change=5, turns=8))
    assert true_gap_table(talks)["targeted"][:, -1].mean() <= 0.05


def test_the_same_seeds_give_the_same_conversations():
    first, second = (list(simulate(MOVIES, users=3)) for _ in range(2))
    assert first == second


def test_a_schema_without_values_is_refused():
    with pytest.raises(ConfigError, match="slot focus"):
        SimulatedUser(Schema.load("viewer"), 0)
