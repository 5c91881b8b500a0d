"""The record and the page of simulated people."""

import json

from v2l_fast.conversation import Schema
from v2l_fast.evaluation.elicitation import evaluate_preferences, write_page


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
    "auroc of the uncertainty": 0.9,
    "one-object videos": 2,
}  # fmt: skip


def test_the_record_goes_into_the_page(tmp_path):
    record = json.loads(json.dumps(evaluate_preferences(Schema.load("movies"), users=12)))
    variant = record["variants"]["cooperative"]
    assert variant["true gap at the end"]["targeted"]["estimate"] == 0.0
    assert variant["asked about something missing"] == 1.0
    correlation = variant["rank correlation with the true gap"]
    assert correlation["gap of slots"] > 0.95 > correlation["gap of the paper"]
    page = write_page(tmp_path, record, VIEWERS).read_text()
    assert "12 people" in page and "0.200 [0.100, 0.300] on the later ones" in page
