"""The fixed probes of coherence: what is asked, what was answered first, and how far later answers agree with it.

Rules: core, pure. The probes are asked greedily, so that an answer is a matter of the weights. A first round is kept
for each way of asking (ProbeKey): other weights under the same name are compared with it, another tokenizer, context or
number type begins anew. A kept round is never replaced, but for the one longest unused where MODELS_MAX are there.
Source: SELF.md, "coherence".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from statistics import fmean
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from crypto.errors import BadState
from node.averages import cosine, equal_share

PROMPTS: Final = (
    "Once upon a time there was",
    "The capital of France is",
    "Two and two make four, and four and four make",
    "Water is heated until it",
)
TEXTS: Final = (
    "A king had three daughters, and the youngest was the fairest.",
    "The train to the city leaves in the evening.",
    "To sort a list, compare its members and exchange them.",
)
ANSWER_TOKENS: Final = 16  # of each prompt's answer; together the least share that can be told is 1/64
MODELS_MAX: Final = 8
DIMENSIONS_MAX: Final = 65_536  # as node.work.Embedded
FILE_BYTES_MAX: Final = MODELS_MAX * (len(TEXTS) * 4 * DIMENSIONS_MAX + 65_536)
_IDS_DOMAIN: Final = b"openagi probes 1\0"

Name = Annotated[str, Meta(max_length=1_024)]
Answer = Annotated[tuple[Annotated[int, Meta(ge=0, lt=1 << 31)], ...], Meta(max_length=ANSWER_TOKENS)]
Vector = Annotated[bytes, Meta(max_length=4 * DIMENSIONS_MAX)]


class ProbeKey(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose answers can be compared. model, numbers (its number type or quantization), context_tokens: of the main
    model; encoder, encoder_numbers: of the one that embeds, "" for none; tokenizer: hex, of the probes' token ids."""

    model: Name
    numbers: Name
    context_tokens: Annotated[int, Meta(ge=0)]
    encoder: Name
    encoder_numbers: Name
    tokenizer: Annotated[str, Meta(min_length=64, max_length=64)]


class Round(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one round of the probes gave. answers: token ids, one a prompt, none where the model makes no text; vectors:
    little-endian fp32, one a text, none where nothing embeds; merges: how many rounds of training were merged then."""

    revision: Name
    merges: Annotated[int, Meta(ge=0)]
    answers: Annotated[tuple[Answer, ...], Meta(max_length=len(PROMPTS))] = ()
    vectors: Annotated[tuple[Vector, ...], Meta(max_length=len(TEXTS))] = ()


class _Entry(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    key: ProbeKey
    round: Round


class _File(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    entries: Annotated[tuple[_Entry, ...], Meta(max_length=MODELS_MAX)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far a round agrees with the kept one; None: there is nothing to compare. rounds: merged since."""

    rounds: int
    answers: float | None
    embeddings: float | None


class Kept:
    """The first rounds, the one last used last."""

    def __init__(self, rounds: Sequence[tuple[ProbeKey, Round]] = ()) -> None:
        self._rounds = dict(rounds)

    def find(self, key: ProbeKey) -> Round | None:
        """The first round that was asked so; None: this would be it."""
        found = self._rounds.get(key)
        if found is not None:
            self._rounds[key] = self._rounds.pop(key)
        return found

    def put(self, key: ProbeKey, first: Round) -> ProbeKey | None:
        """Keep a first round; whose was dropped for it, if one was."""
        assert key not in self._rounds, "a kept round is not replaced"
        self._rounds[key] = first
        if len(self._rounds) <= MODELS_MAX:
            return None
        oldest = next(iter(self._rounds))
        del self._rounds[oldest]
        return oldest

    def encode(self) -> bytes:
        """As a file has it."""
        entries = tuple(_Entry(key=key, round=first) for key, first in self._rounds.items())
        return msgspec.msgpack.encode(_File(entries=entries))


def decode(raw: bytes) -> Kept:
    """What `encode` wrote. Raises BadState."""
    try:
        file = msgspec.msgpack.decode(raw, type=_File)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise BadState(f"these are no probes: {exc}") from exc
    rounds = [(entry.key, entry.round) for entry in file.entries]
    if len(dict(rounds)) != len(rounds):
        raise BadState("two rounds of the same model are in it")
    if any(len(vector) % 4 for _, first in rounds for vector in first.vectors):
        raise BadState("a vector in it is not of whole numbers of four bytes")
    return Kept(rounds)


def tokenizer_of(ids: Sequence[Sequence[int]]) -> str:
    """What names a tokenizer: a digest of the probes' ids, hex."""
    packed = b"".join(struct.pack(f"<I{len(row)}I", len(row), *row) for row in ids)
    return sha256(_IDS_DOMAIN + packed).hexdigest()


def agreement(first: Round, now: Round) -> Agreement:
    """answers: equal tokens, place by place, over all places of the longer answers; embeddings: mean of the cosines of
    the texts' vectors. Raises BadFigure for vectors that are not finite."""
    return Agreement(
        rounds=max(0, now.merges - first.merges),
        answers=_of_answers(first.answers, now.answers),
        embeddings=_of_vectors(first.vectors, now.vectors),
    )


def _of_answers(first: Sequence[Sequence[int]], now: Sequence[Sequence[int]]) -> float | None:
    if not first or len(first) != len(now):
        return None
    pairs = list(zip(first, now, strict=True))
    places = [max(len(a), len(b)) for a, b in pairs]
    equal = sum((equal_share(a, b) or 0.0) * size for (a, b), size in zip(pairs, places, strict=True))
    return round(equal) / sum(places) if sum(places) else None  # `equal` is a count


def _of_vectors(first: Sequence[bytes], now: Sequence[bytes]) -> float | None:
    if not first or len(first) != len(now) or any(len(a) != len(b) for a, b in zip(first, now, strict=True)):
        return None
    found = [1.0 if a == b else cosine(_floats(a), _floats(b)) for a, b in zip(first, now, strict=True)]
    known = [each for each in found if each is not None]
    return min(1.0, max(-1.0, fmean(known))) if known else None


def _floats(vector: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(vector) // 4}f", vector)
