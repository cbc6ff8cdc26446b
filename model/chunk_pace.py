"""How many tokens of a prompt one step may take in while others decode, from what steps have taken so far.

Rules: core; seconds come in as arguments. While a long prompt comes in, the time between two tokens of a running answer
is at most STRETCH times what it is without, in the mean; one step takes at most LONGEST times as long. So there are
large chunks, and steps without one in between: a token of a small chunk costs several times one of a large chunk. A
prompt that is taken in whole by one step does not wait for that. Who comes while nothing decodes is not held back by
those that came with it: until BURST chunks are taken in, or a step has no prompt, chunks are as large as they may be,
so that a crowd soon decodes together.

Such a prompt may even have a step of its own, in which the decodes are passed over: its first token comes sooner by
what they would have taken, and theirs later by what every pass costs however little it does. So only where many decodes
take ALONE_MIN times what the fewest did (on an accelerator they hardly do), never twice in a row, and it counts as time
that the decodes have waited: what such a step takes, the next may not.
"""

from __future__ import annotations

STRETCH = 2.0
LONGEST = 4.0
RESTS = 4  # steps between two chunks, at most
BURST = 4  # of the largest chunks, once nothing decoded
ALONE_MIN = 1.5
WEIGHT = 0.2  # of the newest step in a mean: one slow step does not move it far


class ChunkPace:
    """The measured times of one engine's steps."""

    def __init__(self, chunk_min: int, chunk_max: int) -> None:
        self._chunk_min, self._chunk_max = chunk_min, chunk_max
        self._decode_s: dict[int, float] = {}  # of a step, by how many decode
        self._token_s: dict[int, float] = {}  # of one token of prompt, by the bits of a chunk's length
        self._burst = 0  # tokens of prompt that are left of it
        self._debt_s = 0.0  # what decodes have waited beyond their part
        self._passed_s = 0.0  # what the step took in which they were passed over, until the next of theirs
        self._rests = 0

    def chunk(self, decodes: int) -> int:
        """Tokens of prompt beside so many decodes, 0 to let them catch up; chunk_min until both times are measured. To
        be asked once a step."""
        if not decodes:
            self._burst = BURST * self._chunk_max
            return self._chunk_max
        if self._burst:
            return min(self._burst, self._chunk_max)
        alone_s = self._alone_s(decodes)
        if alone_s is None and not self._rests:
            self._rests = 1  # a step without a prompt, to be measured; once, for there may be no clock
            return 0
        if alone_s is None or not self._token_s:
            self._rests = 0
            return self._chunk_min
        if self._debt_s > 0.0 and self._rests < RESTS:
            self._rests += 1
            return 0
        self._rests = 0
        return self._largest(alone_s * (LONGEST - 1.0) - self._passed_s)

    def at_once(self, decodes: int) -> int:
        """Tokens of prompts that end with them, in a step whose chunk is 0."""
        alone_s = self._alone_s(decodes)
        if alone_s is None or not self._token_s:
            return 0
        return self._largest(alone_s * (LONGEST - 1.0) - self._passed_s)

    def alone(self, decodes: int) -> int:
        """Tokens of prompts that end with them, in a step of their own before these decode; 0: there is to be none."""
        alone_s = self._alone_s(decodes)
        if alone_s is None or not self._token_s or self._burst or self._passed_s or self._debt_s > alone_s:
            return 0
        pass_s = min(self._decode_s.values())
        return self._largest(alone_s * (LONGEST - 1.0) - pass_s) if alone_s >= ALONE_MIN * pass_s else 0

    def note(self, decodes: int, prefilled: int, seconds: float, passed_over: int = 0) -> None:
        """Takes in one step: how many decoded, how many tokens of prompts, and what it took; 0: not measured.
        passed_over: how many would have decoded in a step that prompts had to themselves."""
        if passed_over:
            self._debt_s, self._passed_s = self._debt_s + seconds, max(seconds, 1e-9)
            return
        self._passed_s = 0.0
        is_burst, self._burst = self._burst > 0, max(0, self._burst - prefilled) if prefilled else 0
        if seconds <= 0.0:
            return
        if not prefilled and decodes:
            self._decode_s[decodes] = _mean(self._decode_s.get(decodes), seconds)
        # without a measure of the decodes all of it counts as the prompt's, which errs to the careful side
        alone_s = self._alone_s(decodes) or 0.0
        more_s = max(0.0, seconds - alone_s) if prefilled else 0.0
        if prefilled:
            bits = prefilled.bit_length()
            self._token_s[bits] = _mean(self._token_s.get(bits), more_s / prefilled)
        is_free = is_burst or not decodes
        self._debt_s = 0.0 if is_free else max(0.0, self._debt_s + more_s - alone_s * (STRETCH - 1.0))

    def _largest(self, room_s: float) -> int:
        """The largest chunk that takes no longer, by what chunks of about its size have taken."""
        size = self._chunk_max
        while size > self._chunk_min:
            bits = size.bit_length()
            near = min(self._token_s, key=lambda known: (abs(known - bits), known))
            fits = size if self._token_s[near] * size <= room_s else int(room_s / self._token_s[near])
            if fits.bit_length() == bits:
                return max(self._chunk_min, fits)
            size = min(fits, size >> 1) if fits else 0
        return self._chunk_min

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
