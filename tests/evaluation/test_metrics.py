"""Answer metrics against small independent definitions."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from v2l_fast.evaluation.metrics import exact_match, normalize_tokens, token_f1

texts = st.text(alphabet="abc the,.!A ", max_size=30)


def independent_f1(answer: str, reference: str) -> float:
    """Match tokens one by one, striking each out of the reference."""
    clean = [
        [w for w in re.sub(r"[^\w\s]|_", "", t.lower()).split() if w not in ("a", "an", "the")]
        for t in (answer, reference)
    ]
    found, left = clean[0], list(clean[1])
    if not found or not left:
        return 1.0 if found == left else 0.0
    shared = 0
    for word in found:
        if word in left:
            left.remove(word)
            shared += 1
    if shared == 0:
        return 0.0
    precision, recall = shared / len(found), shared / len(clean[1])
    return 2 * precision * recall / (precision + recall)


@given(texts, texts)
def test_token_f1_equals_striking_out(answer, reference):
    assert token_f1(answer, reference) == pytest.approx(independent_f1(answer, reference))


@given(texts, texts)
def test_token_f1_is_symmetric_and_bounded(answer, reference):
    assert token_f1(answer, reference) == pytest.approx(token_f1(reference, answer))
    assert 0 <= token_f1(answer, reference) <= 1


def test_known_values():
    assert normalize_tokens("The Red, disc!") == ["red", "disc"]
    assert token_f1("the red disc", "A red ring.") == pytest.approx(0.5)
    assert token_f1("", "") == 1.0
    assert token_f1("", "red") == 0.0
    assert token_f1("red red", "red") == pytest.approx(2 / 3)
    assert exact_match("Red.", "the red") == 1.0
    assert exact_match("red", "blue") == 0.0
