"""Dialogs of CCPE-M and ESConv, and those of CPER's authors, as pairs of turns.

Neither dataset ships with the package. ESConv is licensed CC BY-NC 4.0 for academic research only;
CCPE-M is CC BY 4.0. Five forms are recognized by their content: CCPE-M's ``data.json``, ESConv's
``ESConv.json`` and ``FailedESConv.json``, the hub's ESConv (one JSON object a line), and the form
of CPER's authors (``turns`` of ``user_input`` and ``response``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v2l_fast.errors import ConfigError, excerpt
from v2l_fast.files import parse_json, read_jsonl, read_text

# A dialog is long from this number of pairs on.
LONG = 12
ESCONV_LICENSE = "ESConv is licensed CC BY-NC 4.0, for academic research only"
_MAX_BYTES = 1 << 30
_USER = frozenset({"user", "usr", "seeker", "speaker"})
_ASSISTANT = frozenset({"assistant", "sys", "supporter", "listener"})


@dataclass(frozen=True)
class AnnotatedPreference:
    """A part of what a person said that is annotated as a preference.

    Attributes:
        text: the words.
        kind: what they are about, such as MOVIE_GENRE_OR_CATEGORY.
        pair: index of the pair it is in.
    """

    text: str
    kind: str
    pair: int


@dataclass(frozen=True)
class Dialog:
    """A conversation.

    Attributes:
        id: of the dataset, or the position in the file.
        opening: what the assistant says first; empty where the person begins.
        pairs: (person, assistant); the last reply may be empty.
        preferences: annotated preferences of the person, where the dataset has them.
        metadata: further fields of the dataset, as strings.
        strategies: for each pair the annotated strategies of the assistant's reply.
        form: "ccpe", "esconv" or "authors".
    """

    id: str
    opening: str
    pairs: tuple[tuple[str, str], ...]
    preferences: tuple[AnnotatedPreference, ...] = ()
    metadata: Mapping[str, str] | None = None
    strategies: tuple[tuple[str, ...], ...] = ()
    form: str = ""

    @property
    def is_long(self) -> bool:
        """At least :data:`LONG` pairs."""
        return len(self.pairs) >= LONG


def read_dialogs(path: str | os.PathLike) -> list[Dialog]:
    """All dialogs of a file that have at least one pair.

    Raises:
        ConfigError: the file is broken or of no known form; the message names the dialog or line.
    """
    if Path(path).suffix in (".jsonl", ".txt"):
        entries = [entry for _, entry in read_jsonl(path, error=ConfigError)]
    else:
        text = read_text(path, _MAX_BYTES, ConfigError)
        entries = parse_json(text, str(path), ConfigError)
    if not isinstance(entries, list):
        raise ConfigError(f"{path}: must hold a list of dialogs, got {excerpt(entries)}")
    dialogs = []
    for number, entry in enumerate(entries, 1):
        try:
            dialog = _dialog(entry, str(number))
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path}: dialog {number} has no known form ({type(error).__name__}: {error}); "
                "expected CCPE-M, ESConv or turns of user_input and response"
            ) from None
        if dialog.pairs:
            dialogs.append(dialog)
    return dialogs


def _dialog(entry: Any, number: str) -> Dialog:
    if "utterances" in entry:
        return _ccpe(entry)
    if "turns" in entry:
        turns = [(turn["user_input"], turn["response"]) for turn in entry["turns"]]
        pairs = tuple((_text(user), _text(reply)) for user, reply in turns)
        id_ = str(entry.get("conversation_id", number))
        return Dialog(id_, "", pairs, (), _metadata(entry), form="authors")
    utterances = [
        (turn["speaker"], turn["content"] if "content" in turn else turn["text"])
        for turn in entry["dialog"]
    ]
    opening, pairs, owners = _pairs(utterances)
    strategies: list[list[str]] = [[] for _ in pairs]
    for turn, owner in zip(entry["dialog"], owners, strict=True):
        strategy = turn.get("strategy") or (turn.get("annotation") or {}).get("strategy")
        if strategy and owner >= 0:
            strategies[owner].append(str(strategy))
    by_pair = tuple(tuple(own) for own in strategies)
    return Dialog(number, opening, pairs, (), _metadata(entry), by_pair, "esconv")


def _ccpe(entry: Mapping[str, Any]) -> Dialog:
    utterances = [(turn["speaker"], turn["text"]) for turn in entry["utterances"]]
    opening, pairs, owners = _pairs(utterances)
    preferences = [
        AnnotatedPreference(_text(segment["text"]), annotation["entityType"], owners[index])
        for index, turn in enumerate(entry["utterances"])
        for segment in turn.get("segments", ())
        for annotation in segment.get("annotations", ())
        if annotation["annotationType"] == "ENTITY_PREFERENCE" and turn["speaker"].lower() in _USER
    ]
    return Dialog(str(entry["conversationId"]), opening, pairs, tuple(preferences), form="ccpe")


def _pairs(
    utterances: Sequence[tuple[str, str]],
) -> tuple[str, tuple[tuple[str, str], ...], list[int]]:
    """The assistant's opening, (person, assistant) pairs, and the pair of every utterance (-1: in
    the opening). Adjacent utterances of one side are joined with a line break."""
    opening: list[str] = []
    pairs: list[tuple[list[str], list[str]]] = []
    owners = []
    for speaker, text in utterances:
        side = speaker.lower()
        if side not in _USER | _ASSISTANT:
            raise KeyError(speaker)
        if side in _USER:
            if not pairs or pairs[-1][1]:
                pairs.append(([], []))
            pairs[-1][0].append(_text(text))
        elif pairs:
            pairs[-1][1].append(_text(text))
        else:
            opening.append(_text(text))
        owners.append(len(pairs) - 1)
    joined = tuple(("\n".join(user), "\n".join(reply)) for user, reply in pairs)
    return "\n".join(opening), joined, owners


def _metadata(entry: Mapping[str, Any]) -> dict[str, str]:
    """Fields that hold one value; scores are strings in the dataset."""
    fields = ((name, value) for name, value in _flat(entry) if name != "conversation_id")
    return {name: str(value).strip() for name, value in fields}


def _flat(entry: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in entry.items():
        if isinstance(value, str | int | float):
            yield prefix + name, value
        elif isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")


def _text(value: str) -> str:
    return value.strip()
