"""A turn of CPER: read the person, measure what is not known, then ask or answer.

``cper_turn`` is a function of a :class:`State`: nothing is kept outside of it. Two uncertainties
stay apart. What is not known about the person is asked for; what the model is unsure of about a
video is never asked of the person.

The preset :meth:`CperSettings.faithful` is the loop of the paper (Baskar et al., NAACL-SRW 2025):
the gap is printed to the model, which decides. The default decides by what a schema lacks, or
without a schema by a threshold on the gap.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeVar

from v2l_fast.conversation.encoders import Encoder
from v2l_fast.conversation.gap import (
    Array,
    alignment,
    knowledge_gap,
    normalized_gap,
    slot_gap,
    uncertainty,
)
from v2l_fast.conversation.models import ChatModel, Message, ModelReply
from v2l_fast.conversation.persona import Fact, Persona, Statement
from v2l_fast.conversation.prompts import (
    Feedback,
    Reading,
    describe_facts,
    describe_slots,
    read_feedback,
    read_question,
    read_reading,
    read_reply,
    read_selection,
    request,
)
from v2l_fast.conversation.schema import Schema, Slot
from v2l_fast.errors import ConfigError
from v2l_fast.replies import ReplyError

Result = TypeVar("Result")

# A slot that was asked for this often is not asked for again.
MAX_ASKS_PER_SLOT = 2
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


def cper_turn(
    state: State,
    utterance: str,
    models: Models,
    settings: CperSettings = CperSettings(),
    schema: Schema | None = None,
) -> tuple[State, Reply]:
    """One turn.

    A reply that cannot be read never ends the turn: each request has a fallback, and the reply says
    which were used.

    Args:
        state: the conversation so far; it is not changed.
        utterance: what the person says.
        schema: what to know about the person.

    Raises:
        ConfigError: the utterance is empty.
        ModelError: a model gives no reply at all.
    """
    if not utterance.strip():
        raise ConfigError("the utterance is empty")
    start = time.perf_counter()
    turn = _Turn(state, utterance.strip(), models, settings, schema)
    readings = turn.read_person()
    persona, facts, conflict = turn.update_persona(readings)
    vector, gap = turn.measure(readings, persona, conflict)
    draft, video_answers = turn.draft(readings, persona)
    if video_answers:
        gap = replace(gap, video=uncertainty(list(models.encoder.encode(video_answers))))
    action, target = turn.decide(gap, persona, facts)
    feedback = turn.judge(draft, gap, persona, action, target)
    if action is None:
        action, target = feedback.action or "answer", feedback.target
    selected = turn.select(persona, feedback)
    text = turn.write(draft, video_answers, feedback, persona, selected, action, target)
    asked = dict(state.asked)
    if action != "answer":
        asked[target or ""] = asked.get(target or "", 0) + 1
    next_state = State(
        persona,
        (*state.turns, Turn(turn.utterance, text, action, target)),
        (*state.vectors, vector),
        asked,
    )
    return next_state, Reply(
        text, action, target, gap, facts, tuple(selected), feedback.text,
        turn.calls, turn.prompt_tokens, turn.new_tokens, tuple(turn.unreadable),
        time.perf_counter() - start,
    )  # fmt: skip


class _Turn:
    """The steps of one turn and the cost of its requests."""

    def __init__(
        self,
        state: State,
        utterance: str,
        models: Models,
        settings: CperSettings,
        schema: Schema | None,
    ) -> None:
        self.state, self.utterance = state, utterance
        self.models, self.settings, self.schema = models, settings, schema
        self.number = len(state.turns)
        self.calls = self.prompt_tokens = self.new_tokens = 0
        self.unreadable: list[str] = []

    # --- requests ---------------------------------------------------------------------------------

    @property
    def history(self) -> list[dict[str, str]]:
        turns = [turn for turn in self.state.turns if turn.user]
        window = self.settings.window
        if window is not None:
            turns = turns[max(len(turns) - window, 0) :]
        return [{"person": turn.user, "assistant": turn.reply} for turn in turns]

    def complete(
        self, model: ChatModel, messages: Sequence[Message], n: int = 1, **options: Any
    ) -> list[ModelReply]:
        options = {"max_tokens": self.settings.max_tokens, **options}
        # Turns draw differently, and the same turn of an equal state draws the same.
        seed = self.settings.seed + 1000 * self.number
        replies = model.complete(messages, n=n, seed=seed, **options)
        self.calls += n
        self.prompt_tokens += sum(reply.prompt_tokens for reply in replies)
        self.new_tokens += sum(reply.new_tokens for reply in replies)
        return replies

    def ask_reasoner(
        self, name: str, data: Mapping[str, Any], read: Callable[[str], Result], fallback: Result
    ) -> Result:
        """One greedy request whose reply is corrected at most once."""
        messages = request(name, data)
        for attempt in range(2):
            (reply,) = self.complete(self.models.reasoner, messages, json=True)
            try:
                return read(reply.text)
            except ReplyError as error:
                messages = [
                    *messages,
                    {"role": "assistant", "content": reply.text[:2000]},
                    {"role": "user", "content": f"This cannot be read: {error}. Reply again."},
                ]
                # A selection or a rewritten question has a good fallback: no second request.
                if attempt or name not in ("feedback", "refine"):
                    break
        self.unreadable.append(name)
        return fallback

    # --- the person -------------------------------------------------------------------------------

    def read_person(self) -> list[Reading | None]:
        """n sampled readings, None for one that cannot be read."""
        data: dict[str, Any] = {"utterance": self.utterance}
        if self.settings.readings == "persona":
            data |= {
                "history": self.history,
                "facts": describe_facts(self.state.persona.active),
                "slots": describe_slots(self.schema),
            }
        replies = self.complete(
            self.models.reasoner, request("readings", data), self.settings.candidates,
            temperature=self.settings.temperature, top_p=self.settings.top_p, json=True,
        )  # fmt: skip
        readings: list[Reading | None] = []
        for reply in replies:
            try:
                readings.append(read_reading(reply.text))
            except ReplyError:
                readings.append(None)
                self.unreadable.append("readings")
        return readings

    def update_persona(
        self, readings: Sequence[Reading | None]
    ) -> tuple[Persona, tuple[Fact, ...], float]:
        """Facts that the first reading states, and those that enough readings infer."""
        readable = [reading for reading in readings if reading is not None]
        if not readable:
            return self.state.persona, (), 0.0
        support: dict[tuple[str, str], int] = {}
        for reading in readable:
            for key in {_key(statement) for statement in reading.statements}:
                support[key] = support.get(key, 0) + 1
        n = len(readings)
        # In the paper the first candidate's facts are the person's, guesses included.
        literal = self.settings.readings == "utterance"
        kept: dict[tuple[str, str], tuple[Statement, float]] = {}
        for index, reading in enumerate(readable):
            for statement in reading.statements:
                key, share = _key(statement), support[_key(statement)] / n
                first = index == 0 and (statement.stated or literal)
                # A guess at a slot is no fact: kept, it would come back as one in every prompt.
                guess = statement.slot is not None and not statement.stated
                agreed = support[key] >= min(self.settings.min_support, n) and not guess
                if first or (agreed and not statement.stated and not literal):
                    kept.setdefault(key, (statement, share))
        return self.state.persona.update(kept.values(), self.number, self.utterance, self.schema)

    def measure(
        self, readings: Sequence[Reading | None], persona: Persona, conflict: float
    ) -> tuple[Array | None, KnowledgeGap]:
        """The vector of this turn's facts, and the gap."""
        settings, encoder = self.settings, self.models.encoder
        texts = [_joined(s.text for s in r.statements) if r else "" for r in readings]
        current = next((text for text in texts if text), "")
        if settings.readings == "persona":
            # Guesses agree with themselves: only what the person stated is compared.
            current = _joined(fact.text for fact in persona.active if fact.source != "inferred")
        wanted = [text for text in [*texts, current] if text]
        encoded = iter(encoder.encode(wanted)) if wanted else iter(())
        vectors = [next(encoded) if text else None for text in [*texts, current]]
        vector = vectors.pop()
        readable = [v for v, r in zip(vectors, readings, strict=True) if r is not None]
        u = uncertainty(readable)
        earlier = [v for v in self.state.vectors if v is not None]
        w = alignment(vector, earlier, settings.attention_temperature) if earlier else 0.0
        kind = settings.gap or ("slots" if self.schema else "cper")
        missing: Mapping[str, float] = {}
        if self.schema is not None:
            slots = self.schema.slots
            coverage = slot_gap(
                {name: slot.weight for name, slot in slots.items()},
                {name: len(slot.values) or None for name, slot in slots.items()},
                persona.stated_slots,
                [self._values(reading) for reading in readings if reading is not None],
                settings.alpha,
                settings.beta,
            )
            missing = coverage.missing
        if kind == "slots" and self.schema is not None:
            value = coverage.gap + settings.gamma * conflict
        else:
            kind = "cper"
            value = knowledge_gap(u, w, settings.alpha, settings.beta, conflict, settings.gamma)
        normalized = normalized_gap(value, settings.alpha, settings.beta)
        return vector, KnowledgeGap(value, kind, u, w, conflict, normalized, missing)

    def _values(self, reading: Reading) -> dict[str, str]:
        """Slot -> accepted value of one reading."""
        assert self.schema is not None
        values = {}
        for statement in reading.statements:
            slot = self.schema.slots.get(statement.slot or "")
            value = None if slot is None else slot.accept(statement.value)
            if slot is not None and value is not None:
                values[slot.name] = value.casefold()
        return values

    # --- the answer -------------------------------------------------------------------------------

    def draft(self, readings: Sequence[Reading | None], persona: Persona) -> tuple[str, list[str]]:
        """The first reply, and the answers about the video that it rests on."""
        if self.models.answerer is None:
            return next((r.reply for r in readings if r is not None and r.reply), ""), []
        data = {
            "utterance": self.utterance,
            "history": self.history,
            "facts": describe_facts(persona.active),
        }
        question = self.ask_reasoner("standalone", data, read_question, self.utterance)
        messages = [{"role": "user", "content": question}]
        (greedy,) = self.complete(self.models.answerer, messages)
        sampled = self.complete(
            self.models.answerer, messages, self.settings.video_samples, temperature=0.7
        )
        return greedy.text, [reply.text for reply in sampled]

    # --- ask or answer ----------------------------------------------------------------------------

    def decide(
        self, gap: KnowledgeGap, persona: Persona, facts: Sequence[Fact]
    ) -> tuple[str | None, str | None]:
        """Action and target; (None, None) where the model decides."""
        settings = self.settings
        policy = settings.policy or ("slots" if self.schema else "threshold")
        last = self.state.turns[-1] if self.state.turns else None
        if not self._may_ask(last, facts):
            return "answer", None
        if policy == "model":
            return None, None
        if policy == "threshold" or self.schema is None:
            margin = settings.hysteresis
            if gap.value > settings.threshold + margin:
                return "ask", None
            if gap.value < settings.threshold - margin or last is None:
                return "answer", None
            return last.action, None
        target = self._target(gap, persona)
        return ("answer", None) if target is None else ("ask", target)

    def _may_ask(self, last: Turn | None, facts: Sequence[Fact]) -> bool:
        limit = self.settings.max_questions
        if limit is not None and sum(self.state.asked.values()) >= limit:
            return False
        # A question that was not answered is not followed by another one at once.
        ignored = last is not None and last.action == "ask" and not facts
        return self.settings.policy == "model" or not ignored

    def _target(self, gap: KnowledgeGap, persona: Persona) -> str | None:
        """The slot that asking for would tell most, None where none is worth a question."""
        assert self.schema is not None
        if gap.video is not None:
            # Over a video only the referent is worth a question, and only where answers differ.
            unclear = gap.video >= self.settings.video_threshold
            focus = FOCUS in self.schema.slots and persona.value(FOCUS) is None
            asked = self.state.asked.get(FOCUS, 0)
            return FOCUS if unclear and focus and asked < MAX_ASKS_PER_SLOT else None

        def worth(slot: Slot) -> float:
            asked = self.state.asked.get(slot.name, 0)
            if asked >= MAX_ASKS_PER_SLOT:
                return 0.0
            return slot.weight * gap.missing[slot.name] * self.settings.repeat**asked

        best = max(self.schema.slots.values(), key=worth)
        return best.name if worth(best) >= self.settings.ask_cost else None

    def judge(
        self,
        draft: str,
        gap: KnowledgeGap,
        persona: Persona,
        action: str | None,
        target: str | None,
    ) -> Feedback:
        """The model's judgment of the draft."""
        measured = {
            "value": round(gap.value, 2),
            "uncertainty": round(gap.uncertainty, 2),
            "alignment": round(gap.alignment, 2),
            "missing": {slot: round(share, 2) for slot, share in gap.missing.items()},
        }
        data = {
            "utterance": self.utterance,
            "history": self.history,
            "facts": describe_facts(persona.active),
            "draft": draft,
            "gap": measured,
            "action": action,
            "target": target,
        }
        return self.ask_reasoner("feedback", data, read_feedback, Feedback(suggestion=draft))

    def select(self, persona: Persona, feedback: Feedback) -> list[str]:
        """Ids of the facts that matter for this reply."""
        facts = persona.active
        if not facts:
            return []
        vectors = self.models.encoder.encode([self.utterance, *(fact.text for fact in facts)])
        nearest = (vectors[1:] @ vectors[0]).argsort(kind="stable")[::-1][:24]
        offered = [facts[i] for i in nearest]
        data = {
            "utterance": self.utterance,
            "feedback": feedback.text,
            "facts": describe_facts(offered),
        }
        ids = [fact.id for fact in offered]
        return self.ask_reasoner(
            "select",
            data,
            lambda text: read_selection(text, ids),
            ids[: self.settings.max_selected],
        )

    def write(
        self,
        draft: str,
        video_answers: Sequence[str],
        feedback: Feedback,
        persona: Persona,
        selected: Sequence[str],
        action: str,
        target: str | None,
    ) -> str:
        """The final reply."""
        slot = None if self.schema is None else self.schema.slots.get(target or "")
        data = {
            "utterance": self.utterance,
            "history": self.history,
            "facts": describe_facts([f for f in persona.active if f.id in set(selected)]),
            "draft": draft,
            "feedback": feedback.text,
            "action": action,
            "target": target,
        }
        if slot is not None:
            data["question"] = slot.question
        if video_answers:
            data["video_answers"] = [draft, *video_answers]

        def read(text: str) -> str:
            reply = read_reply(text)
            if action == "ask" and len(re.findall(r"\?", reply)) != 1:
                raise ReplyError("the text must hold exactly one question")
            return reply

        fallback = feedback.suggestion or draft or "Could you tell me more?"
        if action != "answer" and slot is not None:
            fallback = slot.question
        return self.ask_reasoner("refine", data, read, fallback)


def trace_record(reply: Reply) -> dict[str, Any]:
    """A reply as one JSON-ready record of a trace; it holds the person's facts."""
    return asdict(reply)


def _key(statement: Statement) -> tuple[str, str]:
    """What makes two statements the same: slot and value, or the words."""
    if statement.slot and statement.value:
        return statement.slot, statement.value.casefold()
    return "", " ".join(re.findall(r"\w+", statement.text.casefold()))


def _joined(texts: Any) -> str:
    return ". ".join(texts)
