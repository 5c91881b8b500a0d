"""From TOML values to nested dataclasses: types checked, unknown keys named with the nearest one.

Responsible for where every value was given, so that an error can say it. It knows no setting.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from v2l_fast.errors import ConfigError

T = TypeVar("T")


@dataclasses.dataclass
class ConfigSources:
    """Values by dotted key, and where each was given; later ones replace earlier ones."""

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    origins: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, values: Mapping[str, Any], where: str) -> None:
        """Take over nested `values`, all given in `where`."""
        for key, value in spread(values).items():
            self.values[key] = value
            self.origins[key] = where


def spread(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys; an empty one stays as it is."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= spread(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing when no name is near."""
    found = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"; did you mean {found[0]}?" if found else ""


def parse_overrides(overrides: Sequence[str], given: ConfigSources) -> None:
    """Add `section.key=value` texts; a value is a TOML literal, or text where it is none.

    Raises:
        ConfigError: one has no `=` or no key.
    """
    for text in overrides:
        key, equals, literal = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"{text!r} on the command line is not section.key=value")
        try:
            value = tomllib.loads(f"value = {literal}")["value"]
        except tomllib.TOMLDecodeError:
            value = literal.strip()
        given.add({key: value}, "the command line")


def build(cls: type[T], given: ConfigSources) -> T:
    """The dataclass `cls` from dotted keys; fields of its own kind are sections.

    Raises:
        ConfigError: an unknown key or a value of another type.
    """
    known = _leaves(cls)
    sections: dict[str, Any] = {}
    for key, value in given.values.items():
        where = given.origins[key]
        owner = next((leaf for leaf in known if key == leaf or key.startswith(f"{leaf}.")), None)
        mapped = owner is not None and get_origin(known[owner]) is Mapping
        if owner is None or (key != owner and not mapped):
            hint = nearest(key, known)
            raise ConfigError(f"unknown key {key} in {where}{hint}")
        section, name = owner.rsplit(".", 1)
        target = sections.setdefault(section, {})
        if key != owner:
            target.setdefault(name, {})[key.removeprefix(f"{owner}.")] = value
        elif mapped:
            if value:
                raise ConfigError(f"{key} in {where} must be a table, not {value!r}")
            target[name] = {}
        else:
            target[name] = _cast(value, known[owner], f"{key} in {where}")
    hints = get_type_hints(cls)
    return cls(**{name: hints[name](**values) for name, values in sections.items()})


def _leaves(cls: type) -> dict[str, Any]:
    """Dotted names of the settings with their declared types."""
    found = {}
    for section, kind in get_type_hints(cls).items():
        for name, hint in get_type_hints(kind).items():
            found[f"{section}.{name}"] = hint
    return found


def _cast(value: Any, hint: Any, what: str) -> Any:
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        if not isinstance(value, list):
            value = [value]
        return tuple(_cast(x, item, what) for x in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) is (hint is bool) and isinstance(value, hint):
        return value
    names = {
        bool: "true or false", int: "a whole number", float: "a number", str: "text",
    }  # fmt: skip
    shown = "nothing" if isinstance(value, types.NoneType) else repr(value)
    raise ConfigError(f"{what} must be {names[hint]}, not {shown}")
