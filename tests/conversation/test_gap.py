"""The gap's formulas against known answers, to 1e-12 in float64."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from v2l_fast.conversation.gap import (
    alignment,
    attention,
    best_split,
    cluster_entropy,
    knowledge_gap,
    normalized_gap,
    semantic_uncertainty,
    slot_gap,
    spectral_count,
    spectral_uncertainty,
    split_reward,
    uncertainty,
)

close = pytest.approx


def simplex(n: int) -> np.ndarray:
    """n vectors with equal angles that sum to zero."""
    return np.eye(n) - 1.0 / n


def pairwise(vectors) -> float:
    """The definition, pair by pair."""
    unit = [v / np.linalg.norm(v) for v in np.asarray(vectors, float)]
    n = len(unit)
    pairs = [1 - unit[i] @ unit[j] for i in range(n) for j in range(i)]
    return sum(pairs) * 2 / (n * (n - 1))


# --- uncertainty ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        ([(1, 0), (0, 1), (1, 0)], 2 / 3),
        ([(1, 0)] * 3 + [(0, 1)] * 2, 0.6),
        ([(3, 4)] * 5, 0.0),
        *((simplex(n), n / (n - 1)) for n in (2, 3, 5)),
    ],
)
def test_uncertainty_of_known_vectors(vectors, expected):
    assert uncertainty(list(vectors)) == close(expected, abs=1e-12)


def test_uncertainty_is_the_mean_over_pairs_whatever_order_and_length():
    vectors = np.random.default_rng(0).normal(size=(7, 5))
    expected = close(pairwise(vectors), abs=1e-12)
    assert uncertainty(list(vectors)) == expected
    assert uncertainty(list(vectors[::-1] * 3)) == expected


@pytest.mark.parametrize("candidates", [[], [(1.0, 0.0)], [(1.0, 0.0), None]])
def test_uncertainty_without_two_readings_is_one(candidates):
    assert uncertainty(candidates) == 1.0


# --- alignment ------------------------------------------------------------------------------------


def test_alignment_with_one_equal_turn_is_one():
    assert alignment((1, 0), [(1, 0)]) == close(1, abs=1e-12)


def test_alignment_attends_to_the_nearer_turn():
    history = [(1, 0), (0, 1)]
    weights = attention((1, 0), history)
    assert weights == close([0.7310585786300049, 0.2689414213699951], abs=1e-12)
    assert alignment((1, 0), history) == close(0.9385078997951388, abs=1e-12)


def test_alignment_normalizes_rows_before_attending():
    history = [(1, 0), (0, 2), (-1, 0)]
    weights = attention((3, 4), history)
    assert weights == close([0.3964168719, 0.4841846607, 0.1193984673], abs=1e-9)
    assert alignment((3, 4), history) == close(0.992343656589498, abs=1e-12)


@pytest.mark.parametrize(
    ("persona", "history", "expected"),
    [
        ((1, 0), np.empty((0, 2)), 0.0),
        (None, [(1, 0)], 0.0),
        ((1, 0), [(-1, 0)], -1.0),
        # The weighted rows cancel out: no direction is left.
        ((1, 0), [(0, 1), (0, -1)], 0.0),
    ],
)
def test_alignment_at_its_edges(persona, history, expected):
    assert alignment(persona, history) == close(expected, abs=1e-12)


# --- the gap --------------------------------------------------------------------------------------


def test_gap_of_the_authors_worked_example():
    assert knowledge_gap(0.2, 0.6) == close(0.8, abs=1e-12)


@given(*[st.floats(-2, 2)] * 4)
def test_gap_is_a_shifted_sum_of_uncertainty_and_misalignment(u, w, alpha, beta):
    expected = (1 - beta) + alpha * u + beta * (1 - w)
    assert knowledge_gap(u, w, alpha, beta) == close(expected, abs=1e-12)


def test_normalized_gap_is_zero_when_nothing_is_missing():
    assert normalized_gap(knowledge_gap(0, 1)) == close(0, abs=1e-12)
    assert normalized_gap(knowledge_gap(1, 0)) == close(1, abs=1e-12)


# --- coverage by slots ----------------------------------------------------------------------------

WEIGHTS = {"genre": 2.0, "length": 1.0}
SIZES = {"genre": 4, "length": 2}


def test_slot_gap_with_every_slot_stated():
    result = slot_gap(WEIGHTS, SIZES, ["genre", "length"], [{}] * 5)
    assert (result.gap, result.coverage, result.entropy) == (0.5, 1.0, 0.0)
    assert set(result.missing.values()) == {0.0}


def test_slot_gap_with_nothing_stated_and_uniform_readings():
    readings = [{"genre": str(i), "length": str(i % 2)} for i in range(4)]
    result = slot_gap(WEIGHTS, SIZES, [], readings)
    assert result.entropy == close(1.0, abs=1e-12) and result.coverage == 0.0
    assert result.gap == close(1.5, abs=1e-12)


def test_a_confident_guess_still_misses_the_floor():
    readings = [{"genre": "crime", "length": "short"}] * 5
    result = slot_gap(WEIGHTS, SIZES, ["length"], readings)
    assert result.missing == {"genre": 0.5, "length": 0.0}
    assert result.gap == close(1 - 0.5 / 3, abs=1e-12)


# --- entropies ------------------------------------------------------------------------------------


def test_cluster_entropy_of_known_labels():
    assert cluster_entropy([0, 1, 2, 1]) == close(1.0397207708, abs=1e-10)
    assert cluster_entropy([0, 1, 2, 1]) / math.log(4) == close(0.75, abs=1e-12)


@pytest.mark.parametrize(("share", "reward"), [(0.5, 1.0), (0.4, 0.6473), (0.25, 0.3606), (0, 0)])
def test_reward_of_a_split_is_that_of_uncertainty_of_thoughts(share, reward):
    assert split_reward(share) == close(reward, abs=5e-5)


def test_the_best_split_is_the_most_even():
    assert best_split(["a", "a", "a", "b", "b", None]) == "a"
    assert best_split(["a", "a", "a", "a", "b"]) == "a" and best_split(["a", "a"]) is None


@pytest.mark.parametrize("measure", [semantic_uncertainty, spectral_uncertainty])
def test_other_uncertainties_are_zero_for_equal_and_one_for_orthogonal_readings(measure):
    assert measure([(2, 0), (1, 0), (3, 0)]) == close(0, abs=1e-9)
    assert measure(list(np.eye(4))) == close(1, abs=1e-9)
    assert measure([(1, 0), None]) == measure([(1, 0)]) == 1.0


def test_spectral_count_of_equal_and_orthogonal_samples():
    assert spectral_count(np.ones((5, 5))) == close(1, abs=1e-12)
    assert spectral_count(np.eye(5)) == close(5, abs=1e-12)
