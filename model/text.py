"""Tokens of an answer -> the text that is certain: whole characters only, and no part of a stop string.

Rules: core. The state is a function of the prompt's last tokens and of the answer's tokens in order, so a second peer
that pushes the delivered tokens again stands exactly where the first one stood, and the client's text has no seam.
Text that ends in an incomplete character (U+FFFD) or in what may become a stop string is held back.
Source: windowed incremental decoding as in vllm `vllm/transformers_utils/detokenizer_utils.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 6  # of the prompt: decoders drop a leading space only at the very start of a text
WINDOW_TOKENS = 16  # decoded anew at each token, so its length is the cost of a token
HELD_TOKENS_MAX = 64  # a model that emits broken bytes without end is not held back for ever


class TextStream:
    """The incremental text of one answer."""

    __slots__ = ("_clean", "_decode", "_pending", "_seen", "_skip", "_stops", "_window", "stopped")

    def __init__(self, decode: Decode, prompt: Sequence[int], stop: tuple[str, ...] = (), skip_chars: int = 0) -> None:
        """`decode` turns ids into text. `skip_chars` characters of the answer are not given out again."""
        self._decode = decode
        self._window = list(prompt[-CONTEXT_TOKENS:])
        self._seen = len(decode(self._window).rstrip(REPLACEMENT)) if self._window else 0
        self._clean = 0  # tokens of the window up to the last character boundary but one
        self._stops = tuple(text for text in stop if text)
        self._skip = skip_chars
        self._pending = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Adds a token; returns the text that became certain with it. After a stop string `stopped` is True."""
        self._window.append(token)
        text = self._decode(self._window)
        whole = len(text.rstrip(REPLACEMENT))
        if len(self._window) >= HELD_TOKENS_MAX:
            whole = len(text)
        fresh = text[self._seen : whole]
        self._seen = max(self._seen, whole)
        if whole == len(text):
            self._slide()
        return self._release(fresh, final=False)

    def finish(self) -> str:
        """The rest of the text, broken characters as U+FFFD; nothing may be pushed after it."""
        fresh = self._decode(self._window)[self._seen :] if self._window else ""
        return self._release(fresh, final=True)

    def _slide(self) -> None:
        """Forgets the window's start at a character boundary, when enough text remains for context."""
        if len(self._window) < WINDOW_TOKENS:
            return
        if self._clean:
            kept = self._window[self._clean :]
            text = self._decode(kept)
            if text or len(kept) >= HELD_TOKENS_MAX:
                self._window = kept
                self._seen = len(text)
        self._clean = len(self._window)

    def _release(self, fresh: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._pending + fresh
        found = min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=-1)
        if found >= 0:
            self.stopped = True
            self._pending = ""
            return self._unseen(text[:found])
        held = 0 if final else max((_overlap(text, stop) for stop in self._stops), default=0)
        certain = len(text) - held
        self._pending = text[certain:]
        return self._unseen(text[:certain])

    def _unseen(self, text: str) -> str:
        drop = min(self._skip, len(text))
        self._skip -= drop
        return text[drop:]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a proper start of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
