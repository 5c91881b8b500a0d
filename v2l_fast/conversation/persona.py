"""What is known about a person: facts with their evidence, superseded, forgotten and exported.

A :class:`Persona` is immutable: every change returns a new one. What a model or a file says about a
person is untrusted. A fact is one short line; a fact that reads as an instruction is kept, but no
model sees it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from v2l_fast.conversation.schema import Schema
from v2l_fast.errors import ConfigError, escape_controls, excerpt
from v2l_fast.files import read_json, read_jsonl, write_json, write_jsonl

FORMAT = "v2l-persona-1"
MAX_FACT_CHARACTERS = 160
MAX_FACTS = 64

Source = Literal["stated", "inferred", "imported"]
Status = Literal["active", "superseded", "quarantined", "forgotten"]

# A "fact" that addresses the model: it would come back in every later prompt. No list is complete;
# what it misses still reaches models as a quoted string only.
_INSTRUCTION = re.compile(
    r"\b(ignore|disregard|forget|override|bypass|ignoriere|vergiss|oublie|ignora|olvida)\b"
    r".{0,40}\b(instruct\w*|previous|prior|above|earlier|prompt|rules?|system|everything|guidelines|"
    r"anweisung\w*|instrucciones|regeln)|"
    r"\b(system|assistant|developer|user|tool|human|ai)\s*(prompt|message|instruction|override|:)|"
    r"\b(new|updated|real|hidden|secret)\s+(rules?|instructions?|task|policy|objective)|"
    r"#+\s*(instruction|system|task)|\bBEGIN\b.*\b(PROMPT|INSTRUCTION|SYSTEM)|"
    r"\b(you|the assistant|the model|the ai) (must|shall|should|has to|have to|need to|are now|"
    r"should now|will now|may not|is not allowed)\b|"
    r"\b(must|should|do|may|shall) (not|never) (ask|answer|mention|reply|tell|use)|"
    r"\b(from now on|act as|pretend|roleplay|jailbreak|respond (only )?with|reply (only )?with|"
    r"(output|print|execute|repeat|reveal) (the|your|all|after|everything|only)|"
    r"(always|only|never) (say|answer|reply|respond|recommend|mention|ask|output)|"
    r"(set|change|delete|add|replace|mark|fill) (the |your |all )?(action|gap|slots?|facts?|"
    r"persona|target|value|memory|genre))\b|"
    r"\b(action|stated|target|gap|slot)\s*[=:]|<\||\|>|</?\w+>|\[/?[A-Z]+\]|```|[{}]",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Statement:
    """A statement of one reading about a person; :meth:`Persona.update` turns it into a fact.

    Attributes:
        text: the statement, any text.
        slot, value: the schema's slot that it fills, and with what.
        stated: whether the person said it; otherwise it is a guess.
    """

    text: str
    slot: str | None = None
    value: str | None = None
    stated: bool = True


@dataclass(frozen=True)
class Fact:
    """One thing known about a person.

    Attributes:
        id: identifier within the persona.
        text: one line of at most 160 characters; empty once forgotten.
        slot, value: the schema's slot that the fact fills, and with what.
        source: "stated" by the person, "inferred" from several readings, or "imported".
        turn: number of the turn it comes from.
        utterance: the person's words, as evidence; None if they are not kept.
        confidence: share of the readings that contain it, 0 to 1.
        status: "active", "superseded" by a newer value, "quarantined" because it reads as an
            instruction, or "forgotten".
        superseded_by: id of the newer fact.
        created: seconds since the epoch.
        expires: when to forget the fact, in seconds since the epoch; None for never.
    """

    id: str
    text: str
    slot: str | None = None
    value: str | None = None
    source: Source = "stated"
    turn: int = 0
    utterance: str | None = None
    confidence: float = 1.0
    status: Status = "active"
    superseded_by: str | None = None
    created: float = 0.0
    expires: float | None = None


@dataclass(frozen=True)
class ForgottenWords:
    """The words of forgotten facts, for removing them from other places."""

    words: frozenset[str]

    def found_in(self, texts: Iterable[str]) -> bool:
        """Whether one of the texts says the same as a whole word or phrase."""
        lines = [" ".join(_words(text)) for text in texts]
        return any(f" {word} " in f" {line} " for line in lines for word in self.words)


@dataclass(frozen=True)
class Persona:
    """Facts about one person, oldest first.

    Attributes:
        facts: all facts, whatever their status.
    """

    facts: tuple[Fact, ...] = ()

    @property
    def active(self) -> tuple[Fact, ...]:
        """Facts that hold now; the only ones that models see."""
        return tuple(fact for fact in self.facts if fact.status == "active")

    @property
    def stated_slots(self) -> tuple[str, ...]:
        """Slots that an active fact fills which the person stated or imported."""
        return tuple(fact.slot for fact in self.active if fact.slot and fact.source != "inferred")

    def value(self, slot: str) -> str | None:
        """The active value of a slot; None if no fact fills it."""
        values = [fact.value for fact in self.active if fact.slot == slot]
        return values[-1] if values else None

    def update(
        self,
        statements: Iterable[tuple[Statement, float]],
        turn: int,
        utterance: str | None = None,
        schema: Schema | None = None,
        created: float | None = None,
        lifetime: float | None = None,
    ) -> tuple[Persona, tuple[Fact, ...], float]:
        """Add the statements of one turn.

        A statement that repeats a fact confirms it. A stated value supersedes another value of its
        slot; an inferred one never supersedes a stated one.

        Args:
            statements: each with its confidence, the share of readings that contain it.
            turn: number of the turn.
            utterance: kept as evidence.
            schema: slots and values are checked against it; None drops them.
            created: seconds since the epoch; now when None.
            lifetime: seconds after which new facts expire; None for never.

        Returns:
            The new persona, its new facts, and the share of the statements that contradict an
            active fact.
        """
        facts, fresh, conflicts, count = list(self.facts), [], 0, 0
        for statement, confidence in statements:
            fact = self._fact(statement, confidence, turn, utterance, schema, created)
            if fact is None:
                continue
            count += 1
            index, outcome = _relation(facts, fact)
            if outcome == "same":
                same = facts[index]
                stated = "stated" in (same.source, fact.source)
                facts[index] = replace(
                    same,
                    confidence=max(same.confidence, fact.confidence),
                    source="stated" if stated else same.source,
                )
                continue
            if outcome == "conflict":
                conflicts += 1
                if fact.source == "inferred" and facts[index].source != "inferred":
                    continue
            expires = None if lifetime is None else fact.created + lifetime
            fact = replace(fact, id=_next_id(facts), expires=expires)
            if outcome == "conflict":
                facts[index] = replace(facts[index], status="superseded", superseded_by=fact.id)
            facts.append(fact)
            fresh.append(fact)
        persona = Persona(_bounded(facts, turn))
        ids = {fact.id for fact in persona.facts}
        new = tuple(fact for fact in fresh if fact.id in ids)
        return persona, new, conflicts / count if count else 0.0

    def _fact(
        self,
        statement: Statement,
        confidence: float,
        turn: int,
        utterance: str | None,
        schema: Schema | None,
        created: float | None,
    ) -> Fact | None:
        """Convert a statement to a fact; None if nothing of it remains."""
        text = clean(statement.text)
        if not text:
            return None
        slot = (
            None if schema is None or statement.slot is None else schema.slots.get(statement.slot)
        )
        value = None if slot is None else slot.accept(statement.value)
        if slot is not None and slot.sensitive and not statement.stated:
            return None
        hostile = _is_instruction(text) or (value is not None and _is_instruction(value))
        return Fact(
            id="",
            text=text,
            slot=None if value is None or slot is None or hostile else slot.name,
            value=None if hostile else value,
            source="stated" if statement.stated else "inferred",
            turn=turn,
            utterance=utterance,
            confidence=confidence,
            status="quarantined" if hostile else "active",
            created=time.time() if created is None else created,
        )

    def forget(self, ids: Collection[str]) -> Persona:
        """Remove text, value and evidence of facts; their ids and dates remain.

        Other facts with the same words as their evidence lose it, because it states the forgotten
        fact.

        Raises:
            ConfigError: an id is unknown.
        """
        if unknown := sorted(set(ids) - {fact.id for fact in self.facts}):
            raise ConfigError(f"unknown fact {unknown[0]!r}; v2l persona show lists the ids")
        words = {fact.utterance for fact in self.facts if fact.id in ids}
        return Persona(
            tuple(
                _forgotten(fact)
                if fact.id in ids
                else replace(fact, utterance=None)
                if fact.utterance in words
                else fact
                for fact in self.facts
            )
        )

    def traces(self, ids: Collection[str]) -> ForgottenWords:
        """The words of these facts: their texts, values and evidence."""
        texts = [
            text
            for fact in self.facts
            if fact.id in ids
            for text in (fact.text, fact.value or "", fact.utterance or "")
        ]
        return ForgottenWords(frozenset(" ".join(_words(text)) for text in texts) - {""})

    def expired(self, now: float | None = None) -> tuple[str, ...]:
        """Ids of the facts that have expired.

        Args:
            now: seconds since the epoch; None for the current time.
        """
        now = time.time() if now is None else now
        return tuple(
            fact.id
            for fact in self.facts
            if fact.expires is not None and fact.expires <= now and fact.status != "forgotten"
        )

    def select(self, *, slot: str | None = None, turn: int | None = None) -> tuple[str, ...]:
        """Ids of the facts that are not forgotten, of one slot or one turn if it is passed."""
        return tuple(
            fact.id
            for fact in self.facts
            if fact.status != "forgotten"
            and (slot is None or fact.slot == slot)
            and (turn is None or fact.turn == turn)
        )

    # --- files ------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All facts with their evidence, JSON-ready."""
        entries = [dataclasses.asdict(fact) for fact in self.facts]
        for entry in entries:
            if entry["expires"] is None:
                del entry["expires"]
        return {"format": FORMAT, "facts": entries}

    def save(self, path: str | os.PathLike) -> None:
        """Write a JSON file that only its owner can read, atomically.

        Raises:
            WriteError: the file cannot be written.
        """
        write_json(path, self.to_dict(), private=True)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Persona:
        """Read :meth:`save`'s file.

        Raises:
            ConfigError: the file is missing, damaged, or not a persona.
        """
        values = read_json(path, error=ConfigError, kind=dict)
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Persona:
        """Create a persona from the result of :meth:`to_dict`. Texts are checked like a model's.

        Raises:
            ConfigError: the value is not a persona.
        """
        if values.get("format") != FORMAT or not isinstance(values.get("facts"), list):
            raise ConfigError(f"format must be {FORMAT!r}, got {excerpt(values.get('format'))}")
        facts = [_read_fact(entry) for entry in values["facts"]]
        ids = [fact.id for fact in facts]
        if len(set(ids)) < len(ids):
            raise ConfigError("two facts have the same id")
        return cls(tuple(facts))


