"""Scores of answers about shapes videos, one number a video or question.

Attribute accuracy stands beside token-F1 because template captions share most words: a caption of
another video still reaches a token-F1 near 0.6.
"""

from __future__ import annotations

from v2l_fast.shapes.language import attributes, parse_caption
from v2l_fast.shapes.scene import Scene


def attribute_hits(text: str, scene: Scene) -> tuple[int, int]:
    """(attributes of the scene that the caption states rightly, attributes of the scene)."""
    wanted, stated = attributes(scene), parse_caption(text)
    return sum(stated.get(slot) == value for slot, value in wanted.items()), len(wanted)


def plain(text: str) -> str:
    """Lower-case words without punctuation: what an exact match compares."""
    kept = "".join(c if c.isalnum() or c.isspace() else " " for c in text.lower())
    return " ".join(kept.split())
