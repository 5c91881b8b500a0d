"""From token ids to streamed text: what can be sent now, and where a stop string ends it.

The pieces of an answer add up to what decoding all its ids at once gives, without outer white
space and cut at the first stop string.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

# What incomplete UTF-8 decodes to.
REPLACEMENT = "\ufffd"


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
        # Ids are decoded together with those before them, on which spaces between words depend.
        self._context = self._read = 0

    def push(self, tokens: list[int]) -> str:
        """All ids so far -> what can be sent that was not sent before."""
        known = self._decode(tokens[self._context : self._read])
        found = self._decode(tokens[self._context :])
        if found.endswith(REPLACEMENT):
            # A character whose last bytes are still to come.
            return ""
        if len(found) > len(known):
            # Ids without text, special ones, are no context.
            self._context = self._read
        self._read = len(tokens)
        return self._add(found[len(known) :])

    def finish(self, tokens: list[int]) -> str:
        """All ids of the complete answer -> the rest."""
        if self.stopped:
            return ""
        known = self._decode(tokens[self._context : self._read])
        sent = self._add(self._decode(tokens[self._context :])[len(known) :])
        return sent if self.stopped else sent + self._held.rstrip()

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
    longest = min(len(stop) - 1, len(text))
    ends = (n for n in range(longest, 0, -1) if text.endswith(stop[:n]))
    return len(text) - next(ends, 0)
