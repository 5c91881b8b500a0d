"""The record and the page of simulated people."""

import json
from pathlib import Path

import pytest

from v2l_fast.conversation import CperSettings, Schema
from v2l_fast.conversation.models import NgramEncoder
from v2l_fast.conversation.simulate import simulate_shuffled
from v2l_fast.errors import ConfigError
from v2l_fast.evaluation.elicitation import calibrate, evaluate_preferences, write_page


def interval(estimate: float) -> dict[str, float]:
    return {"estimate": estimate, "low": estimate - 0.1, "high": estimate + 0.1}


VIEWERS = {
    "videos": 3,
    "arms": {
        arm: {"first question": interval(0.5), "later questions": interval(0.6),
              "questions asked": 1.0}
        for arm in ("guess", "ask", "persona", "other video")
    },
    "ask minus guess": {"first question": interval(0.1), "later questions": interval(0.2)},
    "persona minus guess": {"first question": interval(0.3), "later questions": interval(0.4)},
    "auroc of the uncertainty": {"color": 0.9, "motion": 0.5},
    "one-object videos": 2,
}  # fmt: skip


def test_the_record_goes_into_the_page(tmp_path):
    record = json.loads(json.dumps(evaluate_preferences(Schema.load("movies"), users=12)))
    variant = record["variants"]["cooperative"]
    assert variant["true gap at the end"]["targeted"]["estimate"] == 0.0
    assert variant["asked about something missing"] == 1.0
    correlation = variant["rank correlation with the true gap"]
    assert correlation["gap of slots"] > 0.95 > correlation["gap of the paper"]
    assert variant["utility"]["targeted"]["estimate"] > variant["utility"]["off"]["estimate"]
    assert variant["regret"]["targeted"] == 0.0
    asking = variant["asking when nothing is missing"]
    assert (asking["targeted"], asking["always"]) == (0.0, 1.0)
    assert variant["turns to a true gap of 0.1"]["off"] is None
    printed = record["printed gap"]
    # Only a model that obeys the number is driven by it.
    assert printed["slots"]["difference"]["estimate"] == 0.0
    page = write_page(tmp_path, record, VIEWERS).read_text()
    assert "12 people" in page and "0.200 [0.100, 0.300] on the later ones" in page


def test_shuffled_numbers_mislead_a_model_that_obeys_them():
    pairs = list(simulate_shuffled(Schema.load("movies"), users=40))
    difference = [own.utility - shuffled.utility for own, shuffled in pairs]
    assert sum(difference) > 0


def test_the_record_of_three_hundred_people_shows_what_asking_does():
    """Targeted questions close the true gap in 7 turns, nothing asked leaves it, and a random slot
    with the same budget stays above."""
    path = Path(__file__).parents[2] / "runs" / "cper-preferences.json"
    record = json.loads(path.read_text())
    variant = record["variants"]["cooperative"]
    assert record["users"] >= 300 and variant["turns"] == 7
    assert variant["true gap at the end"]["targeted"]["estimate"] <= 0.05
    off = variant["true gap by turn"]["off"]
    assert max(off) == min(off) > 0.5
    assert variant["random minus targeted"]["low"] > 0 < variant["off minus targeted"]["low"]
    off_end, random_end = (variant["true gap at the end"][arm] for arm in ("off", "random"))
    assert off_end["low"] > random_end["high"]


@pytest.mark.parametrize("rule", [{"ask_rate": 0.3}, {"question_cost": 0.05}, {"error_rate": 0.1}])
def test_a_calibrated_threshold_belongs_to_its_encoder_and_settings(tmp_path, rule):
    settings = CperSettings(candidates=3)
    movies = Schema.load("movies")
    record = calibrate(movies, NgramEncoder(), settings, users=8, **rule)
    path = tmp_path / "threshold.json"
    path.write_text(json.dumps(record))
    used = settings.with_threshold(path, NgramEncoder().fingerprint)
    assert (used.threshold, used.policy, used.gap) == (record["threshold"], "threshold", "cper")
    for other, encoder in ((settings, "minilm-0"), (CperSettings(), NgramEncoder().fingerprint)):
        with pytest.raises(ConfigError, match="calibrate again"):
            other.with_threshold(path, encoder)


def test_an_ask_rate_is_the_share_of_turns_above_the_threshold():
    gaps = {
        rate: calibrate(
            Schema.load("movies"), NgramEncoder(), CperSettings(candidates=3), users=6,
            ask_rate=rate,
        )["threshold"]
        for rate in (0.1, 0.9)
    }  # fmt: skip
    assert gaps[0.1] > gaps[0.9]


@pytest.mark.parametrize("rules", [{}, {"ask_rate": 0.1, "error_rate": 0.1}, {"ask_rate": 1.0}])
def test_one_rule_within_its_range_is_needed(rules):
    with pytest.raises(ConfigError):
        calibrate(Schema.load("movies"), NgramEncoder(), CperSettings(), users=2, **rules)


def test_the_record_of_viewers_shows_what_asking_and_knowing_do():
    """Asking beats guessing, and the persona carried over needs no question."""
    record = json.loads((Path(__file__).parents[2] / "runs" / "cper-shapes.json").read_text())
    for arm in ("ask minus guess", "persona minus guess"):
        assert all(interval["low"] > 0 for interval in record[arm].values())
    assert record["arms"]["persona"]["questions asked"] == 0
