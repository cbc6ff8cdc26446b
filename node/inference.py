"""Where a request is answered: by the model hosted here, or by the best peer, with takeover when that peer fails.

Rules: a request carries its remaining time and the tokens already delivered, so that another peer goes on where the
last one stopped. A peer is judged by work: if neither its tokens nor its reported progress advance for STALL_S it
counts as frozen, however open its connection is. A peer that serves never routes further, so there are no loops.
"""

from __future__ import annotations

import random
import secrets
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import trio

from crypto.identity import PeerId
from gossip.directory import Directory
from gossip.routing import Candidate, Need, Observations, WhyNot, rank
from gossip.standing import Standing
from node.errors import (
    REQUEST_ERRORS,
    BadRequest,
    DeadlinePassed,
    InternalError,
    NoRoom,
    NotReady,
    PeerFailed,
    RequestError,
    TooLarge,
    UnknownModel,
)
from node.front import FrontStatistics, ModelRow, Readiness, Route, RouteHint
from node.hosting import NO_ROOM_RETRY_S, Hosting
from node.work import (
    AnswerItem,
    Embedded,
    EmbedWork,
    Finished,
    GenerateWork,
    Piece,
    Progress,
    Started,
    from_wire,
    to_wire,
)
from p2p.calls import Calls
from p2p.errors import P2PError, RemoteError, RemoteProtocolError, Unreachable
from p2p.transport import Transport

INFER_PROTOCOL = "/openagi/infer/1"
STALL_S = 5.0  # no token and no progress for so long: frozen
DIAL_S = 5.0
PIECES_BUFFERED = 64  # a client that reads slower than the model writes holds this many pieces back
ATTEMPTS_MAX = 8


@dataclass(slots=True, kw_only=True)
class _Attempt:
    """What one request has behind it: who failed, what the client already has."""

    deadline: float
    tried: set[str] = field(default_factory=set)  # peer ids; ours when the local engine failed
    tokens: list[int] = field(default_factory=list)
    chars: int = 0
    started: Started | None = None
    last_error: RequestError | None = None

    def take(self, item: AnswerItem) -> None:
        if isinstance(item, Piece):
            self.tokens.extend(item.tokens)
            self.chars += len(item.text)

    def continued(self, work: GenerateWork) -> GenerateWork:
        """The same request, for the next peer: less time, more delivered."""
        left_ms = max(1, int((self.deadline - trio.current_time()) * 1000))
        changes: dict[str, Any] = {"remaining_ms": left_ms}
        if self.started is not None:
            changes |= {
                "model": self.started.model,
                "revision": self.started.revision,
                "delivered": (*work.delivered, *self.tokens),
                "delivered_chars": work.delivered_chars + self.chars,
            }
        return msgspec.structs.replace(work, **changes)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """The parts of the node that routing reads and calls through."""

    transport: Transport
    calls: Calls
    directory: Directory
    observations: Observations
    standing: Standing
    rng: random.Random


