"""Complete answers that are kept for who asks the same again: what may be kept, how it is taken down and given again.

Rules: core. Kept is what the asker says may be (GenerateWork.keep) and did not mark private, made here from its first
token to its finish reason. Given again are the same tokens, text and numbers, as pieces of PIECE_TOKENS and about
PIECE_BYTES at most; who has the first tokens already gets the rest, if these tokens are those of the answer.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from model.config import ModelFacts
from node.cache import Cache, Key, key_of
from node.embed_queue import Made
from node.requester import Requester
from node.work import AnswerItem, Finished, GenerateWork, Piece, Started, TokenLogprob

KIND = "completion"  # in the cache's counts
PIECE_TOKENS = 64
PIECE_BYTES = 32_768  # a quarter of what an item of a call may have
PIECE_CHARS = PIECE_BYTES // 4
TOKEN_BYTES = 8  # of a token and of where its text ends
LOGPROB_BYTES, ALTERNATIVE_BYTES = 256, 192  # about what the Python objects take
Reason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptAnswer:
    """ends: how many characters were certain after each token. logprobs: one a token, or none."""

    prompt_tokens: int
    tokens: array[int]
    text: str
    ends: array[int]
    logprobs: tuple[TokenLogprob, ...]
    reason: Reason


Kept = KeptAnswer | Made  # what the cache holds


def key_of_work(work: GenerateWork, facts: ModelFacts, requester: Requester) -> Key | None:
    """What the answer is found by; None: it is not to be kept. A greedy answer has no seed."""
    if not work.may_be_kept:
        return None
    sampling = work.sampling if work.sampling.temperature else msgspec.structs.replace(work.sampling, seed=0)
    return key_of(facts, requester, KIND, work.messages, work.text, work.tokens, sampling, work.tools)


@dataclass(slots=True, kw_only=True)
class Recording:
    """One answer as it is made. bytes_max: beyond it nothing more is taken down."""

    key: Key
    requester: Requester
    bytes_max: int
    bytes: int = 0
    _tokens: array[int] = field(default_factory=lambda: array("I"))
    _texts: list[str] = field(default_factory=list)
    _chars: int = 0
    _ends: array[int] = field(default_factory=lambda: array("I"))
    _logprobs: list[TokenLogprob] = field(default_factory=list)

    def take(self, piece: Piece) -> None:
        """What one step made."""
        self.bytes += TOKEN_BYTES * len(piece.tokens) + 4 * len(piece.text) + sum(map(_bytes_of, piece.logprobs))
        if self.bytes > self.bytes_max:
            for part in (self._tokens, self._texts, self._ends, self._logprobs):
                del part[:]
            return
        self._tokens.extend(piece.tokens)
        self._texts.append(piece.text)
        self._chars += len(piece.text)
        self._logprobs.extend(piece.logprobs)
        self._ends.extend([self._chars] * len(piece.tokens))
        if self._ends:
            self._ends[-1] = self._chars

    def whole(self, prompt_tokens: int, reason: Reason) -> KeptAnswer | None:
        """The answer, which is complete now; None: it is too large, or its parts do not fit together."""
        if self.bytes > self.bytes_max or len(self._logprobs) not in (0, len(self._tokens)):
            return None
        if self._chars and not self._tokens:
            return None
        return KeptAnswer(
            prompt_tokens=prompt_tokens,
            tokens=self._tokens,
            text="".join(self._texts),
            ends=self._ends,
            logprobs=tuple(self._logprobs),
            reason=reason,
        )


def items_of(kept: KeptAnswer, work: GenerateWork, served_by: str, facts: ModelFacts) -> list[AnswerItem] | None:
    """The answer, or what of it the client does not have; None: what it has is not the beginning of this answer."""
    had = len(work.delivered)
    if tuple(kept.tokens[:had]) != tuple(work.delivered) or work.delivered_chars > len(kept.text):
        return None
    started = Started(
        served_by=served_by,
        model=facts.name,
        revision=facts.revision,
        prompt_tokens=kept.prompt_tokens,
        cached=True,
        calls=None if work.tools is None else facts.calls,
    )
    items: list[AnswerItem] = [started]
    token, char = had, work.delivered_chars
    while token and char < kept.ends[token - 1]:  # text of tokens that the client has, and that it lacks
        text = kept.text[char : min(char + PIECE_CHARS, kept.ends[token - 1])]
        items.append(Piece(tokens=(), text=text))
        char += len(text)
    while token < len(kept.tokens):
        end = _piece_end(kept, token)
        items.append(_piece(kept, token, end, char))
        char = max(char, kept.ends[end - 1])
        token = end
    finished = Finished(reason=kept.reason, prompt_tokens=kept.prompt_tokens, completion_tokens=len(kept.tokens))
    return [*items, finished]


def _piece(kept: KeptAnswer, begin: int, end: int, char: int) -> Piece:
    return Piece(
        tokens=tuple(kept.tokens[begin:end]),
        text=kept.text[char : max(char, kept.ends[end - 1])],
        logprobs=kept.logprobs[begin:end],
    )


def _piece_end(kept: KeptAnswer, begin: int) -> int:
    """Behind the last token of a piece that begins at this one."""
    end = min(begin + PIECE_TOKENS, len(kept.tokens))
    before = kept.ends[begin - 1] if begin else 0
    end = min(end, max(begin + 1, bisect_left(kept.ends, before + PIECE_CHARS, begin, end)))
    size = 0
    for at, logprob in enumerate(kept.logprobs[begin:end], begin):
        size += _bytes_of(logprob)
        if size > PIECE_BYTES and at > begin:
            return at
    return end


def _bytes_of(logprob: TokenLogprob) -> int:
    """About what it takes, here and on the wire."""
    texts = len(logprob.text) + sum(len(text) for text, _ in logprob.top)
    return LOGPROB_BYTES + ALTERNATIVE_BYTES * len(logprob.top) + 4 * texts


class Answers:
    """The complete answers in a node's cache."""

    def __init__(self, cache: Cache[Kept], *, peer: str) -> None:
        self.cache, self._peer = cache, peer

    def again(self, work: GenerateWork, requester: Requester, facts: ModelFacts) -> list[AnswerItem] | None:
        """The answer that is kept for this requester and model, item by item; None when there is none."""
        if work.revision not in (None, facts.revision):
            return None
        key = key_of_work(work, facts, requester)
        kept = None if key is None else self.cache.find(KIND, requester, key)
        return items_of(kept, work, self._peer, facts) if isinstance(kept, KeptAnswer) else None

    def recording(self, work: GenerateWork, requester: Requester, facts: ModelFacts) -> Recording | None:
        """What is to be told of an answer that begins now; None when it is not to be kept."""
        key = key_of_work(work, facts, requester)
        if key is None or work.delivered:  # what another made is not this model's
            return None
        return Recording(key=key, requester=requester, bytes_max=self.cache.entry_bytes_max(requester.priority))

    def keep(self, recording: Recording, prompt_tokens: int, reason: Reason) -> None:
        """The answer is complete."""
        if (kept := recording.whole(prompt_tokens, reason)) is not None:
            self.cache.put(KIND, recording.requester, recording.key, kept, recording.bytes)
