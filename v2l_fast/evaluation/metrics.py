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
    """Tokens that metrics compare."""
    words = text.lower().translate(_NO_PUNCTUATION).split()
    return [word for word in words if word not in _ARTICLES]


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of token precision and recall, 0 to 1; two empty texts agree (1)."""
    found, wanted = normalize_tokens(answer), normalize_tokens(reference)
    if not found or not wanted:
        return float(found == wanted)
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted))


def exact_match(answer: str, reference: str) -> float:
    """1.0 when the normalized tokens are equal, else 0.0."""
    return float(normalize_tokens(answer) == normalize_tokens(reference))
