"""What a judge is asked, and reading what it replies.

Responsible for wording and for the one JSON object a reply must hold. How replies are fetched,
retried and kept is `judge`'s.

The rules are those of the paper's Appendix A in our words: captions are judged by what they cover
of the reference, extra details cost nothing unless they contradict it; of an answer to a question
the judge first extracts what it says, so that verbosity costs nothing. The scale is the 1 to 5 of
the paper's Section 4.3 (its Appendix A lists a 0 besides; what that describes is our 1).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Part of every cache key: change it with any wording below.
VERSION = 1
LOWEST, HIGHEST = 1, 5

_CAPTION_RULES = """\
You compare a candidate description of a video with a reference description of the same video. \
Judge one thing only: how much of what the reference states the candidate states too, for the task \
that was given.
- Style, length, fluency and format do not matter, unless the candidate cannot be understood.
- Details that the reference does not mention are not errors. They count against the candidate \
only where they contradict the reference, that is, where both cannot be true.
- The same fact in other words is the same fact.
Scores: 5 = states everything the reference states; 4 = most of it; 3 = about half of it; \
2 = little of it; 1 = next to nothing, another event, a contradiction of the main event, or not a \
description at all."""

_QA_RULES = """\
You check an answer to a question about a video against a reference answer. First extract what the \
candidate answers to the question, then compare that with the reference.
- A long reply is right when it contains or clearly implies the right answer. Extra details do not \
matter.
- Other words for the same answer are right. For a yes/no reference, infer yes or no from what the \
candidate says.
- A candidate that describes the scene without answering what was asked (the attribute, action, \
place or number) scores 2 at most.
Scores: 5 = right; 4 = right but less specific than the reference; 3 = partly right; 2 = related, \
but does not answer the question; 1 = wrong, a contradiction, or not an answer at all."""

_ONE = "\n\nReply with one JSON object and nothing else: "
_CAPTION_FIELDS = '{"covered": [facts], "missing": [facts], "contradictions": [facts], "score": N}'
_QA_FIELDS = '{"extracted_answer": text, "rationale": one sentence, "score": N}'
_PAIR_FIELDS = '{"rationale": one sentence, "score_a": N, "score_b": N, "preferred": "A", "B" or '
_PAIR_FIELDS += '"tie"}'
_NUMBER = f", N being a whole number from {LOWEST} to {HIGHEST}."

CORRECTION = (
    "That is not the one JSON object that was asked for, or its score is not a whole number from "
    f"{LOWEST} to {HIGHEST}. Reply with the JSON object alone."
)

Messages = list[dict[str, str]]


class ReplyError(Exception):
    """A reply holds no valid judgment; `kind` is "malformed" or "out of range"."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


@dataclass(frozen=True)
class JudgeTask:
    """What was asked and what is right. `is_caption` chooses the rules."""

    prompt: str
    reference: str
    is_caption: bool


def single_messages(task: JudgeTask, candidate: str) -> Messages:
    """Judge one candidate against the reference."""
    fields = _CAPTION_FIELDS if task.is_caption else _QA_FIELDS
    return [
        {"role": "system", "content": _rules(task) + _ONE + fields + _NUMBER},
        {"role": "user", "content": f"{_given(task)}\n\nCandidate:\n{candidate}"},
    ]


def pair_messages(task: JudgeTask, first: str, second: str) -> Messages:
    """Judge two candidates side by side; they are named A and B and nothing else."""
    pair = "\n\nThere are two candidates, A and B. Score each by itself, then say which is better."
    return [
        {"role": "system", "content": _rules(task) + pair + _ONE + _PAIR_FIELDS + _NUMBER},
        {
            "role": "user",
            "content": f"{_given(task)}\n\nCandidate A:\n{first}\n\nCandidate B:\n{second}",
        },
    ]


def _rules(task: JudgeTask) -> str:
    return _CAPTION_RULES if task.is_caption else _QA_RULES


def _given(task: JudgeTask) -> str:
    asked = "JudgeTask" if task.is_caption else "Question"
    return f"{asked}:\n{task.prompt}\n\nReference:\n{task.reference}"


def single_verdict(reply: str) -> dict[str, Any]:
    """{"score": 1 to 5} and what the judge said besides. Raises ReplyError."""
    found = _json_object(reply, "score")
    return {**found, "score": _scale(found, "score")}


def pair_verdict(reply: str) -> dict[str, Any]:
    """{"score_a", "score_b": 1 to 5, "preferred": "A", "B" or "tie"}. Raises ReplyError."""
    found = _json_object(reply, "preferred")
    preferred = str(found.get("preferred", "")).strip().upper()
    if preferred not in ("A", "B", "TIE"):
        raise ReplyError("malformed", f"'preferred' is {found.get('preferred')!r}")
    return {
        **found,
        "score_a": _scale(found, "score_a"),
        "score_b": _scale(found, "score_b"),
        "preferred": "tie" if preferred == "TIE" else preferred,
    }


def rescaled(score: int) -> float:
    """1 to 5 onto 0 to 1 (Section 4.3)."""
    return (score - LOWEST) / (HIGHEST - LOWEST)


def _scale(found: Mapping[str, Any], name: str) -> int:
    value = found.get(name)
    if isinstance(value, str):
        # "4" and "4/5" say what is meant.
        match = re.fullmatch(rf"\s*(-?\d+(?:\.\d+)?)\s*(?:/\s*{HIGHEST})?\s*", value)
        value = float(match.group(1)) if match else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ReplyError("malformed", f"{name!r} is {value!r}")
    if value not in range(LOWEST, HIGHEST + 1):
        raise ReplyError("out of range", f"{name!r} is {value!r}")
    return int(value)


# --- repair ---------------------------------------------------------------------------------------

# The last kind was cut off: a score in it is a draft.
_THOUGHTS = re.compile(r"<think>.*?</think>|^.*?</think>|^\s*<think>.*", re.DOTALL)
_TRAILING_COMMA = re.compile(r",(\s*[}\]])")
_FIELD = re.compile(r'"(score|score_a|score_b|preferred)"\s*:\s*("?[\w./-]+"?)\s*[,}\n]')


def _json_object(reply: str, needed: str) -> dict[str, Any]:
    """The first JSON object with the field `needed`, mended where it is only slightly wrong.

    Thoughts, code fences and prose around it are skipped; trailing commas, single quotes and
    Python constants are read as meant. Of a reply that was cut off, complete scores are kept.
    """
    text = _THOUGHTS.sub("", reply)
    for start in (m.start() for m in re.finditer(r"\{", text)):
        found = _object_at(text, start)
        if found is not None and needed in found:
            return found
    fields = {name: value.strip('"') for name, value in _FIELD.findall(text)}
    if needed in fields:
        return fields
    raise ReplyError("malformed", f"no JSON object with {needed!r} in {reply[:80]!r}")


def _object_at(text: str, start: int) -> dict[str, Any] | None:
    try:
        found, _ = json.JSONDecoder().raw_decode(text, start)
        return found if isinstance(found, dict) else None
    except (ValueError, RecursionError):
        pass
    end = text.rfind("}") + 1
    mended = _TRAILING_COMMA.sub(r"\1", text[start:end])
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(mended)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, dict):
            return found
    return None
