"""Who runs and who waits: slots, the queue, and tokens of KV memory, each with its bound.

Rules: core, no torch. First come, first served: a request that waits for room is not overtaken, so none starves. The
room of a request is taken whole when it is admitted (prompt and all its answer), so none runs out in mid-answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from model.config import EngineConfig
from model.errors import BadInput, EngineFull


@dataclass(frozen=True, slots=True)
class _Waiting:
    request_id: str
    tokens: int


class Schedule:
    """Admission for one engine."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._waiting: deque[_Waiting] = deque()
        self._running: dict[str, int] = {}
        self._kv_tokens_used = 0

    def add(self, request_id: str, tokens: int) -> None:
        """Queues a request that needs `tokens` of KV memory in all.

        Raises BadInput (it can never fit, or its id is in use), EngineFull (the queue is at its bound).
        """
        if tokens > self._config.kv_tokens:
            raise BadInput(
                f"the prompt and its answer need {tokens:,} tokens of KV memory and this node has "
                f"{self._config.kv_tokens:,}; ask for fewer tokens"
            )
        if self.position(request_id) is not None:
            raise BadInput(f"request id {request_id!r} is already in use; choose another")
        if len(self._waiting) + 1 - self._admissible(tokens) > self._config.queue_max:
            raise EngineFull(
                f"{len(self._running)} requests run and {len(self._waiting)} wait; the queue is full, try again later"
            )
        self._waiting.append(_Waiting(request_id, tokens))

    def admit(self) -> Iterator[str]:
        """Moves waiting requests into free slots, in order, while there is room; yields their ids."""
        while self._waiting and self._fits(self._waiting[0].tokens):
            first = self._waiting.popleft()
            self._running[first.request_id] = first.tokens
            self._kv_tokens_used += first.tokens
            yield first.request_id

    def release(self, request_id: str) -> None:
        """Gives back the room of a request that ended; forgets one that waited."""
        if (tokens := self._running.pop(request_id, None)) is not None:
            self._kv_tokens_used -= tokens
        elif self._waiting:
            self._waiting = deque(w for w in self._waiting if w.request_id != request_id)

    def position(self, request_id: str) -> int | None:
        """0 for a request that runs, its place in the queue from 1, None for an unknown one."""
        if request_id in self._running:
            return 0
        places = (at for at, waiting in enumerate(self._waiting, start=1) if waiting.request_id == request_id)
        return next(places, None)

    @property
    def slots_free(self) -> int:
        """Slots without a request; waiting requests do not count."""
        return self._config.slots - len(self._running)

    @property
    def kv_tokens_free(self) -> int:
        """Tokens of KV memory that no running request has taken."""
        return self._config.kv_tokens - self._kv_tokens_used

    @property
    def queue_length(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def _fits(self, tokens: int) -> bool:
        return self.slots_free > 0 and tokens <= self.kv_tokens_free

    def _admissible(self, newcomer: int) -> int:
        """How many of those that wait, and of a newcomer behind them, the next step will admit."""
        room, count = self.kv_tokens_free, 0
        for tokens in (*(waiting.tokens for waiting in self._waiting), newcomer):
            if count >= self.slots_free or tokens > room:
                break
            room -= tokens
            count += 1
        return count
