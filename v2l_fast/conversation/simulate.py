"""Simulated people with hidden preferences, to measure whether asking closes the true gap.

The world is a schema. A simulated user holds a hidden value for each slot, volunteers some at the
start and answers questions about the others. The true gap is the weight of the slots whose active
value is not the hidden one; the system never sees it. All random choices come from seeds.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from v2l_fast.conversation.cper import cper_turn
from v2l_fast.conversation.models import Encoder, NgramEncoder
from v2l_fast.conversation.persona import Persona
from v2l_fast.conversation.policy import CperSettings, Policy
from v2l_fast.conversation.prompts import Guess, LexiconModel
from v2l_fast.conversation.schema import Schema
from v2l_fast.conversation.state import KnowledgeGap, Models, State
from v2l_fast.errors import ConfigError

Arm = Literal["targeted", "random", "off", "always", "model"]
# The others are controls of "targeted". "model" follows the gap that is printed to it.
ARMS: tuple[Arm, ...] = ("targeted", "random", "off", "always")
# Number of items of which one is recommended at the end.
ITEMS = 200
# Above this gap the arm "model" asks: while any slot of an average schema is missing.
_ASK_ABOVE = 0.55
_NOTHING = "I have no more to say about that."


@dataclass
class SimulatedUser:
    """A person with hidden preferences.

    Args:
        schema: slots with finite values.
        seed: seed of the hidden values and of every choice.
        volunteers: number of slots stated at the start.
        evasive: probability of not answering a question.
        change: turn in which the first slot's value changes and the person says so; None for never.
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
        """The person's utterance in a turn, after a question about ``target``."""
        names = list(self.hidden)
        if turn == 0:
            stated = self._random.sample(names, min(self.volunteers, len(names)))
            return "Hello! " + " ".join(self._state(name) for name in stated)
        if turn == self.change:
            name = names[0]
            values = [v for v in self.schema.slots[name].values if v != self.hidden[name]]
            self.hidden[name] = self._random.choice(values)
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
        true_gaps: true gaps after the turns.
        gaps: gaps that the system measured.
        targets: slot that the system asked for, "" for none in particular, None if it answered.
        was_missing: for each question, whether the person had not stated that slot.
        utility: share of the person's wishes, by weight, that the recommended item fulfills.
        regret: utility of the best item minus that of the recommended one.
        true_facts: share of the active facts that are true of the person.
    """

    true_gaps: tuple[float, ...]
    gaps: tuple[KnowledgeGap, ...]
    targets: tuple[str | None, ...]
    was_missing: tuple[bool, ...]
    utility: float
    regret: float
    true_facts: float


def items(schema: Schema, seed: int = 0, count: int = ITEMS) -> list[dict[str, str]]:
    """Random items to recommend, each slot -> value."""
    rng = random.Random(f"items/{seed}")
    return [
        {name: rng.choice(slot.values) for name, slot in schema.slots.items()} for _ in range(count)
    ]


def recommend(
    schema: Schema, persona: Persona, hidden: Mapping[str, str], offered: list[dict[str, str]]
) -> tuple[float, float]:
    """Utility and regret of the item that fits the persona best."""
    total = sum(slot.weight for slot in schema.slots.values())

    def worth(item: Mapping[str, str], wishes: Mapping[str, str | None]) -> float:
        slots = schema.slots.items()
        return sum(slot.weight for name, slot in slots if item[name] == wishes[name]) / total

    values = {name: persona.value(name) for name in schema.slots}
    utility = worth(max(offered, key=lambda item: worth(item, values)), hidden)
    return utility, max(worth(item, hidden) for item in offered) - utility


def converse(
    user: SimulatedUser,
    arm: Arm,
    turns: int = 7,
    settings: CperSettings | None = None,
    guess: Guess = "uniform",
    encoder: Encoder | None = None,
    printed: Sequence[float] | None = None,
) -> Conversation:
    """Simulate one conversation.

    Args:
        settings: None sets no limit on questions, so that the number of turns is the budget.
        arm: "targeted" asks as the system decides; "random" asks as often, for a random slot;
            "off" asks nothing and learns only what the person volunteers; "always" asks in every
            turn; "model" lets the model decide by the gap that is printed to it.
        encoder: None uses n-grams.
        printed: numbers to print in place of the gaps, one per turn.
    """
    models = Models(LexiconModel(guess, _ASK_ABOVE), encoder or NgramEncoder())
    settings = replace(settings or CperSettings(max_questions=None), seed=user.seed)
    if arm == "off":
        settings = replace(settings, max_questions=0)
    elif arm in ("always", "model"):
        settings = replace(settings, policy=arm)
    rng = random.Random(user.seed + 1)
    state, target = State(), None
    true_gaps, gaps, targets, was_missing = [], [], [], []
    for turn in range(turns):
        utterance = user.speak(turn, target)
        state, reply = cper_turn(
            state, utterance, models, settings, user.schema,
            printed_gap=None if printed is None else printed[turn],
        )  # fmt: skip
        # A question may be about nothing in particular.
        target = None if reply.action == "answer" else reply.target or ""
        if arm == "random" and target is not None:
            target = rng.choice(list(user.schema.slots))
        true_gaps.append(user.true_gap(state.persona))
        gaps.append(reply.gap)
        targets.append(target)
        if target is not None:
            missing = target in user.hidden and target not in state.persona.stated_slots
            was_missing.append(missing)
    active = [fact for fact in state.persona.active if fact.slot is not None]
    true = [user.hidden[fact.slot or ""] == fact.value for fact in active]
    utility, regret = recommend(
        user.schema, state.persona, user.hidden, items(user.schema, user.seed)
    )
    return Conversation(
        tuple(true_gaps), tuple(gaps), tuple(targets), tuple(was_missing), utility, regret,
        sum(true) / len(true) if true else 1.0,
    )  # fmt: skip


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
    encoder: Encoder | None = None,
    volunteers: int | None = 1,
) -> Iterator[tuple[Arm, Conversation]]:
    """Simulate conversations with the same users in every arm.

    Args:
        settings, encoder: see :func:`converse`.
        volunteers: number of slots that each person states at the start; None varies it.

    Yields:
        (arm, conversation), user by user.
    """
    for number in range(users):
        for arm in arms:
            user = _user(schema, seed + number, volunteers, evasive, change)
            yield arm, converse(user, arm, turns, settings, guess, encoder)


def simulate_shuffled(
    schema: Schema, users: int, turns: int = 7, seed: int = 0, policy: Policy = "model"
) -> Iterator[tuple[Conversation, Conversation]]:
    """Simulate pairs of conversations with the same person. In the second, gaps of other turns and
    people are printed, which shows whether the printed gap has an effect.

    Args:
        policy: "model" follows the printed gap; other policies only print it.
    """
    settings = CperSettings(max_questions=None, policy=policy)
    arm: Arm = "model" if policy == "model" else "targeted"
    own = [converse(_user(schema, seed + i, None), arm, turns, settings) for i in range(users)]
    pool = [gap.value for talk in own for gap in talk.gaps]
    random.Random(f"shuffled/{seed}").shuffle(pool)
    for i, talk in enumerate(own):
        printed = pool[i * turns : (i + 1) * turns]
        user = _user(schema, seed + i, None)
        yield talk, converse(user, arm, turns, settings, printed=printed)


def _user(
    schema: Schema,
    seed: int,
    volunteers: int | None,
    evasive: float = 0.0,
    change: int | None = None,
) -> SimulatedUser:
    count = seed % (len(schema.slots) + 1) if volunteers is None else volunteers
    return SimulatedUser(schema, seed, count, evasive, change)
