"""A text that grows by one token at a time: whole characters only, and nothing that a stop string may yet take back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]


class Growing:
    """The text of one answer.

    Args:
        decode: ids to text.
        stop: strings that end the answer and are no part of it.

    Attributes:
        text: all that is certain so far.
        stopped: whether a stop string has come.

    Example:
        >>> growing = Growing(lambda ids: "".join(map(chr, ids)), ["STOP"])
        >>> [growing.push(ord(c)) for c in "a ST STOPx"]
        ['a', ' ', '', '', 'ST ', '', '', '', '', '']
        >>> growing.text, growing.stopped
        ('a ST ', True)
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = ()):
        self._decode, self._stop = decode, tuple(stop)
        self._ids: list[int] = []
        self._from, self._read = 0, 0
        self._held = ""
        self.text, self.stopped = "", False

    def push(self, token: int) -> str:
        """Add a token and return the new part of the text."""
        if self.stopped:
            return ""
        self._ids.append(token)
        # Some ids behind what was read are decoded again: a piece may look otherwise at the start of a text.
        before, now = self._decode(self._ids[self._from:self._read]), self._decode(self._ids[self._from:])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self._from, self._read = self._read, len(self._ids)
        return self._release(now[len(before):], final=False)

    def finish(self) -> str:
        """Return what was held back: the answer ends here."""
        if self.stopped:
            return ""
        before, now = self._decode(self._ids[self._from:self._read]), self._decode(self._ids[self._from:])
        self._read = len(self._ids)
        return self._release(now[len(before):], final=True)

    def _release(self, new: str, final: bool) -> str:
        held = self._held + new
        hits = [at for at in (held.find(one) for one in self._stop) if at >= 0]
        if hits:
            self.stopped, part, self._held = True, held[:min(hits)], ""
        else:
            keep = 0 if final else max((_overlap(held, one) for one in self._stop), default=0)
            part, self._held = held[:len(held) - keep], held[len(held) - keep:]
        self.text += part
        return part


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
