"""One attempt at one peer: connect, call, let node/judge.py judge what comes, and tell everybody concerned.

Rules: shell. Every outcome is observed for routing, and what is the peer's own fault lowers its standing.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import trio

from crypto.identity import PeerId
from gossip.routing import Candidate
from gossip.service import GossipService
from node.errors import PeerFailed
from node.judge import Judge, judged
from node.peer_tallies import PeerTallies
from node.recent import Flows
from node.work import AnswerItem, Embedded, EmbedWork, Finished, GenerateWork, from_wire, item_from_wire, to_wire
from p2p.calls import Calls, Outgoing
from p2p.errors import P2PError, Refused, RemoteProtocolError, Unreachable
from p2p.peering import Peering
from p2p.transport import Transport

DIAL_S = 5.0
EMBED_S_MAX = 60.0  # embeddings report no progress; a batch of TEXTS_MAX takes seconds
KEPT_S = 1.0  # so long at most takes an answer that was kept from an earlier one
EMBED_SHARE = 0.5  # of the request's time, if that is less


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """The parts of the node that routing reads and calls through."""

    transport: Transport
    peering: Peering
    calls: Calls
    gossip: GossipService


class PeerItems:
    """A peer's items, strictly decoded and checked. Raises what Outgoing raises, RemoteProtocolError, PeerFailed."""

    def __init__(self, outgoing: Outgoing, judge: Judge) -> None:
        self._outgoing = outgoing
        self.judge = judge
        self.ended = False

    def __aiter__(self) -> AsyncIterator[AnswerItem]:
        return self

    async def __anext__(self) -> AnswerItem:
        while not self.ended:
            item = await self._in_time()
            if self.ended:
                assert isinstance(item, Finished)
                self.judge.end(item)
                return item
            if self.judge.take(item, trio.current_time()):
                return item
        raise StopAsyncIteration

    async def _in_time(self) -> AnswerItem:
        began = trio.current_time()
        with trio.move_on_at(self.judge.waits_until(began)):
            item = await self._next()
            self.judge.waited(trio.current_time() - began)
            return item
        raise self.judge.late(trio.current_time())

    async def _next(self) -> AnswerItem:
        try:
            return item_from_wire(await anext(self._outgoing))
        except StopAsyncIteration:
            self.ended = True
            return from_wire(self._outgoing.result, Finished)


class Remote:
    """Attempts at peers, with their outcomes counted and observed."""

    def __init__(
        self,
        network: Network,
        counts: Counter[str],
        on_failed: Callable[[PeerId, str], None] = lambda _peer, _reason: None,
    ) -> None:
        """on_failed: called (sync) with the reason of each attempt that failed."""
        self._network, self._counts, self._on_failed = network, counts, on_failed
        self.tallies = PeerTallies()
        self.flows = Flows()

    @asynccontextmanager
    async def generate(self, candidate: Candidate, work: GenerateWork) -> AsyncIterator[AsyncIterator[AnswerItem]]:
        """The items of one answer from one peer. Raises RequestError kinds only. Leaving cancels at the peer."""
        began = trio.current_time()
        with self._observed(candidate.peer):
            await connect(self._network, candidate.peer, candidate.addresses)
            async with self._network.calls.open(candidate.peer, work.method, to_wire(work)) as outgoing:
                items = PeerItems(outgoing, Judge(candidate.peer, candidate.offer.capacity, work, began))
                yield items
            if items.ended:
                self._answered(candidate.peer, items.judge, began)

    async def embed(self, candidate: Candidate, work: EmbedWork) -> Embedded:
        """Embeddings from one peer. Raises RequestError kinds only. If cancelled, the peer is told."""
        began = trio.current_time()
        with self._observed(candidate.peer):
            await connect(self._network, candidate.peer, candidate.addresses)
            patience_s = min(EMBED_S_MAX, EMBED_SHARE * work.remaining_ms / 1000)
            with trio.move_on_after(patience_s):
                reply = await self._network.calls.call(candidate.peer, "embed", to_wire(work))
                embedded = from_wire(reply, Embedded)
                _check_vectors(embedded, candidate.peer, work)
                now = trio.current_time()
                self._network.gossip.observations.finished(candidate.peer, 0, now - began, now)
                self.tallies.finished(candidate.peer)
                return embedded
            raise PeerFailed(f"no embeddings within {patience_s:.0f} s")

    def _answered(self, peer: PeerId, judge: Judge, began: float) -> None:
        watch, now = self._network.gossip.observations, trio.current_time()
        first_s = judge.first_token_s
        self.tallies.finished(peer)
        if judge.is_cached and now - began < KEPT_S:  # that it was fast tells nothing of the next
            watch.finished(peer, 0, now - began, now)
            return
        if first_s is not None:
            watch.first_token(peer, first_s)
        watch.finished(peer, judge.tokens_received, now - began - (first_s or 0.0), now)

    @contextmanager
    def _observed(self, peer: PeerId) -> Iterator[None]:
        """Every way an attempt can end, observed and mapped."""
        gossip = self._network.gossip
        gossip.observations.started(peer, trio.current_time())
        try:
            with self.flows.to(peer):
                yield
        except (P2PError, PeerFailed) as exc:
            verdict = judged(exc, peer)
            if verdict.fault is not None:
                gossip.blame(peer, verdict.fault, str(exc))
            self._counts[f"peer_failed:{verdict.reason}"] += 1
            self.tallies.failed(peer)
            gossip.observations.failed(peer, verdict.reason, trio.current_time())
            self._on_failed(peer, verdict.reason)
            raise verdict.error from exc
        finally:
            gossip.observations.ended(peer, trio.current_time())


async def connect(network: Network, peer: PeerId, addresses: tuple[str, ...]) -> None:
    """Be connected to a peer that says it is at these addresses. Raises Unreachable."""
    if peer in network.transport.peers():
        return
    network.peering.learn(peer, addresses)
    with trio.move_on_after(DIAL_S):
        try:
            await network.peering.connect(peer)
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
