"""Vectors by the model hosted here: what is kept of earlier ones, who waits, and the turns in which the rest is made.

Rules: core; node/hosting.py owns the thread and says when. A request's vectors are all of one revision: what was kept
of another is made again. A text that cannot be embedded ends its own request and no other.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from model.config import ModelFacts
from model.errors import ModelError
from model.requests import Embeddings
from model.runtime_face import Runtime
from node.cache import Cache, key_of
from node.embed_queue import EmbedJob, EmbedQueue, EmbedTurn, Made
from node.engine_words import request_error
from node.kept_answers import Kept
from node.requester import Requester
from node.work import Embedded, EmbedWork

KIND = "embedding"  # in the cache's counts
MADE_BYTES = 128  # of an entry, beside its vector


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingStatistics:
    """Counts since start. padding_share: of the tokens that went through the model, those that were no text's.
    turn_bytes: of text, that a turn takes now."""

    waiting: int
    requests: int
    texts: int
    tokens: int
    padded_tokens: int
    padding_share: float
    passes: int
    turns: int
    turn_bytes: int


class Embedding:
    """All requests for vectors at one model."""

    def __init__(self, runtime: Runtime, cache: Cache[Kept], *, peer: str) -> None:
        self._runtime, self._cache, self._peer = runtime, cache, peer
        self._queue = EmbedQueue()
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def queued_bytes(self) -> int:
        """Of the texts of all requests that have not ended."""
        return self._queue.room.bytes

    def admit(self, work: EmbedWork, requester: Requester, on_end: Callable[[], None]) -> EmbedJob:
        """Take a request in; it may have its result at once. Raises NoRoom, TooMany."""
        nothing: list[Made | None] = [None] * len(work.texts)
        job = EmbedJob(work=work, requester=requester, on_end=on_end, facts=self._runtime.embedding_facts, made=nothing)
        self._look_up(job)
        if job.pending:
            self._queue.add(job)
        else:
            self._end(job)
        self._counts["requests"] += 1
        return job

    def leave(self, job: EmbedJob) -> None:
        """Its owner is gone, or has the result."""
        self._queue.remove(job)

    def has_next(self, *, is_held: bool) -> bool:
        """Whether a turn would have texts. is_held: of requests that have begun only."""
        return self._queue.has_next(is_held=is_held)

    def take(self, *, is_held: bool, share: float) -> EmbedTurn | None:
        """The next turn; None when nothing waits."""
        turn = self._queue.take(is_held=is_held, share=share)
        return turn if turn.texts else None

    def carry_out(self, turn: EmbedTurn) -> None:
        """In the worker thread."""
        try:
            turn.result = self._runtime.embed([job.work.texts[place] for job, place in turn.texts])
        except ModelError as exc:
            turn.result = exc

    def settle(self, turn: EmbedTurn) -> None:
        """A turn is over: its vectors to their requests, and an error to the one whose fault it is."""
        if isinstance(turn.result, Embeddings):
            self._note(turn, turn.result)
            self._hand_out(turn, turn.result)
        else:
            assert turn.result is not None, "a turn is carried out before it is settled"
            self._failed(turn, turn.result)
        for job in dict.fromkeys(job for job, _ in turn.texts):
            if job.result is None and None not in job.made:
                self._end(job)

    def statistics(self) -> EmbeddingStatistics:
        """A snapshot of the counters."""
        counts, padded = self._counts, self._counts["padded_tokens"]
        return EmbeddingStatistics(
            waiting=len(self._queue),
            requests=counts["requests"],
            texts=counts["texts"],
            tokens=counts["tokens"],
            padded_tokens=padded,
            padding_share=round(1 - counts["tokens"] / padded, 4) if padded else 0.0,
            passes=counts["passes"],
            turns=counts["turns"],
            turn_bytes=self._queue.turn_bytes,
        )

    # within

    def _look_up(self, job: EmbedJob) -> None:
        """What is kept of the texts of a request; the others are pending."""
        job.pending = deque()
        for place, text in enumerate(job.work.texts):
            kept = None
            if job.work.may_be_kept:
                kept = self._cache.find(KIND, job.requester, key_of(job.facts, job.requester, KIND, text))
            job.made[place] = kept if isinstance(kept, Made) else None
            if job.made[place] is None:
                job.pending.append(place)

    def _hand_out(self, turn: EmbedTurn, result: Embeddings) -> None:
        each = zip(turn.texts, result.vectors, result.truncated, result.lengths, strict=True)
        for (job, place), vector, truncated, tokens in each:
            if job.facts != result.facts:
                self._begin_again(job, result.facts)
            job.made[place] = made = Made(vector, truncated, tokens)
            if job.work.may_be_kept:
                key = key_of(result.facts, job.requester, KIND, job.work.texts[place])
                self._cache.put(KIND, job.requester, key, made, len(vector) + MADE_BYTES)
            if place in job.pending:  # it was begun again, and this text of this turn need not be
                job.pending.remove(place)

    def _begin_again(self, job: EmbedJob, facts: ModelFacts) -> None:
        """The model went on between the request's coming and its first turn."""
        job.facts = facts
        self._look_up(job)

    def _failed(self, turn: EmbedTurn, error: ModelError) -> None:
        jobs = {job for job, _ in turn.texts}
        guilty = next(iter(jobs)) if len(jobs) == 1 else None
        if error.place is not None and error.place < len(turn.texts):
            guilty = turn.texts[error.place].job
        if guilty is not None:
            guilty.result = request_error(error)
            self._queue.remove(guilty)
            guilty.on_end()
        rest = [text for text in turn.texts if text.job is not guilty]
        self._queue.give_back(rest, are_alone=guilty is None)

    def _end(self, job: EmbedJob) -> None:
        made = [one for one in job.made if one is not None]
        job.result = Embedded(
            served_by=self._peer,
            model=job.facts.name,
            revision=job.facts.revision,
            dimensions=len(made[0].vector) // 4,
            vectors=tuple(one.vector for one in made),
            truncated=tuple(one.truncated for one in made),
            prompt_tokens=sum(one.tokens for one in made),
        )
        self._queue.remove(job)
        job.on_end()

    def _note(self, turn: EmbedTurn, result: Embeddings) -> None:
        self._queue.took(turn, result.seconds)
        tokens = result.tokens
        for name, count in (
            ("turns", 1),
            ("texts", len(turn.texts)),
            ("tokens", tokens),
            ("padded_tokens", max(tokens, result.padded)),
            ("passes", result.passes),
        ):
            self._counts[name] += count
