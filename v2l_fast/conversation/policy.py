"""How a turn of CPER is set, and what it does: answer, ask for one thing, or both.

Two uncertainties have two remedies. What is not known about the person is asked for. What the model
is unsure of about a video is said, or looked up in the video; of the person only the referent is
asked.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from v2l_fast.conversation.persona import Persona
from v2l_fast.conversation.schema import Schema, Slot
from v2l_fast.errors import ConfigError, excerpt
from v2l_fast.files import read_json

Policy = Literal["slots", "threshold", "model", "always", "random"]
Action = Literal["answer", "ask", "both"]

# A slot that was asked for this often is not asked for again.
MAX_ASKS_PER_SLOT = 2
# The slot that says which object or person of a video is meant.
FOCUS = "focus"


@dataclass(frozen=True)
class CperSettings:
    """How a turn reads, measures and decides.

    Attributes:
        candidates: n, sampled readings of a turn.
        readings: "persona": of the person, by the history; "utterance": of the last words alone, as
            in the paper.
        temperature, top_p, max_tokens: of the readings.
        alpha, beta, gamma: weights of uncertainty, alignment and conflict in the gap.
        gap: "cper" (the paper's) or "slots" (coverage of a schema); by schema when None.
        uncertainty: "cosine" (the paper's), "semantic" or "spectral".
        attention_temperature: of the softmax over earlier turns.
        policy: "slots" asks for the slot that is missed most, "threshold" asks above a gap, "model"
            prints the gap and lets the model decide, as in the paper; by schema when None. "always"
            and "random" (a random slot whenever "slots" asks) are controls.
        threshold, hysteresis: "threshold" asks above their sum, answers below their difference, and
            repeats the last action between. A threshold belongs to its encoder; 1.0 is MiniLM's.
        ask_between: instead of these, (low, high): answer below, ask above, do both between.
        ask_cost: "slots" asks where weight times missing is at least this.
        repeat: factor on a slot for every time it was asked for.
        question: "open", or "yes_no" for the value that splits the readings best.
        max_questions: limit in a conversation; None for no limit.
        feedback, selection: whether these requests are sent.
        window: turns of history shown to the model; None for all.
        history_characters: limit of the history shown to the model; None for no limit.
        max_selected: facts offered to a reply where the model does not choose.
        min_support: readings out of n that must agree on an inferred fact.
        fact_days: days after which a fact is forgotten; None for never.
        video_samples: answers sampled from the video's adapter.
        video_threshold: uncertainty of these from which on the answer is not certain.
        seed: of every sampled reply.
    """

    candidates: int = 5
    readings: Literal["persona", "utterance"] = "persona"
    temperature: float = 0.6
    top_p: float = 0.9
    max_tokens: int = 400
    alpha: float = 0.5
    beta: float = 0.5
    gamma: float = 0.5
    gap: Literal["cper", "slots"] | None = None
    uncertainty: Literal["cosine", "semantic", "spectral"] = "cosine"
    attention_temperature: float = 1.0
    policy: Policy | None = None
    threshold: float = 1.0
    hysteresis: float = 0.05
    ask_between: tuple[float, float] | None = None
    ask_cost: float = 0.25
    repeat: float = 0.3
    question: Literal["open", "yes_no"] = "open"
    max_questions: int | None = 3
    feedback: bool = True
    selection: bool = True
    window: int | None = 8
    history_characters: int | None = 12_000
    max_selected: int = 8
    min_support: int = 3
    fact_days: float | None = None
    video_samples: int = 5
    video_threshold: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("candidates", 1), ("max_tokens", 1), ("max_selected", 0),
                            ("video_samples", 1)):  # fmt: skip
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.attention_temperature <= 0:
            raise ConfigError(
                f"attention_temperature must be positive, got {self.attention_temperature}"
            )
        if self.ask_between is not None and self.ask_between[0] > self.ask_between[1]:
            raise ConfigError(f"ask_between must be (low, high), got {self.ask_between}")

    @classmethod
    def faithful(cls, **changes: Any) -> CperSettings:
        """The paper's loop: n + 3 requests a turn, no limits, the model decides."""
        preset = {
            "readings": "utterance", "gamma": 0.0, "gap": "cper", "policy": "model",
            "max_questions": None, "window": None, "history_characters": None, "min_support": 1,
        }  # fmt: skip
        return cls(**{**preset, **changes})

    def override(self, changes: Mapping[str, str]) -> CperSettings:
        """These settings with some fields read from text, such as ``{"candidates": "3"}``.

        Raises:
            ConfigError: a field is unknown, or its text is no value of it.
        """
        known = {field.name: field for field in fields(self)}
        values: dict[str, Any] = {}
        for name, text in changes.items():
            if name not in known or name == "ask_between":
                raise ConfigError(f"unknown setting {excerpt(name)} of a conversation")
            default = known[name].default
            kind = type(default) if default is not None else _KINDS.get(name, str)
            try:
                values[name] = _BOOLS[text] if kind is bool else kind(text)
            except (KeyError, ValueError):
                raise ConfigError(f"{name}={excerpt(text)}: expected {kind.__name__}") from None
        return replace(self, **values)

    def with_threshold(self, path: str | os.PathLike, encoder: str) -> CperSettings:
        """These settings with the threshold that ``v2l cper calibrate`` wrote.

        Args:
            encoder: fingerprint of the encoder in use.

        Raises:
            ConfigError: the file is none of these, or belongs to other settings or another encoder.
        """
        record = read_json(path, error=ConfigError, kind=dict)
        threshold = record.get("threshold")
        if not isinstance(threshold, int | float) or isinstance(threshold, bool):
            raise ConfigError(f"{path}: threshold is {excerpt(threshold)}, expected a number")
        current = {"encoder": encoder, **self.calibrated_by()}
        for name, value in current.items():
            if record.get(name) != value:
                raise ConfigError(
                    f"{path}: made with {name}={excerpt(record.get(name))}, now it is {value}; "
                    "run v2l cper calibrate again"
                )
        gap = record.get("gap")
        if gap not in ("cper", "slots"):
            raise ConfigError(f"{path}: gap is {excerpt(gap)}, expected cper or slots")
        # The value between the two actions repeats the last one; a calibrated one is exact.
        return replace(
            self, threshold=float(threshold), hysteresis=0.0, policy="threshold", gap=gap
        )

    def calibrated_by(self) -> dict[str, Any]:
        """The settings that a threshold depends on."""
        names = ("candidates", "alpha", "beta", "gamma", "uncertainty", "attention_temperature")
        return {name: getattr(self, name) for name in names}


_KINDS: Mapping[str, type] = {"max_questions": int, "window": int, "history_characters": int,
                              "fact_days": float}  # fmt: skip
_BOOLS = {"true": True, "false": False}


def decide(
    settings: CperSettings,
    schema: Schema | None,
    asked: Mapping[str, int],
    gap: float,
    missing: Mapping[str, float],
    last_action: str | None,
    ignored: bool,
    turn: int,
) -> tuple[Action | None, str | None]:
    """Action and target of a turn without a video; (None, None) where the model decides.

    Args:
        asked: slot or target -> how often it was asked for.
        gap: of the person.
        missing: slot -> how much asking for it would tell.
        last_action: of the turn before; None in the first turn.
        ignored: the last turn asked, and nothing new was said about the person.
        turn: number of the turn.
    """
    policy = settings.policy or ("slots" if schema else "threshold")
    limit = settings.max_questions
    if limit is not None and sum(asked.values()) >= limit:
        return "answer", None
    if policy == "model":
        return None, None
    # A question that was not answered is not followed by another one at once.
    if ignored and policy != "always":
        return "answer", None
    target = None if schema is None else _target(settings, schema, asked, missing)
    if policy == "always":
        return "ask", target
    if policy == "threshold" or schema is None:
        low, high = settings.ask_between or (
            settings.threshold - settings.hysteresis,
            settings.threshold + settings.hysteresis,
        )
        if gap > high:
            return "ask", target
        if gap < low:
            return "answer", None
        if settings.ask_between:
            return "both", target
        again = last_action in ("ask", "both")
        return ("ask", target) if again else ("answer", None)
    if target is None:
        return "answer", None
    if policy == "random":
        return "ask", random.Random(f"{settings.seed}/{turn}").choice(list(schema.slots))
    if settings.ask_between and gap <= settings.ask_between[1]:
        return ("both", target) if gap >= settings.ask_between[0] else ("answer", None)
    return "ask", target


def decide_over_video(
    settings: CperSettings,
    schema: Schema | None,
    persona: Persona,
    asked: Mapping[str, int],
    uncertainty: float,
    ignored: bool,
) -> tuple[Action, str | None]:
    """Action and target of a turn over a video.

    Only the referent is worth a question, and only where the sampled answers differ. An answer that
    stays uncertain is the video's matter and never the person's.
    """
    unsure = uncertainty >= settings.video_threshold
    limit = settings.max_questions
    within = limit is None or sum(asked.values()) < limit
    unknown = schema is not None and FOCUS in schema.slots and persona.value(FOCUS) is None
    if unsure and unknown and within and not ignored and asked.get(FOCUS, 0) < MAX_ASKS_PER_SLOT:
        return "ask", FOCUS
    return "answer", None


def _target(
    settings: CperSettings,
    schema: Schema,
    asked: Mapping[str, int],
    missing: Mapping[str, float],
) -> str | None:
    """The slot that asking for would tell most, None where none is worth a question."""

    def worth(slot: Slot) -> float:
        count = asked.get(slot.name, 0)
        if count >= MAX_ASKS_PER_SLOT:
            return 0.0
        return slot.weight * missing[slot.name] * settings.repeat**count

    best = max(schema.slots.values(), key=worth)
    return best.name if worth(best) >= settings.ask_cost else None
