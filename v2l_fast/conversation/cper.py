"""A turn of CPER: read the person, measure what is not known, then ask or answer.

``cper_turn`` is a function of a ``State``: nothing is kept outside of it. Two uncertainties
stay apart. What is not known about the person is asked for; what the model is unsure of about a
video is never asked of the person.

The preset ``CperSettings.faithful`` is the loop of the paper (Baskar et al., NAACL-SRW 2025):
the gap is printed to the model, which decides. The default decides by what a schema lacks, or
without a schema by a threshold on the gap.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

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
from v2l_fast.conversation.state import (
    CperSettings,
    KnowledgeGap,
    Models,
    Reply,
    State,
    Turn,
)
from v2l_fast.errors import ConfigError
from v2l_fast.replies import ReplyError

Result = TypeVar("Result")

# A slot that was asked for this often is not asked for again.
MAX_ASKS_PER_SLOT = 2
FOCUS = "focus"


_DEFAULTS = CperSettings()


def cper_turn(
    state: State,
    utterance: str,
    models: Models,
    settings: CperSettings = _DEFAULTS,
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


def _key(statement: Statement) -> tuple[str, str]:
    """What makes two statements the same: slot and value, or the words."""
    if statement.slot and statement.value:
        return statement.slot, statement.value.casefold()
    return "", " ".join(re.findall(r"\w+", statement.text.casefold()))


def _joined(texts: Iterable[str]) -> str:
    return ". ".join(texts)