def forget_in_trace(path: str | os.PathLike, words: ForgottenWords) -> int:
    """Empty the lines of a trace (JSON lines) that contain forgotten words.

    Returns:
        The number of emptied lines.

    Raises:
        ConfigError: a line is not JSON.
        WriteError: the file cannot be written.
    """
    if not os.path.exists(path):
        return 0
    entries, emptied = [], 0
    for _, entry in read_jsonl(path, error=ConfigError):
        if words.found_in(_strings(entry)):
            entry, emptied = {"turn": entry.get("turn"), "forgotten": True}, emptied + 1
        entries.append(entry)
    if emptied:
        write_jsonl(path, entries, private=True)
    return emptied


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for item in value.items() for part in item for text in _strings(part))
    elif isinstance(value, list):
        yield from (text for item in value for text in _strings(item))


def clean(text: str) -> str:
    """Untrusted text as one line of at most 160 characters without control characters."""
    line = escape_controls(" ".join(text.split()))
    return line if len(line) <= MAX_FACT_CHARACTERS else f"{line[: MAX_FACT_CHARACTERS - 1]}…"


def _is_instruction(text: str) -> bool:
    # Full-width letters and invisible characters spell the same words.
    plain = unicodedata.normalize("NFKC", text)
    plain = "".join(c for c in plain if unicodedata.category(c) != "Cf")
    return _INSTRUCTION.search(plain) is not None


