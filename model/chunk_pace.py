"""How many tokens of a prompt one step may take in while others decode, from what steps have taken so far.

Rules: core; seconds come in as arguments. A step of decodes alone has a measured time for each number of them; a token
of prompt has one too. A chunk is as large as makes a step take STRETCH times what its decodes take alone. But who comes
while nothing decodes is not held back by those that came with it: until BURST chunks are taken in, or a step has no
prompt, chunks are as large as they may be, so that a crowd soon decodes together.
"""

from __future__ import annotations

STRETCH = 2.0  # of the time between two tokens of a running answer, while a prompt comes in
BURST = 4  # of the largest chunks, once nothing decoded
WEIGHT = 0.2  # of the newest step in a mean: one slow step does not move it far


class ChunkPace:
    """The measured times of one engine's steps."""

    def __init__(self, chunk_min: int, chunk_max: int) -> None:
        self._chunk_min, self._chunk_max = chunk_min, chunk_max
        self._decode_s: dict[int, float] = {}  # of a step, by how many decode
        self._token_s: float | None = None  # of one token of prompt
        self._burst = 0  # tokens of prompt that are left of it

    def chunk(self, decodes: int) -> int:
        """Tokens of prompt beside so many decodes; chunk_min until both times are measured."""
        if not decodes:
            self._burst = BURST * self._chunk_max
            return self._chunk_max
        return max(self._stretched(decodes), min(self._burst, self._chunk_max))

    def _stretched(self, decodes: int) -> int:
        alone_s = self._alone_s(decodes)
        if alone_s is None or self._token_s is None:
            return self._chunk_min
        if alone_s * (STRETCH - 1.0) >= self._token_s * self._chunk_max:
            return self._chunk_max
        return max(self._chunk_min, int(alone_s * (STRETCH - 1.0) / self._token_s))

    def note(self, decodes: int, prefilled: int, seconds: float) -> None:
        """Takes in one step: how many decoded, how many tokens of prompts, and what it took; 0: not measured."""
        self._burst = max(0, self._burst - prefilled) if prefilled else 0
        if seconds <= 0.0:
            return
        if not prefilled and decodes:
            self._decode_s[decodes] = _mean(self._decode_s.get(decodes), seconds)
        elif prefilled:
            # without a measure of the decodes all of it counts as the prompt's, which errs to the careful side
            alone_s = self._alone_s(decodes) or 0.0
            self._token_s = _mean(self._token_s, max(0.0, seconds - alone_s) / prefilled)

    def _alone_s(self, decodes: int) -> float | None:
        """The time of these decodes alone: measured, or not more than it would be."""
        if not decodes or not self._decode_s:
            return None
        fewer = [count for count in self._decode_s if count <= decodes]
        if fewer:
            return self._decode_s[max(fewer)]
        more = min(self._decode_s)
        return self._decode_s[more] * decodes / more


def _mean(before: float | None, now: float) -> float:
    return now if before is None else before + WEIGHT * (now - before)
