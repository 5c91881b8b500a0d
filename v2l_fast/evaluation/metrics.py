"""Text metrics of one answer against its reference.

Token-F1 follows SQuAD's normalization (Rajpurkar et al. 2016): lower case, no punctuation, no
articles, single spaces.
"""

from __future__ import annotations

import string
from collections import Counter

_ARTICLES = frozenset({"a", "an", "the"})
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_tokens(text: str) -> list[str]:
    """The normalized tokens of a text."""
    words = text.lower().translate(_NO_PUNCTUATION).split()
    return [word for word in words if word not in _ARTICLES]


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of token precision and recall, 0 to 1; 1 for two empty texts."""
    tokens, expected = normalize_tokens(answer), normalize_tokens(reference)
    if not tokens or not expected:
        return float(tokens == expected)
    shared = sum((Counter(tokens) & Counter(expected)).values())
    return 2 * shared / (len(tokens) + len(expected))


def exact_match(answer: str, reference: str) -> float:
    """1.0 if the normalized tokens are equal, else 0.0."""
    return float(normalize_tokens(answer) == normalize_tokens(reference))
