"""JSON objects in the replies of language models, which wrap, decorate and break them."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from v2l_fast.errors import V2LError, excerpt

# The last alternative is reasoning that was cut off: what stands in it is a draft.
_THOUGHTS = re.compile(r"<think>.*?</think>|^.*?</think>|^\s*<think>.*", re.DOTALL)
_TRAILING_COMMA = re.compile(r",(\s*[}\]])")
# Far above any reply that is asked for; searching a megabyte for braces is quadratic.
_MAX_CHARACTERS = 65_536


class ReplyError(V2LError):
    """A model's reply does not contain what was asked for."""


def json_object(reply: str, field: str) -> dict[str, Any]:
    """The first JSON object of a reply that has ``field``.

    Thoughts, code fences and prose around it are skipped. Trailing commas, single quotes and Python
    constants are accepted.

    Raises:
        ReplyError: there is no such object.
    """
    text = without_thoughts(reply)
    for start in [match.start() for match in re.finditer(r"\{", text)][:64]:
        value = _object_at(text, start)
        if value is not None and field in value:
            return value
    raise ReplyError(f"no JSON object with {field!r} in the reply {excerpt(reply)}")


def without_thoughts(reply: str) -> str:
    """A reply without its reasoning, and no longer than 65,536 characters."""
    return _THOUGHTS.sub("", reply[:_MAX_CHARACTERS])


def _object_at(text: str, start: int) -> dict[str, Any] | None:
    try:
        value, _ = json.JSONDecoder().raw_decode(text, start)
        return value if isinstance(value, dict) else None
    except (ValueError, RecursionError):
        pass
    repaired = _TRAILING_COMMA.sub(r"\1", text[start : text.rfind("}") + 1])
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(repaired)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        if isinstance(value, dict):
            return value
    return None
