"""A turn of CPER: read the person, measure what is not known, then ask or answer.

``cper_turn`` is a function of a ``State``; nothing is kept outside of it. Two kinds of uncertainty
stay apart: the conversation asks the person for what it does not know about them, and never for
what it is not sure of about a video.

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
    UNCERTAINTIES,
    Array,
    alignment,
    best_split,
    knowledge_gap,
    normalized_gap,
    slot_gap,
)
from v2l_fast.conversation.models import ChatModel, Message, ModelReply
from v2l_fast.conversation.persona import Fact, Persona, Statement
from v2l_fast.conversation.policy import CperSettings, decide, decide_over_video
from v2l_fast.conversation.prompts import (
    Feedback,
    Reading,
    ReplyError,
    content_words,
    correction,
    describe_facts,
    describe_slots,
    read_feedback,
    read_question,
    read_reading,
    read_reply,
    read_selection,
    request,
    states_answer,
)
from v2l_fast.conversation.schema import Schema, Slot
from v2l_fast.conversation.state import (
    KnowledgeGap,
    Models,
    Reply,
    State,
    Turn,
    VideoAnswer,
)
from v2l_fast.errors import ConfigError

Result = TypeVar("Result")

# Earlier turns that a conversation with a window keeps.
MAX_TURNS = 64
_DAY = 86_400.0
_DEFAULTS = CperSettings()
_NO_GAP = KnowledgeGap(0.0, "none", 0.0, 0.0, 0.0, 0.0, {})


def cper_turn(
    state: State,
    utterance: str,
    models: Models,
    settings: CperSettings = _DEFAULTS,
    schema: Schema | None = None,
    *,
    on_utterance: Callable[[str], str | None] | None = None,
    printed_gap: float | None = None,
) -> tuple[State, Reply]:
    """One turn.

    A model's reply that cannot be read never ends the turn: each request has a fallback, and
    ``unreadable`` of the result names the requests that used it.

    Args:
        state: the conversation so far; it is not changed.
        utterance: what the person says.
        schema: the slots to know about the person.
        on_utterance: called first with the utterance. If it returns a text, this is the reply, no
            request is sent, and the conversation asks no further question. Use it to react to
            distress, which this software does not recognize.
        printed_gap: the number printed to the model in place of the gap; an ablation.

    Raises:
        ConfigError: the utterance is empty.
        ModelError: a model does not reply.
    """
    if not utterance.strip():
        raise ConfigError("the utterance is empty")
    start = time.perf_counter()
    if expired := state.persona.expired():
        state = state.forget(expired)
    turn = _Turn(state, utterance.strip(), models, settings, schema)
    if on_utterance is not None and (text := on_utterance(turn.utterance)) is not None:
        stopped = replace(turn.next_state(state.persona, text, "answer", None, None), stopped=True)
        return stopped, Reply(text, "answer", None, _NO_GAP)
    readings = turn.read_person()
    persona, facts, conflict = turn.update_persona(readings)
    vector, gap = turn.measure(readings, persona, conflict)
    draft, video, samples = turn.draft(readings, persona)
    action, target = turn.decide(gap, persona, facts, video)
    if video is not None:
        gap = replace(gap, video=video.uncertainty)
        video, draft = turn.resolve(video, action, draft)
    feedback = turn.judge(draft, gap, persona, action, target, printed_gap)
    if action is None:
        action, target = feedback.action or "answer", feedback.target
    selected = turn.select(persona, feedback)
    text = turn.write(draft, video, samples, feedback, persona, selected, action, target, readings)
    return turn.next_state(persona, text, action, target, vector), Reply(
        text, action, target, gap, facts, tuple(selected), feedback.text, video,
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
        self.number = state.number
        self.calls = self.prompt_tokens = self.new_tokens = 0
        self.unreadable: list[str] = []

    # --- requests ---------------------------------------------------------------------------------

    @property
    def history(self) -> list[dict[str, str]]:
        """The last exchanges that fit into the window and the limit of characters."""
        settings, room = self.settings, self.settings.history_characters
        exchanges: list[dict[str, str]] = []
        for turn in reversed([turn for turn in self.state.turns if turn.user]):
            if settings.window is not None and len(exchanges) >= settings.window:
                break
            if room is not None:
                room -= len(turn.user) + len(turn.reply)
                if room < 0:
                    break
            exchanges.append({"person": turn.user, "assistant": turn.reply})
        return exchanges[::-1]

    def next_state(
        self, persona: Persona, text: str, action: str, target: str | None, vector: Array | None
    ) -> State:
        state, asked = self.state, dict(self.state.asked)
        if action != "answer":
            asked[target or ""] = asked.get(target or "", 0) + 1
        turns = (*state.turns, Turn(self.utterance, text, action, target))
        vectors = (*state.vectors, vector)
        if self.settings.window is not None:
            count = max(MAX_TURNS, self.settings.window)
            turns, vectors = turns[-count:], vectors[-count:]
        return replace(
            state, persona=persona, turns=turns, vectors=vectors, asked=asked,
            number=state.number + 1,
        )  # fmt: skip

    def complete(
        self, model: ChatModel, messages: Sequence[Message], n: int = 1, **options: Any
    ) -> list[ModelReply]:
        options = {"max_tokens": self.settings.max_tokens, **options}
        # Turns differ in their seeds; the same turn of an equal state uses the same one.
        seed = self.settings.seed + 1000 * self.number
        replies = model.complete(messages, n=n, seed=seed, **options)
        self.calls += n
        self.prompt_tokens += sum(reply.prompt_tokens for reply in replies)
        self.new_tokens += sum(reply.new_tokens for reply in replies)
        return replies

    def ask_reasoner(
        self, name: str, data: Mapping[str, Any], read: Callable[[str], Result], fallback: Result
    ) -> Result:
        """Send a greedy request; if its reply cannot be read, request a correction once."""
        messages = request(name, data)
        for attempt in range(2):
            (reply,) = self.complete(self.models.reasoner, messages, json=True)
            try:
                return read(reply.text)
            except ReplyError as error:
                messages = correction(messages, reply.text, error)
                # A selection or a rewritten question has a good fallback: no second request.
                if attempt or name not in ("feedback", "refine"):
                    break
        self.unreadable.append(name)
        return fallback

    # --- the person -------------------------------------------------------------------------------

    def read_person(self) -> list[Reading | None]:
        """Sample n readings of the person; None for one that cannot be read."""
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
        """Add the facts that the first reading states, and those that enough readings infer.

        Returns:
            The persona, its new facts and the share of conflicts, see :meth:`Persona.update`.
        """
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
        accepted: dict[tuple[str, str], tuple[Statement, float]] = {}
        for index, reading in enumerate(readable):
            for statement in reading.statements:
                key, share = _key(statement), support[_key(statement)] / n
                first = index == 0 and (statement.stated or literal)
                # A guessed slot value is not a fact: every later prompt would present it as one.
                guess = statement.slot is not None and not statement.stated
                agreed = support[key] >= min(self.settings.min_support, n) and not guess
                if first or (agreed and not statement.stated and not literal):
                    accepted.setdefault(key, (statement, share))
        days = self.settings.fact_days
        return self.state.persona.update(
            accepted.values(), self.number, self.utterance, self.schema,
            lifetime=None if days is None else days * _DAY,
        )  # fmt: skip

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
        nonempty = [text for text in [*texts, current] if text]
        encoded = iter(encoder.encode(nonempty)) if nonempty else iter(())
        vectors = [next(encoded) if text else None for text in [*texts, current]]
        vector = vectors.pop()
        readable = [v for v, r in zip(vectors, readings, strict=True) if r is not None]
        u = UNCERTAINTIES[settings.uncertainty](readable)
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

    def draft(
        self, readings: Sequence[Reading | None], persona: Persona
    ) -> tuple[str, VideoAnswer | None, list[str]]:
        """The first reply; with a video also the video model's answer and its sampled answers."""
        if self.models.answerer is None:
            return next((r.reply for r in readings if r is not None and r.reply), ""), None, []
        data = {
            "utterance": self.utterance,
            "history": self.history,
            "facts": describe_facts([f for f in persona.active if not self._sensitive(f)]),
        }
        question = self.ask_reasoner("standalone", data, read_question, self.utterance)
        messages = [{"role": "user", "content": question}]
        (greedy,) = self.complete(self.models.answerer, messages)
        sampled = self.complete(
            self.models.answerer, messages, self.settings.video_samples, temperature=0.7
        )
        texts = [reply.text for reply in sampled]
        measure = UNCERTAINTIES[self.settings.uncertainty]
        u = measure(list(self.models.encoder.encode(texts)))
        return greedy.text, VideoAnswer(question, greedy.text, u), texts

    def _sensitive(self, fact: Fact) -> bool:
        """Whether no model but the reasoner, which has read the fact, may see it."""
        slot = None if self.schema is None else self.schema.slots.get(fact.slot or "")
        return slot is not None and slot.sensitive

    def resolve(
        self, video: VideoAnswer, action: str | None, draft: str
    ) -> tuple[VideoAnswer, str]:
        """Look at the video again if its answer is not certain, or mark the answer as uncertain."""
        unsure = action != "ask" and video.uncertainty >= self.settings.video_threshold
        look = getattr(self.models.answerer, "look_again", None)
        if not unsure or look is None:
            return replace(video, unsure=unsure), draft
        reply = look(video.question, self.settings.max_tokens)
        if reply is None:
            return replace(video, unsure=True), draft
        self.calls += 1
        self.prompt_tokens += reply.prompt_tokens
        self.new_tokens += reply.new_tokens
        return replace(video, text=reply.text, looked_again=True), reply.text

    # --- ask or answer ----------------------------------------------------------------------------

    def decide(
        self,
        gap: KnowledgeGap,
        persona: Persona,
        facts: Sequence[Fact],
        video: VideoAnswer | None,
    ) -> tuple[str | None, str | None]:
        """Action and target; (None, None) if the model decides."""
        state, settings, schema = self.state, self.settings, self.schema
        if state.stopped:
            return "answer", None
        last = state.turns[-1].action if state.turns else None
        ignored = last == "ask" and not facts
        if video is not None and settings.policy != "model":
            return decide_over_video(
                settings, schema, persona, state.asked, video.uncertainty, ignored
            )
        return decide(
            settings, schema, state.asked, gap.value, gap.missing, last, ignored, self.number
        )

    def judge(
        self,
        draft: str,
        gap: KnowledgeGap,
        persona: Persona,
        action: str | None,
        target: str | None,
        printed_gap: float | None,
    ) -> Feedback:
        """The model's judgment of the draft."""
        if not self.settings.feedback and action is not None:
            return Feedback(suggestion=draft)
        value = gap.value if printed_gap is None else printed_gap
        measured = {
            "value": round(value, 2),
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
        if not self.settings.selection:
            return [fact.id for fact in offered[: self.settings.max_selected]]
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
        video: VideoAnswer | None,
        samples: Sequence[str],
        feedback: Feedback,
        persona: Persona,
        selected: Sequence[str],
        action: str,
        target: str | None,
        readings: Sequence[Reading | None],
    ) -> str:
        """The final reply."""
        slot = None if self.schema is None else self.schema.slots.get(target or "")
        data: dict[str, Any] = {
            "utterance": self.utterance,
            "history": self.history,
            "facts": describe_facts([f for f in persona.active if f.id in set(selected)]),
            "draft": draft,
            "feedback": feedback.text,
            "action": action,
            "target": target,
        }
        question = ""
        if slot is not None:
            question = data["question"] = self._question(slot, readings)
        if video is not None:
            data |= {"video_answers": [draft, *samples], "unsure": video.unsure}

        def read(text: str) -> str:
            reply = read_reply(text)
            if action == "ask" and reply.count("?") != 1:
                raise ReplyError("the text must hold exactly one question")
            if action == "ask" and slot is not None and not self._is_about(reply, slot):
                raise ReplyError(f"the question must be about {slot.name}")
            if action != "ask" and video is not None and not states_answer(reply, draft):
                raise ReplyError("the text must state the first of video_answers")
            return reply

        fallback = feedback.suggestion or draft or "Could you tell me more?"
        if video is not None:
            fallback = f"I am not sure about the video: {draft}" if video.unsure else draft
        if action == "both":
            fallback = f"{fallback} {question}".strip()
        elif action == "ask" and question:
            fallback = question
        return self.ask_reasoner("refine", data, read, fallback)

    def _question(self, slot: Slot, readings: Sequence[Reading | None]) -> str:
        """The schema's question, or whether it is the value that splits the readings best."""
        value = None
        if self.settings.question == "yes_no":
            values = [self._values(reading).get(slot.name) for reading in readings if reading]
            value = best_split(values)
        return slot.question if value is None else f"Is this right: {slot.description}, {value}?"

    def _is_about(self, reply: str, slot: Slot) -> bool:
        """Whether a question asks for a slot, by its words or by its meaning."""
        words = [slot.name.replace("_", " "), slot.question, slot.description, *slot.values]
        if content_words(reply) & content_words(" ".join(words)):
            return True
        first, second = self.models.encoder.encode([reply, slot.question])
        return float(first @ second) >= 0.3


def _key(statement: Statement) -> tuple[str, str]:
    """What makes two statements the same: slot and value, or the words."""
    if statement.slot and statement.value:
        return statement.slot, statement.value.casefold()
    return "", " ".join(re.findall(r"\w+", statement.text.casefold()))


def _joined(texts: Iterable[str]) -> str:
    return ". ".join(texts)
