"""Errors that users can act on.

Every message is one line that names the file or argument, the offending value and the remedy.
The command line prints it and exits with code 1. Any other exception is a bug and keeps its
traceback.
"""

from __future__ import annotations

import errno
import re
import reprlib
from typing import Any

# Maximum characters of a line. A path may have 4,096, a value in a file millions.
LINE_LENGTH = 1000
# Characters kept of a longer line: its start states the problem and its end the remedy.
_HEAD, _TAIL = 600, 380
# Maximum lines of a message that lists problems.
_LINES = 40
# Control characters, line and paragraph separators, marks that reorder a line, lone surrogates:
# a terminal or log would act on them or fail.
_CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
# Remedies by the operating system's error number.
_REMEDIES = {
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "free some space or choose another disk",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "check its permissions or choose another path",
    errno.EPERM: "check its permissions or choose another path",
    errno.EISDIR: "name a file, not a folder",
    errno.ENOTDIR: "a part of the path is a file; choose another path",
    errno.EEXIST: "choose another path",
    errno.ENOENT: "check the path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "remove the loop of symbolic links",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80
_short.maxlevel = 3


def excerpt(value: Any) -> str:
    """``repr`` of a value, shortened to 80 characters whatever its size and depth."""
    try:
        text = _short.repr(value)
    except ValueError:
        # Python refuses to print integers of more than 4,300 digits.
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_line(text: str) -> str:
    """Shorten a text and escape its control characters, so that it is one line."""
    if len(text) > LINE_LENGTH:
        text = f"{text[:_HEAD]} ... {text[-_TAIL:]}"
    return escape_controls(text)


def escape_controls(text: str, keep: str = "") -> str:
    """Escape the characters that a terminal would act on, except those in `keep`."""
    return _CONTROL.sub(lambda match: match[0] if match[0] in keep else _escape(match), text)


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


class V2LError(Exception):
    """Base class of the errors that v2l_fast raises deliberately.

    The message is cut to one line of about `LINE_LENGTH` characters.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(self._bounded(str(message)))

    @staticmethod
    def _bounded(message: str) -> str:
        return one_line(message)


class ListError(V2LError):
    """An error whose message lists several problems, one per line."""

    @staticmethod
    def _bounded(message: str) -> str:
        lines = message.split("\n")
        more = [f"  and {len(lines) - _LINES} more"] if len(lines) > _LINES else []
        return "\n".join([*map(one_line, lines[:_LINES]), *more])


class ConfigError(V2LError, ValueError):
    """A configuration value, or a combination of values, is invalid."""


class VideoError(V2LError, ValueError):
    """A video cannot be read, decoded or sampled."""


class CheckpointError(V2LError, ValueError):
    """A checkpoint is broken, unsafe or incomplete, or does not fit the model."""


class AdapterError(V2LError, ValueError):
    """An adapter is broken or does not belong to this model."""


class PromptTooLong(ConfigError):
    """A prompt and the limit of new tokens together exceed the context."""


class WriteError(V2LError, OSError):
    """A file or folder cannot be written, or would replace another that must stay.

    ``errno`` and ``strerror`` are set if the operating system refused.
    """

    def __init__(self, message: str, cause: OSError | None = None) -> None:
        super().__init__(message)
        if cause is not None:
            self.errno, self.strerror = cause.errno, cause.strerror
        self._message = self._bounded(str(message))

    def __str__(self) -> str:
        return self._message


def os_error_reason(error: OSError) -> str:
    """The operating system's reason, with a remedy if one is known."""
    reason = error.strerror or str(error) or type(error).__name__
    remedy = _REMEDIES.get(error.errno or 0)
    return reason if remedy is None else f"{reason}; {remedy}"
