"""Where a request is answered: by the model hosted here, or by the best peer, with takeover when that peer fails.

Rules: a request carries its remaining time and the tokens already delivered, so that another peer goes on where the
last one stopped. A peer is judged by work: if neither its tokens nor its reported progress advance for STALL_S it
counts as frozen, however open its connection is. A peer that serves never routes further, so there are no loops.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import trio

from crypto.identity import PeerId
from gossip.routing import Candidate, Need, Why, WhyNot
from node.errors import (
    BadRequest,
    DeadlinePassed,
    NoRoom,
    NotReady,
    PeerFailed,
    RequestError,
    TooLarge,
    UnknownModel,
)
from node.front import FrontStatistics, Route, RouteHint
from node.hosting import NO_ROOM_RETRY_S, Hosting
from node.remote import Network, Remote
from node.work import REMAINING_MS_MAX, AnswerItem, Embedded, EmbedWork, Finished, GenerateWork, Piece, Started

INFER_PROTOCOL = "/openagi/infer/1"
PIECES_BUFFERED = 64  # a client that reads slower than the model writes holds this many pieces back
ATTEMPTS_MAX = 8
DEADLINE_GRACE_MS = 100
FULL_WAIT_S = 0.5  # between looks for room, for an answer that has begun


@dataclass(slots=True, kw_only=True)
class _Attempt:
    """What one request has behind it: who failed, what the client already has."""

    deadline: float
    tried: set[str] = field(default_factory=set)  # peer ids; ours when the local engine failed
    tokens: list[int] = field(default_factory=list)
    chars: int = 0
    started: Started | None = None
    last_error: RequestError | None = None

    def failed(self, who: str, error: RequestError, *, may_have_room_later: bool = False) -> None:
        """That one is not asked again for this request, unless all it said was that it is full now."""
        if not (may_have_room_later and isinstance(error, NoRoom)):
            self.tried.add(who)
        self.last_error = error

    def take(self, item: AnswerItem) -> None:
        """The client has this now."""
        if isinstance(item, Piece):
            self.tokens.extend(item.tokens)
            self.chars += len(item.text)

    def continued(self, work: GenerateWork) -> GenerateWork:
        """The same request, for the next peer: less time, more delivered."""
        changes: dict[str, Any] = {"remaining_ms": self.left_ms()}
        if self.started is not None:
            changes |= {
                "model": self.started.model,
                "revision": self.started.revision,
                "delivered": (*work.delivered, *self.tokens),
                "delivered_chars": work.delivered_chars + self.chars,
            }
        return msgspec.structs.replace(work, **changes)

    def left_ms(self) -> int:
        """Milliseconds that the next server has: a little more than is left, so that it is we who say it is over."""
        left_ms = max(0, int((self.deadline - trio.current_time()) * 1000))
        return min(left_ms + DEADLINE_GRACE_MS, REMAINING_MS_MAX)


class Answer:
    """The items of one answer, in order; iterating raises the RequestError that ended it."""

    def __init__(self, receive: trio.MemoryReceiveChannel[AnswerItem | RequestError]) -> None:
        self._receive = receive

    def __aiter__(self) -> AsyncIterator[AnswerItem]:
        return self

    async def __anext__(self) -> AnswerItem:
        try:
            item = await self._receive.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None
        if isinstance(item, RequestError):
            raise item
        return item


class Inference:
    """Implements node.front's answer and embed over the local engine and the network."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.hosting: Hosting | None = None
        self.draining = False
        self.counts: Counter[str] = Counter()  # requests; finished, cancelled, error:CODE; takeovers, ...
        self._remote = Remote(network, self.counts)
        self._running = 0
        self._ended = trio.lowlevel.ParkingLot()
        self._latency_s_sum = 0.0

    @asynccontextmanager
    async def answer(self, work: GenerateWork, route: RouteHint) -> AsyncIterator[Answer]:
        """Answer a request wherever it is best answered. Leaving the block cancels it there within one step."""
        with self._counted(), _single():
            send, receive = trio.open_memory_channel[AnswerItem | RequestError](PIECES_BUFFERED)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._drive, work, route, send)
                try:
                    yield Answer(receive)
                finally:
                    nursery.cancel_scope.cancel()

    async def embed(self, work: EmbedWork, route: RouteHint) -> Embedded:
        """Embed texts here or at a peer. Raises RequestError. If cancelled, the work is given up wherever it runs."""
        with self._counted(), self._outcome():
            began = trio.current_time()
            attempt = _Attempt(deadline=began + work.remaining_ms / 1000)
            with trio.move_on_at(attempt.deadline):
                embedded = await self._embed_attempts(work, route, attempt)
                self._answered(began, embedded.prompt_tokens, 0)
                return embedded
            raise DeadlinePassed(f"the request's {work.remaining_ms / 1000:.0f} s are over; give it more time")

    @property
    def running(self) -> int:
        """Requests of this node's own clients that have not ended."""
        return self._running

    async def wait_idle(self) -> None:
        """Wait until no client's request is running."""
        await trio.lowlevel.checkpoint()
        while self._running:
            await self._ended.park()

    def statistics(self) -> FrontStatistics:
        """A snapshot of the counters."""
        return FrontStatistics(
            requests=self.counts["requests"],
            errors={name.removeprefix("error:"): n for name, n in self.counts.items() if name.startswith("error:")},
            cancelled=self.counts["cancelled"],
            running=self._running,
            prompt_tokens=self.counts["prompt_tokens"],
            completion_tokens=self.counts["completion_tokens"],
            latency_s_sum=self._latency_s_sum,
        )

    @contextmanager
    def _counted(self) -> Iterator[None]:
        if self.draining:
            raise NotReady("this node is stopping", retry_after_s=NO_ROOM_RETRY_S)
        self.counts["requests"] += 1
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            self._ended.unpark_all()

    @contextmanager
    def _outcome(self) -> Iterator[None]:
        """Count the one way in which a request ends."""
        outcome = "cancelled"
        try:
            yield
            outcome = "finished"
        except RequestError as exc:
            outcome = f"error:{exc.code}"
            raise
        finally:
            self.counts[outcome] += 1

    def _answered(self, began: float, prompt_tokens: int, completion_tokens: int) -> None:
        self.counts["prompt_tokens"] += prompt_tokens
        self.counts["completion_tokens"] += completion_tokens
        self._latency_s_sum += trio.current_time() - began

    async def _drive(
        self, work: GenerateWork, route: RouteHint, send: trio.MemorySendChannel[AnswerItem | RequestError]
    ) -> None:
        """Feed `send` with the one whole answer or the one error."""
        began = trio.current_time()
        attempt = _Attempt(deadline=began + work.remaining_ms / 1000)
        with send:
            try:
                with self._outcome():
                    with trio.move_on_at(attempt.deadline) as scope:
                        await self._attempts(work, route, attempt, send)
                    if scope.cancelled_caught:
                        raise DeadlinePassed(
                            f"the request's {work.remaining_ms / 1000:.0f} s are over; {len(attempt.tokens)} tokens "
                            "were delivered. Ask for fewer tokens or give it more time"
                        )
            except RequestError as exc:
                await send.send(exc)
            else:
                prompt_tokens = attempt.started.prompt_tokens if attempt.started is not None else 0
                self._answered(began, prompt_tokens, len(attempt.tokens))

    async def _attempts(
        self,
        work: GenerateWork,
        route: RouteHint,
        attempt: _Attempt,
        send: trio.MemorySendChannel[AnswerItem | RequestError],
    ) -> None:
        tries = 0
        while tries < ATTEMPTS_MAX:
            now = attempt.continued(work)
            target = self._choose(now, route, attempt)
            if isinstance(target, WhyNot):
                if attempt.started is None or target.why is not Why.ALL_FULL:
                    raise self._nobody(target, work, attempt)
                await trio.sleep(FULL_WAIT_S)  # half an answer is worth a wait
                continue
            tries += 1
            if attempt.started is not None:
                self.counts["takeovers"] += 1
            try:
                await self._serve_at(target, now, attempt, send)
                return
            except (BadRequest, TooLarge) as exc:
                if not attempt.tokens:
                    raise
                # the client's part was taken once: at fault is what an earlier peer delivered
                self._failed(target, attempt, PeerFailed(f"the answer cannot be continued: {exc}"))
            except RequestError as exc:
                self._failed(target, attempt, exc)
        raise attempt.last_error or PeerFailed("no attempt was made")

    def _failed(self, target: Hosting | Candidate, attempt: _Attempt, error: RequestError) -> None:
        if isinstance(target, Hosting):
            attempt.failed(self._network.transport.peer_id, error)
        else:
            attempt.failed(target.peer, error, may_have_room_later=True)

    async def _serve_at(
        self,
        target: Hosting | Candidate,
        work: GenerateWork,
        attempt: _Attempt,
        send: trio.MemorySendChannel[AnswerItem | RequestError],
    ) -> None:
        """Forward one server's items to the client until Finished. Raises RequestError when that server fails."""
        source = target.generate(work) if isinstance(target, Hosting) else self._remote.generate(target, work)
        async with source as items:
            async for item in items:
                if isinstance(item, RequestError):
                    raise item
                if isinstance(item, Started):
                    if attempt.started is not None:
                        continue
                    attempt.started = item
                attempt.take(item)
                await send.send(item)
                if isinstance(item, Finished):
                    return
        raise PeerFailed("the answer ended without its last record")

    def _choose(self, work: GenerateWork, route: RouteHint, attempt: _Attempt) -> Hosting | Candidate | WhyNot:
        """The engine here if it may and has room, else the best peer, else the queue here, else why nobody."""
        here = self._here(work, route, attempt)
        if here is not None and (self._stays_here(route) or here.has_room()):
            return here
        if self._stays_here(route):
            return WhyNot.none_serves()
        ranked = self._ranked(_need(work, "causal", attempt, route))
        if here is not None and (isinstance(ranked, WhyNot) or ranked.offer.capacity.slots_free < 1):
            return here
        return ranked

    def _choose_embedder(self, work: EmbedWork, route: RouteHint, attempt: _Attempt) -> Hosting | Candidate | WhyNot:
        """The model here if it may, else the best peer, else why nobody."""
        here = self._here(work, route, attempt)
        if here is not None:
            return here
        return WhyNot.none_serves() if self._stays_here(route) else self._ranked(_need(work, "encoder", attempt, route))

    def _stays_here(self, route: RouteHint) -> bool:
        return route.route is Route.LOCAL or route.peer == self._network.transport.peer_id

    def _here(self, work: GenerateWork | EmbedWork, route: RouteHint, attempt: _Attempt) -> Hosting | None:
        """The engine here, if the client lets it answer, it can, and it has not failed this request."""
        own, here = self._network.transport.peer_id, self.hosting
        if here is None or route.route is Route.REMOTE or route.peer not in (None, own) or own in attempt.tried:
            return None
        revision, kind = (work.revision, "causal") if isinstance(work, GenerateWork) else (None, "encoder")
        return here if here.serves(work.model, revision, kind) else None

    def _ranked(self, need: Need) -> Candidate | WhyNot:
        ranking = self._network.gossip.rank(need)
        return ranking if isinstance(ranking, WhyNot) else ranking[0]

    def _nobody(self, why: WhyNot, work: GenerateWork | EmbedWork, attempt: _Attempt) -> RequestError:
        """The clear end of a request that no one can take (any more)."""
        if attempt.started is not None:
            return PeerFailed(
                f"the serving peer failed after {len(attempt.tokens)} tokens ({attempt.last_error}) and no other live "
                f"peer serves {attempt.started.model} at revision {attempt.started.revision}"
            )
        if attempt.last_error is not None:
            return attempt.last_error
        asked = f"model {work.model!r}" if work.model is not None else "a model of the kind asked for"
        match why.why:
            case Why.TOO_LONG:
                return BadRequest(f"the request is {why}; ask for fewer tokens")
            case Why.ALL_FULL | Why.ALL_BROKEN:
                return NoRoom(f"{asked}: {why}; try again", retry_after_s=why.retry_after_s or NO_ROOM_RETRY_S)
            case Why.NONE_SERVES:
                known = ", ".join(sorted(self._served_names())) or "nothing yet"
                return UnknownModel(
                    f"no live peer that was asked for serves {asked}; served now: {known}", param="model"
                )

    def _served_names(self) -> set[str]:
        names = {model.name for model in self._network.gossip.directory.models(trio.current_time())}
        if self.hosting is not None:
            names |= {self.hosting.runtime.facts.name, self.hosting.runtime.embedding_facts.name}
        return names

    async def _embed_attempts(self, work: EmbedWork, route: RouteHint, attempt: _Attempt) -> Embedded:
        for _ in range(ATTEMPTS_MAX):
            now = msgspec.structs.replace(work, remaining_ms=attempt.left_ms())
            target = self._choose_embedder(now, route, attempt)
            if isinstance(target, WhyNot):
                raise self._nobody(target, work, attempt)
            try:
                return await (target.embed(now) if isinstance(target, Hosting) else self._remote.embed(target, now))
            except (BadRequest, TooLarge):
                raise
            except RequestError as exc:
                self._failed(target, attempt, exc)
        raise attempt.last_error or PeerFailed("no attempt was made")


@contextmanager
def _single() -> Iterator[None]:
    """A nursery wraps what is raised in its block into a group; a caller waits for the one error itself."""
    try:
        yield
    except ExceptionGroup as group:
        if len(group.exceptions) > 1:
            raise
        raise group.exceptions[0] from group.exceptions[0].__cause__


def _need(work: GenerateWork | EmbedWork, kind: str, attempt: _Attempt, route: RouteHint) -> Need:
    return Need(
        model=work.model,
        revision=work.revision if isinstance(work, GenerateWork) else None,
        kind=kind,
        tokens=work.sampling.max_tokens + len(work.tokens or ()) if isinstance(work, GenerateWork) else 0,
        exclude=frozenset(PeerId(peer) for peer in attempt.tried),
        only=None if route.peer is None else PeerId(route.peer),
    )
