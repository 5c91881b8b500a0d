"""Intervals of analyses: questions about one video are not independent."""

from __future__ import annotations

import dataclasses
import random
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from v2l_fast.evaluation.examples import (
    EvalExample,
    exact_match,
    interval,
    normalize_tokens,
    token_f1,
)
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


# --- scores of one answer -------------------------------------------------------------------------

texts = st.text(alphabet="abc the,.!A ", max_size=30)


def independent_f1(answer: str, reference: str) -> float:
    """Match tokens one by one, striking each out of the reference."""
    clean = [
        [w for w in re.sub(r"[^\w\s]|_", "", t.lower()).split() if w not in ("a", "an", "the")]
        for t in (answer, reference)
    ]
    result, left = clean[0], list(clean[1])
    if not result or not left:
        return 1.0 if result == left else 0.0
    shared = 0
    for word in result:
        if word in left:
            left.remove(word)
            shared += 1
    if shared == 0:
        return 0.0
    precision, recall = shared / len(result), shared / len(clean[1])
    return 2 * precision * recall / (precision + recall)


@given(texts, texts)
def test_token_f1_equals_striking_out(answer, reference):
    assert token_f1(answer, reference) == pytest.approx(independent_f1(answer, reference))


@given(texts, texts)
def test_token_f1_is_symmetric_and_bounded(answer, reference):
    assert token_f1(answer, reference) == pytest.approx(token_f1(reference, answer))
    assert 0 <= token_f1(answer, reference) <= 1


def generated_text(rng: random.Random) -> str:
    """Words as answers have them: repeated, capitalized, with articles and stuck punctuation."""
    words = (
        "the a an A The red Red disc ring moves left. LEFT then, don't x-ray 12 3.5 caf\u00e9 "
        "_so_ \u201cquoted\u201d stays!? (first) \u4e2d\u6587 theme anthem"
    ).split()
    spaces = (" ", "  ", "\n", "\t", "\u00a0")
    return "".join(rng.choice(words) + rng.choice(spaces) for _ in range(rng.randrange(13)))


def squad_f1(answer: str, reference: str) -> float:
    """Token-F1 as SQuAD defines it, step by step: lower case, punctuation characters out, articles
    out as whole words, white space to single blanks; counts of each word on both sides."""

    def bag(text: str) -> dict[str, int]:
        text = "".join(c for c in text.lower() if c not in set(string.punctuation))
        text = " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
        counts: dict[str, int] = {}
        for word in text.split(" ") if text else []:
            counts[word] = counts.get(word, 0) + 1
        return counts

    result, wanted = bag(answer), bag(reference)
    if not result or not wanted:
        return float(not result and not wanted)
    common = sum(min(count, wanted.get(word, 0)) for word, count in result.items())
    if not common:
        return 0.0
    precision, recall = common / sum(result.values()), common / sum(wanted.values())
    return 2 * precision * recall / (precision + recall)


def test_token_f1_on_a_thousand_generated_pairs():
    rng = random.Random(0)
    pairs = [(generated_text(rng), generated_text(rng)) for _ in range(1000)]
    result = [token_f1(*pair) for pair in pairs]
    assert result == pytest.approx([squad_f1(*pair) for pair in pairs], abs=1e-12)
    # The pairs test something: all of nothing, everything and between occur.
    assert 0.0 in result and len({round(f, 3) for f in result}) > 40


def test_known_values():
    assert normalize_tokens("The Red, disc!") == ["red", "disc"]
    assert token_f1("the red disc", "A red ring.") == pytest.approx(0.5)
    assert token_f1("", "") == 1.0
    assert token_f1("", "red") == 0.0
    assert token_f1("red red", "red") == pytest.approx(2 / 3)
    assert exact_match("Red.", "the red") == 1.0
    assert exact_match("red", "blue") == 0.0