class Inference:
    """Implements node.front's answer and embed over the local engine and the network."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.hosting: Hosting | None = None
        self.draining = False
        self._running = 0
        self._counts: Counter[str] = Counter()
        self._latency_s_sum = 0.0

    @asynccontextmanager
    async def answer(self, work: GenerateWork, route: RouteHint) -> AsyncIterator[Answer]:
        """Answer a request wherever it is best answered. Leaving the block cancels it there within one step."""
        if self.draining:
            raise NotReady("this node is stopping", retry_after_s=NO_ROOM_RETRY_S)
        send, receive = trio.open_memory_channel[AnswerItem | RequestError](PIECES_BUFFERED)
        self._running += 1
        self._counts["requests"] += 1
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._drive, work, route, send)
                try:
                    yield Answer(receive)
                finally:
                    nursery.cancel_scope.cancel()
        finally:
            self._running -= 1

    async def _drive(
        self, work: GenerateWork, route: RouteHint, send: trio.MemorySendChannel[AnswerItem | RequestError]
    ) -> None:
        began = trio.current_time()
        attempt = _Attempt(deadline=began + work.remaining_ms / 1000)
        end: RequestError | None = None
        with trio.move_on_at(attempt.deadline) as scope:
            try:
                await self._attempts(work, route, attempt, send)
            except RequestError as exc:
                end = exc
        if scope.cancelled_caught:
            end = DeadlinePassed(
                f"the request's {work.remaining_ms / 1000:.0f} s are over; "
                f"{len(attempt.tokens)} tokens were delivered. Ask for fewer tokens or give it more time"
            )
        if end is not None:
            self._counts[f"error:{end.code}"] += 1
            await send.send(end)
        self._latency_s_sum += trio.current_time() - began
        send.close()

    async def _attempts(
        self,
        work: GenerateWork,
        route: RouteHint,
        attempt: _Attempt,
        send: trio.MemorySendChannel[AnswerItem | RequestError],
    ) -> None:
        for number in range(ATTEMPTS_MAX):
            if number and attempt.started is not None:
                self._counts["takeovers"] += 1
            target = self._choose(attempt.continued(work), route, attempt)
            try:
                await self._serve_at(target, attempt.continued(work), attempt, send)
                return
            except (BadRequest, TooLarge):
                raise
            except RequestError as exc:
                who = self._network.transport.peer_id if isinstance(target, Hosting) else target.peer
                attempt.tried.add(who)
                attempt.last_error = exc
        assert attempt.last_error is not None
        raise attempt.last_error

    async def _serve_at(
        self,
        target: Hosting | Candidate,
        work: GenerateWork,
        attempt: _Attempt,
        send: trio.MemorySendChannel[AnswerItem | RequestError],
    ) -> None:
        """Forward one server's items to the client until Finished. Raises RequestError when that server fails."""
        source = target.generate(work) if isinstance(target, Hosting) else self._at_peer(target, work)
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
                    self._counts["completion_tokens"] += item.completion_tokens
                    self._counts["prompt_tokens"] += item.prompt_tokens
                    return
        raise PeerFailed("the answer ended without its last record")

    def _choose(self, work: GenerateWork, route: RouteHint, attempt: _Attempt) -> Hosting | Candidate:
        own = self._network.transport.peer_id
        here = self.hosting if route.route is not Route.REMOTE and own not in attempt.tried else None
        if route.peer is not None:
            here = here if route.peer == own else None
        local = here if here is not None and here.serves(work.model, work.revision, "causal") else None
        if local is not None and (route.route is Route.LOCAL or local.has_room()):
            return local
        if route.route is Route.LOCAL or route.peer == own:
            raise attempt.last_error or UnknownModel(
                f"model {work.model!r} is not hosted by this node, and the request asked for this node", param="model"
            )
        ranked = self._ranked(work.model, work.revision, "causal", route, attempt.tried)
        if isinstance(ranked, Candidate):
            return ranked
        if local is not None:
            return local  # full here and nobody else has room: wait in this node's own queue
        raise self._nobody(ranked, work, attempt)

    def _ranked(
        self, model: str | None, revision: str | None, kind: str, route: RouteHint, tried: set[str]
    ) -> Candidate | WhyNot:
        network = self._network
        now = trio.current_time()
        need = Need(model=model, revision=revision, kind=kind, exclude=frozenset(PeerId(t) for t in tried))
        ranking = rank(need, network.directory.offers(now), network.observations, now, network.rng)
        if isinstance(ranking, WhyNot):
            return ranking
        for candidate in ranking:
            if route.peer is None or candidate.peer == route.peer:
                return candidate
        return WhyNot.none_serves()

    def _nobody(self, why: WhyNot, work: GenerateWork | EmbedWork, attempt: _Attempt) -> RequestError:
        if attempt.started is not None:
            return PeerFailed(
                f"the serving peer failed after {len(attempt.tokens)} tokens ({attempt.last_error}) and no other live "
                f"peer serves {work.model} at revision {attempt.started.revision} with room"
            )
        if attempt.last_error is not None and not isinstance(attempt.last_error, UnknownModel):
            return attempt.last_error
        known = ", ".join(sorted({row.id for row in self.models()})) or "none yet: no live peer serves a model"
        if why.serving:
            return NoRoom(
                f"all {why.serving} peers that serve {work.model or 'a model'} are full or failing; try again",
                retry_after_s=NO_ROOM_RETRY_S,
            )
        asked = f"model {work.model!r}" if work.model is not None else "a model of the kind asked for"
        return UnknownModel(f"no live peer serves {asked}; served now: {known}", param="model")

    @asynccontextmanager
    async def _at_peer(self, candidate: Candidate, work: GenerateWork) -> AsyncIterator[AsyncIterator[AnswerItem]]:
        """One attempt at a peer. Raises RequestError kinds only, whatever the peer does."""
        watch = self._network.observations
        watch.started(candidate.peer, trio.current_time())
        try:
            await self._connect(candidate)
            async with self._network.calls.open(candidate.peer, "generate", to_wire(work)) as outgoing:
                yield _PeerItems(outgoing, candidate.peer, watch)
        except RemoteError as exc:
            error = REQUEST_ERRORS.get(exc.code, InternalError)(f"{candidate.peer}: {exc.message}")
            if not isinstance(error, BadRequest | TooLarge):
                self._failed(candidate.peer, exc.code)
            raise error from exc
        except RemoteProtocolError as exc:
            self._network.standing.malformed(candidate.peer, trio.current_time())
            self._failed(candidate.peer, "protocol")
            raise PeerFailed(f"{candidate.peer} broke the protocol: {exc}") from exc
        except P2PError as exc:
            self._failed(candidate.peer, "unreachable")
            raise PeerFailed(f"{candidate.peer} is gone: {exc}") from exc
        except PeerFailed:
            self._failed(candidate.peer, "stalled")
            raise
        finally:
            watch.ended(candidate.peer, trio.current_time())

    def _failed(self, peer: PeerId, reason: str) -> None:
        self._counts[f"peer_failed:{reason}"] += 1
        self._network.observations.failed(peer, reason, trio.current_time())

    async def _connect(self, candidate: Candidate) -> None:
        transport = self._network.transport
        if candidate.peer in transport.peers():
            return
        with trio.move_on_after(DIAL_S):
            for address in candidate.addresses:
                try:
                    await transport.dial(address)
                except P2PError:
                    continue
                return
        raise Unreachable(f"none of its {len(candidate.addresses)} advertised addresses answers")

    async def embed(self, work: EmbedWork, route: RouteHint) -> Embedded:
        """Embed texts here or at a peer. Raises RequestError. If cancelled, the work is given up wherever it runs."""
        if self.draining:
            raise NotReady("this node is stopping", retry_after_s=NO_ROOM_RETRY_S)
        self._running += 1
        self._counts["requests"] += 1
        attempt = _Attempt(deadline=trio.current_time() + work.remaining_ms / 1000)
        try:
            with trio.move_on_at(attempt.deadline):
                return await self._embed_attempts(work, route, attempt)
            raise DeadlinePassed(f"the request's {work.remaining_ms / 1000:.0f} s are over")
        except RequestError as exc:
            self._counts[f"error:{exc.code}"] += 1
            raise
        finally:
            self._running -= 1

    async def _embed_attempts(self, work: EmbedWork, route: RouteHint, attempt: _Attempt) -> Embedded:
        own = self._network.transport.peer_id
        if self.hosting is not None and route.route is not Route.REMOTE and route.peer in (None, own):
            if self.hosting.serves(work.model, None, "encoder"):
                return await self.hosting.embed(work)
        if route.route is Route.LOCAL or route.peer == own:
            raise UnknownModel(f"model {work.model!r} does not embed on this node", param="model")
        for _ in range(ATTEMPTS_MAX):
            ranked = self._ranked(work.model, None, "encoder", route, attempt.tried)
            if not isinstance(ranked, Candidate):
                raise self._nobody(ranked, work, attempt)
            try:
                return await self._embed_at(ranked, work)
            except (BadRequest, TooLarge):
                raise
            except RequestError as exc:
                attempt.tried.add(ranked.peer)
                attempt.last_error = exc
        assert attempt.last_error is not None
        raise attempt.last_error
