"""Simulated people with hidden preferences: does asking close the gap that is really there?

The world is a schema. A simulated user holds a hidden value for each slot, volunteers some at the
start and answers questions about the others. The true gap is the weight of the slots whose active
value is not the hidden one; it is never shown to the system. Everything is drawn from seeds.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from v2l_fast.conversation.cper import cper_turn
from v2l_fast.conversation.gap import Array
from v2l_fast.conversation.models import NgramEncoder
from v2l_fast.conversation.persona import Persona
from v2l_fast.conversation.policy import CperSettings
from v2l_fast.conversation.prompts import Guess, LexiconModel
from v2l_fast.conversation.schema import Schema
from v2l_fast.conversation.state import KnowledgeGap, Models, State
from v2l_fast.errors import ConfigError

Arm = Literal["targeted", "random", "off"]
ARMS: tuple[Arm, ...] = ("targeted", "random", "off")
_NOTHING = "I have no more to say about that."


@dataclass
class SimulatedUser:
    """A person with hidden preferences.

    Args:
        schema: slots with finite values.
        seed: of the hidden values and of every choice.
        volunteers: slots stated at the start.
        evasive: probability of not answering a question.
        change: turn at which the first slot's value changes, without notice until it is stated in
            that turn; None for never.
    """

    schema: Schema
    seed: int
    volunteers: int = 1
    evasive: float = 0.0
    change: int | None = None
    hidden: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self.hidden = {}
        for name, slot in self.schema.slots.items():
            if not slot.values:
                raise ConfigError(f"slot {name}: a simulated user needs values to choose from")
            self.hidden[name] = self._random.choice(slot.values)

    def speak(self, turn: int, target: str | None) -> str:
        """What the person says in a turn, after a question about ``target``."""
        names = list(self.hidden)
        if turn == 0:
            chosen = self._random.sample(names, min(self.volunteers, len(names)))
            return "Hello! " + " ".join(self._state(name) for name in chosen)
        if turn == self.change:
            name = names[0]
            others = [v for v in self.schema.slots[name].values if v != self.hidden[name]]
            self.hidden[name] = self._random.choice(others)
            return "I changed my mind. " + self._state(name)
        if target in self.hidden and self._random.random() >= self.evasive:
            return self._state(target)
        return _NOTHING

    def _state(self, name: str) -> str:
        return f"For {name.replace('_', ' ')}, make it {self.hidden[name]}."

    def true_gap(self, persona: Persona) -> float:
        """Weight of the slots whose active value is not the hidden one, 0 to 1."""
        slots = self.schema.slots
        missed = sum(
            slot.weight for name, slot in slots.items() if persona.value(name) != self.hidden[name]
        )
        return missed / sum(slot.weight for slot in slots.values())


@dataclass(frozen=True)
class Conversation:
    """A simulated conversation, one entry for each turn.

    Attributes:
        true_gaps: after the turn.
        gaps: as the system measured them.
        targets: slot asked for, None where the system answered.
        was_missing: for each question, whether the person had not stated that slot.
    """

    true_gaps: tuple[float, ...]
    gaps: tuple[KnowledgeGap, ...]
    targets: tuple[str | None, ...]
    was_missing: tuple[bool, ...]


def converse(
    user: SimulatedUser,
    arm: Arm,
    turns: int = 7,
    settings: CperSettings | None = None,
    guess: Guess = "uniform",
) -> Conversation:
    """One conversation.

    Args:
        settings: without a limit on questions when None, so that the budget is the turns.
        arm: "targeted" asks as the system decides; "random" asks as often, for a random slot;
            "off" asks nothing and learns only what is volunteered.
    """
    models = Models(LexiconModel(guess), NgramEncoder())
    settings = replace(settings or CperSettings(max_questions=None), seed=user.seed)
    if arm == "off":
        settings = replace(settings, max_questions=0)
    rng = random.Random(user.seed + 1)
    state, target = State(), None
    true_gaps, gaps, targets, was_missing = [], [], [], []
    for turn in range(turns):
        utterance = user.speak(turn, target)
        state, reply = cper_turn(state, utterance, models, settings, user.schema)
        target = reply.target if reply.action == "ask" else None
        if arm == "random" and target is not None:
            target = rng.choice(list(user.schema.slots))
        true_gaps.append(user.true_gap(state.persona))
        gaps.append(reply.gap)
        targets.append(target)
        if target is not None:
            was_missing.append(target not in state.persona.stated_slots)
    return Conversation(tuple(true_gaps), tuple(gaps), tuple(targets), tuple(was_missing))


def simulate(
    schema: Schema,
    users: int,
    arms: tuple[Arm, ...] = ARMS,
    turns: int = 7,
    settings: CperSettings | None = None,
    guess: Guess = "uniform",
    seed: int = 0,
    evasive: float = 0.0,
    change: int | None = None,
) -> Iterator[tuple[Arm, Conversation]]:
    """Conversations with the same users in every arm.

    Args:
        settings: see :func:`converse`.

    Yields:
        (arm, conversation), user by user.
    """
    for number in range(users):
        for arm in arms:
            user = SimulatedUser(schema, seed + number, evasive=evasive, change=change)
            yield arm, converse(user, arm, turns, settings, guess)


def true_gap_table(conversations: list[tuple[Arm, Conversation]]) -> dict[Arm, Array]:
    """Arm -> true gaps [users, turns]."""
    arms = dict.fromkeys(arm for arm, _ in conversations)
    return {
        arm: np.asarray([talk.true_gaps for own, talk in conversations if own == arm])
        for arm in arms
    }
