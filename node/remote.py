"""One attempt at one peer: connect, call, watch its progress, map every way it can fail to a RequestError.

Rules: a peer is judged by work: tokens must come, or the progress that it reports must grow, or after STALL_S of
waiting it counts as frozen, however open its connection is. Time spent waiting for our own client does not count.
And it has FIRST_TOKEN_SHARE of the request's time for its first token, whatever progress it reports, so that time is
left for another peer. What a peer sends is checked against what was asked. Every outcome is observed; a breach of the
protocol, and letting down a request after its start, lower its standing.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import trio

from crypto.identity import PeerId
from gossip.messages import Capacity
from gossip.routing import Candidate
from gossip.service import GossipService
from gossip.standing import Fault
from node.errors import REQUEST_ERRORS, BadRequest, NoRoom, NotReady, PeerFailed
from node.hosting import NO_ROOM_RETRY_S
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
    item_from_wire,
    to_wire,
)
from p2p.calls import Calls, Outgoing
from p2p.errors import LocalProtocolError, P2PError, Refused, RemoteError, RemoteProtocolError, Unreachable
from p2p.peering import Peering
from p2p.transport import Transport

STALL_S = 5.0  # no token and no progress for so long: frozen, if its speed is known and lets it do better
STALL_UNMEASURED_S = 20.0  # before its first request; the transport finds a dead connection in half that time
STALL_S_MAX = 60.0  # whatever speed it claims
PREFILL_CHUNK = 256  # tokens of prompt that an engine reads in one step (model/config.py)
DIAL_S = 5.0
FIRST_TOKEN_SHARE = 0.75
EMBED_S_MAX = 60.0  # embeddings report no progress; a batch of TEXTS_MAX takes seconds
EMBED_SHARE = 0.5  # of the request's time, if that is less
TOKEN_CHARS_MAX = 1024  # the longest tokens of common vocabularies are 128 spaces


ANSWERED = {**REQUEST_ERRORS, "busy": NoRoom}  # by the code of a peer's error


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """The parts of the node that routing reads and calls through."""

    transport: Transport
    peering: Peering
    calls: Calls
    gossip: GossipService


class LetDown(PeerFailed):
    """The peer had accepted the request, and then stopped working on it."""


class PeerItems:
    """A peer's items, strictly decoded and checked. Raises what Outgoing raises, RemoteProtocolError, PeerFailed."""

    def __init__(self, outgoing: Outgoing, candidate: Candidate, work: GenerateWork, began: float) -> None:
        self._outgoing = outgoing
        self._peer = candidate.peer
        self._stall_s = stall_s(candidate.offer.capacity)
        self._work = work
        self._began = began
        self._patience_s = self._stall_s
        self._seen: Progress | None = None
        self._started: Started | None = None
        self._tokens = len(work.delivered)
        self._chars = work.delivered_chars
        self.ended = False
        self.first_token_s: float | None = None

    @property
    def tokens_received(self) -> int:
        """Tokens that this peer made, without those delivered before."""
        return self._tokens - len(self._work.delivered)

    def __aiter__(self) -> AsyncIterator[AnswerItem]:
        return self

    async def __anext__(self) -> AnswerItem:
        while not self.ended:
            item = await self._in_time()
            if self._take(item):
                return item
        raise StopAsyncIteration

    async def _in_time(self) -> AnswerItem:
        waits, first_by = trio.current_time(), math.inf
        if self.first_token_s is None:
            first_by = self._began + FIRST_TOKEN_SHARE * self._work.remaining_ms / 1000
        with trio.move_on_at(min(waits + self._patience_s, first_by)):
            item = await self._next()
            self._patience_s -= trio.current_time() - waits
            return item
        kind = PeerFailed if self._started is None else LetDown
        if trio.current_time() >= first_by:
            raise kind(f"no token within {first_by - self._began:.0f} s, {FIRST_TOKEN_SHARE:.0%} of the request's time")
        raise kind(f"no token and no progress for {self._stall_s:.0f} s: the peer is frozen or cut off")

    async def _next(self) -> AnswerItem:
        try:
            return item_from_wire(await anext(self._outgoing))
        except StopAsyncIteration:
            self.ended = True
            return from_wire(self._outgoing.result, Finished)

    def _take(self, item: AnswerItem) -> bool:
        """Check an item; whether it tells the client anything. Raises RemoteProtocolError."""
        if (self._started is not None) is isinstance(item, Started):
            raise RemoteProtocolError("an answer must open with Started, once")
        match item:
            case Started():
                self._check_server(item)
                self._started = item
                self._advance()
            case Progress():
                return self._is_further(item)
            case Piece():
                self._check_amount(item)
                if item.tokens:
                    self._advance()
                    if self.first_token_s is None:
                        self.first_token_s = trio.current_time() - self._began
                return bool(item.tokens or item.text)
            case Finished():
                if not self.ended or item.completion_tokens != self._tokens:
                    raise RemoteProtocolError(f"{self._tokens} tokens came, the record says {item.completion_tokens}")
                assert self._started is not None
                if item.prompt_tokens != self._started.prompt_tokens:
                    raise RemoteProtocolError(
                        f"the prompt had {self._started.prompt_tokens} tokens, now {item.prompt_tokens}"
                    )
        return True

    def _check_server(self, item: Started) -> None:
        if item.served_by != self._peer:
            raise RemoteProtocolError(f"it says that {item.served_by} serves")
        if self._work.model not in (None, item.model):
            raise RemoteProtocolError(f"asked for {self._work.model}, got {item.model}")
        if self._work.revision not in (None, item.revision):
            raise RemoteProtocolError(f"asked for revision {self._work.revision}, got {item.revision}")

    def _check_amount(self, item: Piece) -> None:
        self._tokens += len(item.tokens)
        self._chars += len(item.text)
        if self._tokens > self._work.sampling.max_tokens:
            raise RemoteProtocolError(f"over the {self._work.sampling.max_tokens} tokens that were asked for")
        if self._chars > TOKEN_CHARS_MAX * self._tokens:
            raise RemoteProtocolError(f"{self._chars} characters for {self._tokens} tokens")

    def _is_further(self, item: Progress) -> bool:
        """Whether work was done. Once all is prefilled the next thing is a token: steps alone prove nothing then."""
        assert self._started is not None
        whole = self._started.prompt_tokens + len(self._work.delivered)
        if item.prefilled_tokens > whole:
            raise RemoteProtocolError(f"{item.prefilled_tokens} tokens prefilled of {whole}")
        before, self._seen = self._seen, item
        if before is not None and not _grown(before, item):
            self._seen = before
            return False
        if before is None or before.prefilled_tokens < whole:
            self._advance()
        return True

    def _advance(self) -> None:
        self._patience_s = self._stall_s


