"""One request at a server behind this node: sent, its stream read, its items handed on, its failures in our words.

Rules: shell of node/upstream_telling.py. A request ends in one of: Finished, an error, cancellation by its owner, which
closes the connection, and that is how servers learn that nobody waits. Silence is judged by what can be seen: before
the first token the looks at the server speak for it, after it the stream must bring something within STALL_S.
Source: node/judge.py has the same rules for peers.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import trio

from node.errors import (
    NO_ROOM_RETRY_S,
    BadRequest,
    NoRoom,
    NotReady,
    PeerFailed,
    RequestError,
    TooLarge,
    UnknownModel,
)
from node.judge import FIRST_TOKEN_SHARE
from node.upstream_dialect import Ask
from node.upstream_health import Health, Room
from node.upstream_http import Answered, Server, Trouble, Unreached
from node.upstream_stream import DONE, Chunk, Events, Garbled, chunk_of
from node.upstream_telling import Telling
from node.work import AnswerItem, GenerateWork, Progress

STALL_S = 15.0  # below what peers bear of a server whose speed they do not know (node/judge.py): we say first why
PIECES_HELD = 1_024  # for a client that reads slower than the server writes; then the server waits
DRAIN_S = 1.0  # for the last bytes behind the end, so that the connection can be used again


@dataclass(slots=True, eq=False)
class Job:
    """One request: where its items go, and what stops it."""

    work: GenerateWork
    telling: Telling
    send: trio.MemorySendChannel[AnswerItem | RequestError]
    began: float
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    is_there: bool = False  # the server has it
    is_over: bool = False  # its last item is sent
    failure: RequestError | None = None  # why it was stopped, if not by its owner
    told: Progress | None = None
    prefilled_tokens: int = 0

    @property
    def first_by(self) -> float:
        """Until when its first token must be there, so that time is left for another peer."""
        if self.telling.counted:
            return math.inf
        return self.began + FIRST_TOKEN_SHARE * self.work.remaining_ms / 1000

    def stop(self, failure: RequestError) -> None:
        """End it with this error."""
        if not self.is_over and self.failure is None:
            self.failure = failure
            self.scope.cancel()

    def leave(self) -> None:
        """Its owner has left."""
        if not self.is_over:
            self.scope.cancel()


class Asking:
    """Requests to one server, and what each teaches of it."""

    def __init__(self, server: Server, health: Health, room: Room) -> None:
        self._server = server
        self._health = health
        self._room = room

    async def answer(self, job: Job, ask: Ask) -> None:
        """Send the request and hand its items on, the last one included. Raises RequestError."""
        began_flow = False
        try:
            async with self._server.stream(ask.path, ask.body) as content:
                job.is_there = True
                async for chunk in self._chunks(content, job):
                    if not began_flow and (chunk.text or chunk.calls or chunk.has_reasoning):
                        began_flow = True
                        self._room.began(trio.current_time())
                    await self._hand_on(job, chunk)
                items = job.telling.end()
                job.is_over = True
                for item in items:
                    await job.send.send(item)
                with trio.move_on_after(DRAIN_S):
                    async for _ in content:
                        pass
        except (Trouble, Garbled) as exc:
            if not job.is_over:
                raise self.error_of(exc, is_mid=job.telling.counted > 0) from exc
        finally:
            if began_flow:
                self._room.ended(trio.current_time())
        self._health.answered(trio.current_time())

    async def _chunks(self, content: AsyncIterator[bytes], job: Job) -> AsyncIterator[Chunk]:
        """Until the server says that it is done, or closes. Raises Garbled, Trouble, PeerFailed for a stall."""
        events, top = Events(), job.work.sampling.logprobs
        heard = trio.current_time()
        while True:
            with trio.move_on_at(heard + STALL_S if job.telling.counted else math.inf) as scope:
                part = await anext(content, None)
            if scope.cancelled_caught:
                raise PeerFailed(f"the server behind this node sent nothing for {STALL_S:.0f} s in mid-answer")
            if part is None:
                return
            for event in events.feed(part):
                if event == DONE:
                    return
                chunk = chunk_of(event, top=top)
                is_work = chunk.text or chunk.calls or chunk.has_reasoning
                if is_work or chunk.finish or chunk.prefilled_tokens is not None:
                    heard = trio.current_time()
                yield chunk

    async def _hand_on(self, job: Job, chunk: Chunk) -> None:
        before = job.telling.counted
        items = job.telling.take(chunk, self._room.steps)
        now = trio.current_time()
        if job.telling.counted > before or chunk.prefilled_tokens is not None:
            self._room.came(job.telling.counted - before, now)
        job.prefilled_tokens = max(job.prefilled_tokens, chunk.prefilled_tokens or 0)
        for item in items:
            await job.send.send(item)

    def error_of(self, trouble: Trouble | Garbled, *, is_mid: bool) -> RequestError:
        """What a failure means: noted of the server, and in the client's words. is_mid: an answer was flowing."""
        health, now = self._health, trio.current_time()
        if isinstance(trouble, Answered):
            return self._answered(trouble, now)
        if isinstance(trouble, Unreached):
            health.failed("unreached", str(trouble), now, is_gone=trouble.is_gone)
            if not is_mid:
                return NotReady(
                    f"the server behind this node does not answer: {trouble}", retry_after_s=health.retry_after_s(now)
                )
        else:
            health.failures["garbled"] += 1
        return PeerFailed(f"the server behind this node failed: {trouble}")

    def _answered(self, error: Answered, now: float) -> RequestError:
        health, said = self._health, f"the server of this model says: {error.message}"
        match error.status:
            case 400 | 409 | 415 | 422:
                health.failures["bad_request"] += 1
                return BadRequest(said)
            case 413:
                return TooLarge(said)
            case 404:
                health.failures["not_found"] += 1
                return UnknownModel(said, param="model")
            case 401 | 403:
                health.refused(REFUSED_KEY, now)
                return NotReady("the server behind this node refuses it", retry_after_s=health.retry_after_s(now))
            case 408 | 425 | 429 | 503:
                health.full(f"it answers {error.status}: {error.message}", error.retry_after_s, now)
                return NoRoom(said, retry_after_s=max(NO_ROOM_RETRY_S, health.retry_after_s(now)))
            case _:
                health.failures["server_error"] += 1
                return PeerFailed(f"the server behind this node answered {error.status}: {error.message}")


REFUSED_KEY = "it refuses this node's key: give the right one with --backend-key-file"
