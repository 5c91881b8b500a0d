"""What a CPER conversation is made of: its settings and models, its state, and what a turn gives.

Data only. :mod:`v2l_fast.conversation.cper` takes a state to the next one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from v2l_fast.conversation.gap import Array
from v2l_fast.conversation.models import ChatModel, Encoder
from v2l_fast.conversation.persona import Fact, Persona
from v2l_fast.errors import ConfigError


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
        attention_temperature: of the softmax over earlier turns.
        policy: "slots" asks for the slot that is missed most, "threshold" asks above a gap, "model"
            prints the gap and lets the model decide, as in the paper; by schema when None.
        threshold, hysteresis: "threshold" asks above their sum, answers below their difference, and
            repeats the last action between. A threshold belongs to its encoder; 1.0 is MiniLM's.
        ask_cost: "slots" asks where weight times missing is at least this.
        repeat: factor on a slot for every time it was asked for.
        max_questions: limit in a conversation; None for no limit.
        window: turns of history shown to the model; None for all.
        max_selected: facts offered to a reply where the model does not choose.
        min_support: readings out of n that must agree on an inferred fact.
        video_samples: answers sampled from the video's adapter.
        video_threshold: uncertainty of these from which on a question names nothing unique.
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
    attention_temperature: float = 1.0
    policy: Literal["slots", "threshold", "model"] | None = None
    threshold: float = 1.0
    hysteresis: float = 0.05
    ask_cost: float = 0.25
    repeat: float = 0.3
    max_questions: int | None = 3
    window: int | None = 8
    max_selected: int = 8
    min_support: int = 3
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

    @classmethod
    def faithful(cls, **changes: Any) -> CperSettings:
        """The paper's loop: n + 3 requests a turn, no limits, the model decides."""
        preset = {
            "readings": "utterance", "gamma": 0.0, "gap": "cper", "policy": "model",
            "max_questions": None, "window": None, "min_support": 1,
        }  # fmt: skip
        return cls(**{**preset, **changes})


@dataclass(frozen=True)
class Models:
    """Who does what.

    Attributes:
        reasoner: reads the person, judges and writes replies.
        encoder: facts to vectors.
        answerer: knows the matter, one question at a time: the frozen VLM with a video's adapter.
            Without one the reasoner answers.
    """

    reasoner: ChatModel
    encoder: Encoder
    answerer: ChatModel | None = None


@dataclass(frozen=True)
class Turn:
    """One exchange."""

    user: str
    reply: str
    action: str
    target: str | None


@dataclass(frozen=True)
class KnowledgeGap:
    """What is not known.

    Attributes:
        value: the gap that decides; about 0.5 to 1.5.
        kind: "cper" or "slots".
        uncertainty, alignment, conflict: its parts, about the person.
        normalized: the value where 0 is "nothing is missing".
        missing: slot -> how much asking for it would tell.
        video: uncertainty of the answers about the video; None without one.
    """

    value: float
    kind: str
    uncertainty: float
    alignment: float
    conflict: float
    normalized: float
    missing: Mapping[str, float]
    video: float | None = None


@dataclass(frozen=True)
class State:
    """A conversation between two turns.

    Attributes:
        persona: what is known about the person.
        turns: all exchanges.
        vectors: for each turn the vector [d] of its facts; None for a turn without any.
        asked: slot or target -> how often it was asked for.
    """

    persona: Persona = Persona()
    turns: tuple[Turn, ...] = ()
    vectors: tuple[Array | None, ...] = ()
    asked: Mapping[str, int] = field(default_factory=dict)

    def forget(self, ids: Sequence[str]) -> State:
        """Remove facts, and the words and vectors of the turns that they come from.

        Raises:
            ConfigError: an id is unknown.
        """
        turns = {fact.turn for fact in self.persona.facts if fact.id in set(ids)}
        return replace(
            self,
            persona=self.persona.forget(ids),
            turns=tuple(
                Turn("", "", turn.action, None) if i in turns else turn
                for i, turn in enumerate(self.turns)
            ),
            vectors=tuple(None if i in turns else v for i, v in enumerate(self.vectors)),
        )


@dataclass(frozen=True)
class Reply:
    """What a turn gives.

    Attributes:
        text: the reply.
        action: "answer", "ask" or "both".
        target: slot, or words, that a question asks for.
        gap: what was not known before it.
        facts: new facts about the person.
        selected: ids of the facts that the reply was fitted to.
        feedback: the model's judgment of its draft.
        calls, prompt_tokens, new_tokens: cost.
        unreadable: requests whose replies could not be read.
        seconds: duration of the turn.
    """

    text: str
    action: str
    target: str | None
    gap: KnowledgeGap
    facts: tuple[Fact, ...]
    selected: tuple[str, ...]
    feedback: str
    calls: int
    prompt_tokens: int
    new_tokens: int
    unreadable: tuple[str, ...]
    seconds: float
