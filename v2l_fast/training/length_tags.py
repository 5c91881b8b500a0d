"""How long an answer is wanted, said in the prompt: the same words in training and afterwards.

A hypernetwork trained on answers of one length gives that length to every question. Tagged prompts
let training mix lengths and let a user ask for one: ``model.ask(with_length(question, "short"),
adapter)``.
"""

from __future__ import annotations

from v2l_fast.errors import ConfigError

# Class -> most answer tokens, the stop token not counted.
LENGTHS = {"short": 16, "medium": 64, "long": None}


def length_class(tokens: int) -> str:
    """Which class an answer of so many tokens is."""
    return next(name for name, most in LENGTHS.items() if most is None or tokens <= most)


def with_length(prompt: str, length: str) -> str:
    """The prompt with its wish for a "short", "medium" or "long" answer.

    Raises:
        ConfigError: another length.
    """
    if length not in LENGTHS:
        raise ConfigError(f"length {length!r}: use one of {', '.join(LENGTHS)}")
    return f"{prompt} ({length} answer)"
