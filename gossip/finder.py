"""Asks peers for adverts and answers those who ask: what is known, a sample of it, or who serves a model.

Rules: a shell of gossip/finding.py. One stream a question; every answer goes through gossip/hearing.py as any advert
that is handed on. Nobody is asked for more than FIND_ADVERTS_MAX, and whoever asks too often is not answered.
Source: docs/PROTOCOLS.md "/openagi/find/1".
"""

from __future__ import annotations

import random
from collections.abc import Callable

import trio

from crypto.identity import PeerId
from gossip.directory import Directory
from gossip.errors import RemoteProtocolError
from gossip.finding import (
    ASKED_AT_ONCE,
    ASKED_MAX,
    FIND_PROTOCOL,
    FOUND_ADVERTS,
    ONWARD_MAX,
    ONWARD_S,
    SAMPLE_ADVERTS,
    SAMPLE_S,
    SEARCH_S,
    Find,
    Search,
    Searches,
    find_of,
    find_to_wire,
)
from gossip.hearing import Hearing
from gossip.pace import OwnAdvert
from gossip.standing import Fault
from p2p.errors import P2PError, StreamClosed
from p2p.transport import Stream, Transport

ANSWER_S = 5.0  # for one question, both ends
SAMPLE_JITTER = 0.3
LOOK_S = 0.1  # between looks whether gossip has brought what is searched for
ANY = ""  # no model has this name


class Finder:
    """A node's questions and answers about who offers what."""

    def __init__(
        self,
        transport: Transport,
        directory: Directory,
        hearing: Hearing,
        own: OwnAdvert,
        rng: random.Random,
        now_ms: Callable[[], int],
    ) -> None:
        """now_ms: unix milliseconds."""
        self._transport, self._directory, self._hearing = transport, directory, hearing
        self._own, self._rng, self._now_ms = own, rng, now_ms
        self._searches = Searches()
        self._under_way: dict[str | None, trio.Event] = {}
        self._came = trio.lowlevel.ParkingLot()

    async def find(self, model: str | None) -> bool:
        """Learn of peers that serve a model, None: any; whether some are known then. At most SEARCH_S.

        A node that has no neighbour yet, for it has just started, waits for one. Who asks for the same meanwhile waits
        for the same search. If cancelled, what was learnt stays.
        """
        if (other := self._under_way.get(model)) is not None:
            await other.wait()
            return self._knows(model)
        now = trio.current_time()
        if self._knows(model) or not self._searches.may_search(model or ANY, now):
            await trio.lowlevel.checkpoint()
            return self._knows(model)
        done = self._under_way[model] = trio.Event()
        try:
            with trio.move_on_after(SEARCH_S):
                while not self._neighbours():
                    await self._came.park()
                await self._search(Find(model=model, limit=FOUND_ADVERTS, onward=True), self._neighbours(), ASKED_MAX)
            if not self._knows(model):
                self._searches.not_found(model or ANY, trio.current_time())
        finally:
            del self._under_way[model]
            done.set()
        return self._knows(model)

    def peer_came(self) -> None:
        """A peer has connected."""
        self._came.unpark_all()

    async def answer(self, stream: Stream) -> None:
        """A peer asks."""
        with trio.move_on_after(ANSWER_S):
            try:
                find = find_of(await stream.receive())
            except RemoteProtocolError as exc:
                self._hearing.blame(stream.peer, Fault.MALFORMED, str(exc), trio.current_time())
                raise
            if not self._hearing.may_find(stream.peer, trio.current_time()):
                await stream.reset()
                return
            for raw in await self._known(find, stream.peer):
                await stream.send(raw)
            await stream.close()

    async def sample_now_and_then(self) -> None:
        """Hear of peers far away, until cancelled."""
        while True:
            await trio.sleep(SAMPLE_S * self._rng.uniform(1 - SAMPLE_JITTER, 1 + SAMPLE_JITTER))
            if neighbours := self._neighbours():
                await self._ask(neighbours[0], Find(limit=SAMPLE_ADVERTS))

    async def _known(self, find: Find, asker: PeerId) -> list[bytes]:
        """The adverts that answer a question."""
        now, own = trio.current_time(), self._own.raw
        if find.model is None:
            return [*([own] if own else []), *self._directory.sample(now, find.limit, self._rng)][: find.limit]
        known = self._serving(find)
        if not known and find.onward and self._searches.may_ask_onward(now):
            neighbours = [peer for peer in self._neighbours() if peer != asker]
            with trio.move_on_after(ONWARD_S):
                await self._search(Find(model=find.model, limit=find.limit), neighbours, ONWARD_MAX)
            known = self._serving(find)
        return known

    def _serving(self, find: Find) -> list[bytes]:
        assert find.model is not None
        known = self._directory.serving(find.model, trio.current_time(), find.limit, self._rng)
        if self._own.raw and self._own.serves(find.model):
            known = [self._own.raw, *known]
        return known[: find.limit]

    async def _search(self, find: Find, peers: list[PeerId], limit: int) -> None:
        """Ask one peer after the other, a few at once, until the model is known, from them or by gossip."""
        search = Search(peers, limit)

        async def ask() -> None:
            while (peer := search.next()) is not None:
                await self._ask(peer, find)
                search.answered(is_found=self._knows(find.model))
            if search.is_over:
                nursery.cancel_scope.cancel()

        async def look() -> None:
            while not self._knows(find.model):  # noqa: ASYNC110  # of a core that knows no trio
                await trio.sleep(LOOK_S)
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            for _ in range(ASKED_AT_ONCE):
                nursery.start_soon(ask)

    async def _ask(self, peer: PeerId, find: Find) -> None:
        """Put one question to one peer. If cancelled, the adverts that came are kept."""
        with trio.move_on_after(ANSWER_S) as scope:
            try:
                stream = await self._transport.open_stream(peer, FIND_PROTOCOL)
                try:
                    await stream.send(find_to_wire(find))
                    for _ in range(find.limit):
                        raw = await stream.receive()
                        self._hearing.handed(peer, raw, trio.current_time(), self._now_ms())
                except StreamClosed:
                    return
                finally:
                    await stream.reset()
            except P2PError:
                self._hearing.drops["search_failed"] += 1
        if scope.cancelled_caught:
            self._hearing.drops["search_too_slow"] += 1

    def _neighbours(self) -> list[PeerId]:
        """Connected peers in random order."""
        peers = sorted(self._transport.peers())
        self._rng.shuffle(peers)
        return peers

    def _knows(self, model: str | None) -> bool:
        offers = self._directory.offers(trio.current_time(), model=model)
        return any(offer.capacity.models for offer in offers)