def _next_id(facts: Sequence[Fact]) -> str:
    numbers = [int(fact.id[1:]) for fact in facts if re.fullmatch(r"f\d{1,9}", fact.id)]
    return f"f{max(numbers, default=0) + 1}"


def _relation(facts: Sequence[Fact], new: Fact) -> tuple[int, str]:
    """Index of the fact that ``new`` repeats or contradicts, and which; -1 and "new" otherwise."""
    for index, fact in enumerate(facts):
        if fact.status == "quarantined" and _same_text(fact, new):
            return index, "same"
        if fact.status != "active":
            continue
        if new.slot is not None and fact.slot == new.slot:
            same = (fact.value or "").casefold() == (new.value or "").casefold()
            return index, "same" if same else "conflict"
        if new.slot is None and fact.slot is None and _same_text(fact, new):
            return index, "same"
    return -1, "new"


def _same_text(first: Fact, second: Fact) -> bool:
    return _words(first.text) == _words(second.text)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _bounded(facts: list[Fact], turn: int) -> tuple[Fact, ...]:
    """At most :data:`MAX_FACTS` facts.

    Inactive facts are removed first, then inferred ones, then stated ones; among equals the least
    confident and oldest first.
    """

    def worth(fact: Fact) -> tuple[bool, bool, float]:
        age = max(turn - fact.turn, 0)
        return fact.status == "active", fact.source != "inferred", fact.confidence * 0.97**age

    while len(facts) > MAX_FACTS:
        facts.remove(min(facts, key=worth))
    return tuple(facts)


