"""Whether the Hugging Face Hub can be reached, checked once with a short timeout.

Without a network, its client retries every request six times, which takes 23 seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_SECONDS = 5.0


@cache
def hub_answers() -> bool:
    """Whether the hub answers a request, with any status; checked once per process."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    session = get_session()
    try:
        session.head(constants.ENDPOINT, timeout=_SECONDS)
    except _failures(session):
        return False
    return True


def _failures(session: object) -> tuple[type[Exception], ...]:
    """What a request raises without a name, a route, a proxy, an answer in time, or a valid URL.

    Versions of the client differ in their HTTP library: httpx and its successors have one base
    class for each, the errors of requests are OSErrors.
    """
    libraries = [sys.modules[c.__module__.partition(".")[0]] for c in type(session).__mro__]
    named = [getattr(m, name, OSError) for m in libraries for name in ("HTTPError", "InvalidURL")]
    return (OSError, *named)


@contextmanager
def brief_hub() -> Iterator[None]:
    """Read from the cache alone, without retries, while the hub cannot be reached."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not hub_answers()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def hub_reason(error: Exception) -> str:
    """Why a read of the hub failed, in one line."""
    if not hub_answers():
        return "the Hugging Face Hub does not answer, and nothing of that name is cached"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
