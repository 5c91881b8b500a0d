"""The Hugging Face Hub, asked once and briefly whether it answers.

Its client tries every request six times, which takes 23 seconds where there is no network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_SECONDS = 5.0


@cache
def hub_answers() -> bool:
    """Whether the hub answers a request, whatever its answer is; asked once in a process."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception:
        # Of the HTTP library that the installed client uses: no name, no route, no proxy, no time.
        return False
    return True


@contextmanager
def brief_hub() -> Iterator[None]:
    """Reads of the hub take what is cached where it does not answer, and fail at once otherwise."""
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
