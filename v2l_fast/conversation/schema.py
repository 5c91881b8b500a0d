"""Schemas: what a conversation should know about a person, as named slots with weights and values.

Schemas are TOML files; three ship with the package (``viewer``, ``movies``, ``support``).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v2l_fast.errors import ConfigError, excerpt
from v2l_fast.files import read_text

SHIPPED = Path(__file__).parent / "schemas"
_MAX_SLOTS = 64


@dataclass(frozen=True)
class Slot:
    """One thing to know about a person.

    Attributes:
        name: identifier of the slot.
        question: the question that asks for it, used when the model writes none.
        description: what the slot means, for the model.
        values: the possible values; empty if any text is allowed.
        weight: importance, at least 0.
        sensitive: accepted if the person states it, never inferred.
    """

    name: str
    question: str
    description: str = ""
    values: tuple[str, ...] = ()
    weight: float = 1.0
    sensitive: bool = False

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ConfigError(f"a slot's name must be an identifier, got {excerpt(self.name)}")
        if not self.question.rstrip().endswith("?"):
            raise ConfigError(
                f"slot {self.name}: question must end with a question mark, "
                f"got {excerpt(self.question)}"
            )
        if not 0 <= self.weight < float("inf"):
            raise ConfigError(f"slot {self.name}: weight must be at least 0, got {self.weight}")

    def accept(self, value: object) -> str | None:
        """The slot's value that a model's text names; None if it names none."""
        if not isinstance(value, str) or not (text := " ".join(value.split())):
            return None
        if not self.values:
            return text[:160]
        return {option.casefold(): option for option in self.values}.get(text.casefold())


@dataclass(frozen=True)
class Schema:
    """Slots by name, in the order of the file."""

    name: str
    slots: Mapping[str, Slot]

    @classmethod
    def load(cls, name_or_path: str | Path) -> Schema:
        """Load a shipped schema by its name, or a TOML file.

        Raises:
            ConfigError: there is no such schema, or the file is not one.
        """
        shipped = SHIPPED / f"{name_or_path}.toml"
        path = shipped if shipped.is_file() else Path(name_or_path)
        if not path.suffix:
            names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.toml")))
            raise ConfigError(f"schema {name_or_path}: use {names}, or the path of a TOML file")
        try:
            values = tomllib.loads(read_text(path, error=ConfigError))
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path}: {error}") from None
        try:
            return cls.from_dict(path.stem, values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, name: str, values: Mapping[str, Any]) -> Schema:
        """Create a schema from a table ``slots`` of slot name -> fields of :class:`Slot`.

        Raises:
            ConfigError: a slot has an unknown field, lacks one, or has one of the wrong type.
        """
        tables = values.get("slots")
        if not isinstance(tables, Mapping) or not 1 <= len(tables) <= _MAX_SLOTS:
            raise ConfigError(f"slots must be a table of 1 to {_MAX_SLOTS} slots")
        types: dict[str, Any] = {
            "question": str, "description": str, "values": list, "weight": (int, float),
            "sensitive": bool,
        }  # fmt: skip
        slots = {}
        for slot, fields in tables.items():
            if not isinstance(fields, Mapping) or "question" not in fields:
                raise ConfigError(f"slot {slot}: question is missing")
            for field, value in fields.items():
                if field not in types:
                    raise ConfigError(f"slot {slot}: unknown field {excerpt(field)}")
                if not isinstance(value, types[field]):
                    raise ConfigError(f"slot {slot}: {field} must not be {excerpt(value)}")
            options = tuple(fields.get("values", ()))
            if not all(isinstance(option, str) for option in options):
                raise ConfigError(f"slot {slot}: values must be strings")
            slots[slot] = Slot(name=slot, **{**fields, "values": options})
        return cls(name, slots)