def stall_s(capacity: Capacity) -> float:
    """How long a peer with these speeds may show neither token nor progress: its longest honest step, and a half."""
    if not capacity.prefill_tok_s or not capacity.decode_tok_s:
        return STALL_UNMEASURED_S
    step_s = max(PREFILL_CHUNK / capacity.prefill_tok_s, 1 / capacity.decode_tok_s)
    return min(STALL_S_MAX, max(STALL_S, 1.5 * step_s))


def _grown(before: Progress, after: Progress) -> bool:
    return after.engine_steps > before.engine_steps or after.prefilled_tokens > before.prefilled_tokens


class Remote:
    """Attempts at peers, with their outcomes counted and observed."""

    def __init__(self, network: Network, counts: Counter[str]) -> None:
        self._network = network
        self._counts = counts

    @asynccontextmanager
    async def generate(self, candidate: Candidate, work: GenerateWork) -> AsyncIterator[AsyncIterator[AnswerItem]]:
        """The items of one answer from one peer. Raises RequestError kinds only. Leaving cancels at the peer."""
        began = trio.current_time()
        with self._observed(candidate.peer):
            await self._connect(candidate)
            async with self._network.calls.open(candidate.peer, "generate", to_wire(work)) as outgoing:
                items = PeerItems(outgoing, candidate, work, began)
                yield items
            self._succeeded(candidate.peer, items, began)

    async def embed(self, candidate: Candidate, work: EmbedWork) -> Embedded:
        """Embeddings from one peer. Raises RequestError kinds only. If cancelled, the peer is told."""
        began = trio.current_time()
        with self._observed(candidate.peer):
            await self._connect(candidate)
            patience_s = min(EMBED_S_MAX, EMBED_SHARE * work.remaining_ms / 1000)
            with trio.move_on_after(patience_s):
                reply = await self._network.calls.call(candidate.peer, "embed", to_wire(work))
                embedded = from_wire(reply, Embedded)
                _check_vectors(embedded, candidate.peer, work)
                self._succeeded(candidate.peer, None, began)
                return embedded
            raise PeerFailed(f"no embeddings within {patience_s:.0f} s")

    def _succeeded(self, peer: PeerId, items: PeerItems | None, began: float) -> None:
        watch, now = self._network.gossip.observations, trio.current_time()
        if items is None:
            watch.finished(peer, 0, now - began, now)
        elif items.ended:
            first_s = items.first_token_s
            if first_s is not None:
                watch.first_token(peer, first_s)
            watch.finished(peer, items.tokens_received, now - began - (first_s or 0.0), now)

    @contextmanager
    def _observed(self, peer: PeerId) -> Iterator[None]:
        """Every way an attempt can end, observed and mapped."""
        self._network.gossip.observations.started(peer, trio.current_time())
        try:
            yield
        except RemoteError as exc:
            kind = ANSWERED.get(exc.code, PeerFailed)
            error = kind(
                f"{peer} answered: {exc.message}", retry_after_s=NO_ROOM_RETRY_S if kind in (NoRoom, NotReady) else None
            )
            self._failed(peer, exc.code)
            raise error from exc
        except RemoteProtocolError as exc:
            self._network.gossip.blame(peer, Fault.MALFORMED, str(exc))
            self._failed(peer, "protocol")
            raise PeerFailed(f"{peer} broke the protocol: {exc}") from exc
        except LocalProtocolError as exc:
            self._failed(peer, BadRequest.code)
            raise BadRequest(f"the request cannot be sent to a peer: {exc}; make it smaller") from exc
        except Refused as exc:
            self._failed(peer, "busy")
            raise NoRoom(f"{peer} takes no more: {exc}", retry_after_s=NO_ROOM_RETRY_S) from exc
        except P2PError as exc:
            self._failed(peer, "unreachable")
            raise PeerFailed(f"{peer} cannot be reached: {exc}") from exc
        except PeerFailed as exc:
            if isinstance(exc, LetDown):
                self._network.gossip.blame(peer, Fault.TIMEOUT, exc.message)
            self._failed(peer, "stalled")
            raise PeerFailed(f"{peer}: {exc.message}") from exc
        finally:
            self._network.gossip.observations.ended(peer, trio.current_time())

    def _failed(self, peer: PeerId, reason: str) -> None:
        self._counts[f"peer_failed:{reason}"] += 1
        self._network.gossip.observations.failed(peer, reason, trio.current_time())

    async def _connect(self, candidate: Candidate) -> None:
        peering, peer = self._network.peering, candidate.peer
        if peer in self._network.transport.peers():
            return
        peering.learn(peer, candidate.addresses)
        with trio.move_on_after(DIAL_S):
            try:
                await peering.connect(peer)
            except Refused as exc:
                raise Unreachable(str(exc)) from exc
            return
        raise Unreachable(f"no connection to it within {DIAL_S:.0f} s")


def _check_vectors(embedded: Embedded, peer: PeerId, work: EmbedWork) -> None:
    if embedded.served_by != peer or work.model not in (None, embedded.model):
        raise RemoteProtocolError(
            f"asked it for {work.model or 'vectors'}, got {embedded.model} of {embedded.served_by}"
        )
    if not len(embedded.vectors) == len(embedded.truncated) == len(work.texts):
        raise RemoteProtocolError(f"{len(work.texts)} texts were sent, {len(embedded.vectors)} vectors came")
    for vector in embedded.vectors:
        if len(vector) != 4 * embedded.dimensions:
            raise RemoteProtocolError(f"a vector of {len(vector)} bytes, {embedded.dimensions} dimensions were stated")
        if not all(map(math.isfinite, struct.unpack(f"<{embedded.dimensions}f", vector))):
            raise RemoteProtocolError("a vector is not finite")
