"""Turning pieces of tokens into text: whole characters only, and nothing past a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from llamastate.errors import InvalidArgumentError

__all__ = ["TextStream"]


class TextStream:
    """Bytes in, text out, held back where a character or a stop string may still be under way.

    Parameters
    ----------
    stop : sequence of str
        Text ends before the first of these. They may straddle pieces. Empty strings are refused.

    Attributes
    ----------
    stopped : str or None
        The stop string that was met.

    Notes
    -----
    Bytes that are no UTF-8 become U+FFFD. What is held back is never longer than the longest stop string.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        if not all(isinstance(s, str) for s in stop):
            raise InvalidArgumentError("a stop string is no str", name="stop", value=stop)
        if not all(stop):
            raise InvalidArgumentError("a stop string is empty", name="stop", value=stop)
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped: str | None = None

    def push(self, piece: bytes) -> str:
        """Take the bytes of one token; the text that is now certain."""
        return self._release(self._decoder.decode(piece), final=False)

    def finish(self) -> str:
        """Take the end; what was held back and turned out to be text after all."""
        return self._release(self._decoder.decode(b"", final=True), final=True)

    def _release(self, new: str, *, final: bool) -> str:
        if self.stopped is not None:
            return ""
        text = self._held + new
        found = [(text.find(s), s) for s in self._stop if s in text]
        if found:
            at, self.stopped = min(found)
            self._held = ""
            return text[:at]
        keep = 0 if final else self._undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _undecided(self, text: str) -> int:
        """Length of the longest end of ``text`` that a stop string begins with."""
        longest = 0
        for s in self._stop:
            for n in range(min(len(s) - 1, len(text)), longest, -1):
                if text.endswith(s[:n]):
                    longest = n
                    break
        return longest
