"""Settings of a CPER turn, and the decision to answer, to ask for one thing, or to do both.

Two kinds of uncertainty have two remedies. The conversation asks for what it does not know about
the person. It states what it is not sure of about a video, or looks at the video again; about a
video it asks the person only which object they mean.
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

# Maximum number of questions about one slot.
MAX_ASKS_PER_SLOT = 2
# The slot that says which object or person of a video is meant.
FOCUS = "focus"


@dataclass(frozen=True)
class CperSettings:
    """Settings of how a turn reads the person, measures the gap and decides.

    Attributes:
        candidates: number n of readings that are sampled in a turn.
        readings: "persona" reads the person from the whole history; "utterance" reads the last
            utterance alone, as in the paper.
        temperature, top_p, max_tokens: sampling parameters of the readings.
        alpha, beta, gamma: weights of uncertainty, alignment and conflict in the gap.
        gap: "cper" (the paper's) or "slots" (coverage of a schema); by schema when None.
        uncertainty: "cosine" (the paper's), "semantic" or "spectral".
        attention_temperature: of the softmax over earlier turns.
        policy: "slots" asks for the slot that is missed most, "threshold" asks above a gap, "model"
            prints the gap and lets the model decide, as in the paper; by schema when None. "always"
            and "random" (a random slot whenever "slots" asks) are controls.
        threshold, hysteresis: "threshold" asks above their sum, answers below their difference, and
            repeats the last action in between. A threshold belongs to its encoder; 1.0 is MiniLM's.
        ask_between: (low, high), which replaces them: answer below, ask above, do both in between.
        ask_cost: "slots" asks if weight times missing is at least this.
        repeat: factor on a slot's worth for every earlier question about it.
        question: "open", or "yes_no" for the value that splits the readings best.
        max_questions: limit in a conversation; None for no limit.
        feedback, selection: whether these requests are sent.
        window: turns of history shown to the model; None for all.
        history_characters: limit of the history shown to the model; None for no limit.
        max_selected: maximum number of facts of a reply if the model does not select them.
        min_support: readings out of n that must agree on an inferred fact.
        fact_days: days after which a fact is forgotten; None for never.
        video_samples: answers sampled from the video's adapter.
        video_threshold: uncertainty of these answers from which on the answer is not certain.
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
            ConfigError: a field is unknown, or its text is not a value of its type.
        """
        by_name = {field.name: field for field in fields(self)}
        values: dict[str, Any] = {}
        for name, text in changes.items():
            if name not in by_name or name == "ask_between":
                raise ConfigError(f"unknown setting {excerpt(name)} of a conversation")
            default = by_name[name].default
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
            ConfigError: the file is not such a record, or is for other settings or another encoder.
        """
        record = read_json(path, error=ConfigError, kind=dict)
        threshold = record.get("threshold")
        if not isinstance(threshold, int | float) or isinstance(threshold, bool):
            raise ConfigError(f"{path}: threshold must be a number, got {excerpt(threshold)}")
        current = {"encoder": encoder, **self.calibrated_by()}
        for name, value in current.items():
            if record.get(name) != value:
                raise ConfigError(
                    f"{path}: made with {name}={excerpt(record.get(name))}, now it is {value}; "
                    "run v2l cper calibrate again"
                )
        gap = record.get("gap")
        if gap not in ("cper", "slots"):
            raise ConfigError(f"{path}: gap must be cper or slots, got {excerpt(gap)}")
        # A calibrated threshold is exact: no range around it repeats the last action.
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
    """Action and target of a turn without a video; (None, None) if the model decides.

    Args:
        asked: slot or target -> number of questions about it.
        gap: the knowledge gap about the person.
        missing: slot -> how informative a question about it would be.
        last_action: action of the previous turn; None in the first turn.
        ignored: whether the previous turn asked and the person said nothing new.
        turn: number of the turn.
    """
    policy = settings.policy or ("slots" if schema else "threshold")
    limit = settings.max_questions
    if limit is not None and sum(asked.values()) >= limit:
        return "answer", None
    if policy == "model":
        return None, None
    # Do not ask again in the turn after a question that the person did not answer.
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

    The only question worth asking is which object the person means, and only if the sampled answers
    differ. The person is never asked about the content of the video.
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
    """The slot whose question is worth most; None if no question is worth its cost."""

    def worth(slot: Slot) -> float:
        count = asked.get(slot.name, 0)
        if count >= MAX_ASKS_PER_SLOT:
            return 0.0
        return slot.weight * missing[slot.name] * settings.repeat**count

    best = max(schema.slots.values(), key=worth)
    return best.name if worth(best) >= settings.ask_cost else None