def _forgotten(fact: Fact) -> Fact:
    return Fact(id=fact.id, text="", turn=fact.turn, status="forgotten", created=fact.created,
                confidence=0.0)  # fmt: skip


_TYPES: dict[str, Any] = {
    "id": str, "text": str, "slot": str | None, "value": str | None, "source": str, "turn": int,
    "utterance": str | None, "confidence": int | float, "status": str,
    "superseded_by": str | None, "created": int | float, "expires": int | float | None,
}  # fmt: skip
_KNOWN = {
    "source": ("stated", "inferred", "imported"),
    "status": ("active", "superseded", "quarantined", "forgotten"),
}


def _read_fact(entry: object) -> Fact:
    if isinstance(entry, dict):
        entry = {"expires": None, **entry}
    if not isinstance(entry, dict) or set(entry) != set(_TYPES):
        raise ConfigError(f"a fact must have the fields {', '.join(_TYPES)}, got {excerpt(entry)}")
    for name, kind in _TYPES.items():
        value, known = entry[name], _KNOWN.get(name)
        if not isinstance(value, kind) or isinstance(value, bool) or (known and value not in known):
            where = f"fact {excerpt(entry['id'])}: {name}"
            if known is not None:
                raise ConfigError(
                    f"{where} must be one of {', '.join(known)}, got {excerpt(value)}"
                )
            raise ConfigError(f"{where} has the wrong type, got {excerpt(value)}")
    fact = Fact(**entry | {"text": clean(entry["text"])})
    texts = [fact.text, fact.value or "", fact.slot or ""]
    if fact.status == "active" and any(_is_instruction(text) for text in texts):
        fact = replace(fact, status="quarantined", slot=None, value=None)
    return fact
