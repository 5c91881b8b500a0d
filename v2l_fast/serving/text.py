"""From token ids to streamed text: what can be sent now, and where a stop string ends it.

The pieces of an answer add up to what decoding all its ids at once gives, without outer white
space and cut at the first stop string.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

# What incomplete UTF-8 decodes to.
REPLACEMENT = "\ufffd"
# Bytes, and so replacement characters, of a character that is not complete.
_PENDING = 3
# Ids decoded at a time at most, so that a token costs the same however long an answer is.
_WINDOW = 64


class TextStream:
    """Text of one answer.

    Args:
        decode: ids to text, white space kept.
        stop: strings that end the answer.

    Attributes:
        stopped: a stop string has been found; nothing follows.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._decode = decode
        self._stop = tuple(stop)
        self._held = ""
        self._begun = False
        # The last ids that have text, decoded together because spaces between words depend on
        # those before; how much of that text has been taken, and how many ids have been read.
        self._window: list[int] = []
        self._text = ""
        self._taken = self._read = 0

    def push(self, tokens: list[int]) -> str:
        """All ids so far -> what can be sent that was not sent before."""
        self._extend(tokens)
        # A character whose last bytes are still to come: at most three are there, one by one or
        # together.
        whole = len(self._text)
        pending = whole - len(self._text.rstrip(REPLACEMENT))
        ready = max(self._taken, whole - min(pending, _PENDING))
        new, self._taken = self._text[self._taken : ready], ready
        if not pending and new:
            self._shrink(self._window[-1:])
        elif len(self._window) > _WINDOW:
            self._shrink(self._window[-_WINDOW // 2 :])
        return self._add(new)

    def finish(self, tokens: list[int]) -> str:
        """All ids of the complete answer -> the rest."""
        if self.stopped:
            return ""
        self._extend(tokens)
        sent = self._add(self._text[self._taken :])
        return sent if self.stopped else sent + self._held.rstrip()

    def _extend(self, tokens: list[int]) -> None:
        for token in tokens[self._read :]:
            text = self._decode([*self._window, token])
            # Ids without text, special ones, are no context.
            if text != self._text or text.endswith(REPLACEMENT):
                self._window.append(token)
                self._text = text
        self._read = len(tokens)

    def _shrink(self, window: list[int]) -> None:
        """Decode fewer ids from now on; what has not been taken is the end of their text, too."""
        rest = len(self._text) - self._taken
        self._window, self._text = window, self._decode(window)
        self._taken = max(0, len(self._text) - rest)

    def _add(self, text: str) -> str:
        self._held += text
        if not self._begun:
            self._held = self._held.lstrip()
        found = [place for s in self._stop if (place := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)].rstrip()
        # The end of what is held may be the beginning of a stop string, and white space the end.
        safe = min((_safe(self._held, s) for s in self._stop), default=len(self._held))
        safe = len(self._held[:safe].rstrip())
        sent, self._held = self._held[:safe], self._held[safe:]
        self._begun |= bool(sent)
        return sent


def _safe(text: str, stop: str) -> int:
    """Length of ``text`` without the longest end that ``stop`` begins with."""
    place = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while place >= 0:
        if stop.startswith(text[place:]):
            return place
        place = text.find(stop[0], place + 1)
    return len(text)
