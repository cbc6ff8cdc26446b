"""Where a request is answered: by the model hosted here, or by the best peer, with takeover when that peer fails.

Rules: shell of node/pursuit.py, which says who is asked next. A request carries its remaining time and the tokens
already delivered, so that another peer goes on where the last one stopped. A peer that serves never routes further, so
there are no loops.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio

from crypto.identity import PeerId
from gossip.routing import Candidate, Need, WhyNot
from node.backend import Backend
from node.errors import NO_ROOM_RETRY_S, NotReady, PeerFailed, RequestError
from node.front import FrontStatistics, RouteHint
from node.pursuit import Pursuit, Seek, Wait, pursue
from node.remote import Network, Remote
from node.requester import Requester, of_client, of_peer
from node.work import AnswerItem, Embedded, EmbedWork, Finished, GenerateWork, sent_on

INFER_PROTOCOL = "/openagi/infer/1"
PIECES_BUFFERED = 64  # a client that reads slower than the model writes holds this many pieces back


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
        self.hosting: Backend | None = None
        self.draining = False
        self.loading = ""  # the model that is on its way to `hosting`
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
            pursuit = pursue(work, route, self, began)
            with trio.move_on_at(pursuit.deadline):
                embedded = await self._embedded(pursuit)
                self._answered(began, embedded.prompt_tokens, 0)
                return embedded
            raise pursuit.too_late()

    # what a request sees of this node

    @property
    def own(self) -> PeerId:
        """This node's id."""
        return self._network.transport.peer_id

    def rank(self, need: Need) -> tuple[Candidate, ...] | WhyNot:
        """Peers to ask, best first, or why there is none."""
        return self._network.gossip.rank(need)

    def served_names(self) -> set[str]:
        """Every model that is served now, here or elsewhere."""
        names = {model.name for model in self._network.gossip.directory.models(trio.current_time())}
        if self.hosting is not None:
            names |= {self.hosting.runtime.facts.name, self.hosting.runtime.embedding_facts.name}
        return names

    # for the node

    def requester(self, peer: PeerId) -> Requester:
        """On whose account a peer's request is served."""
        return of_peer(peer, is_good=self._network.gossip.is_in_good_standing(peer))

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
        pursuit = pursue(work, route, self, began)
        with send:
            try:
                with self._outcome():
                    with trio.move_on_at(pursuit.deadline) as scope:
                        await self._pursued(pursuit, send)
                    if scope.cancelled_caught:
                        raise pursuit.too_late()
            except RequestError as exc:
                await send.send(exc)
            else:
                self._answered(began, pursuit.prompt_tokens, len(pursuit.tokens))

    async def _pursued(
        self, pursuit: Pursuit[Backend], send: trio.MemorySendChannel[AnswerItem | RequestError]
    ) -> None:
        """Ask one server after the other until the client has the whole answer. Raises RequestError."""
        while True:
            target = pursuit.step()
            if isinstance(target, Wait):
                await trio.sleep(target.seconds)
                continue
            if isinstance(target, Seek):
                await self._seek(target)
                continue
            if pursuit.started is not None:
                self.counts["takeovers"] += 1
            try:
                return await self._serve_at(target, pursuit, send)
            except RequestError as exc:
                pursuit.failed(target, exc)

    async def _serve_at(
        self,
        target: Backend | Candidate,
        pursuit: Pursuit[Backend],
        send: trio.MemorySendChannel[AnswerItem | RequestError],
    ) -> None:
        """Forward one server's items to the client until Finished. Raises RequestError when that server fails."""
        work, account = pursuit.continued(trio.current_time()), pursuit.route.account
        source = (
            self._remote.generate(target, sent_on(work, account))
            if isinstance(target, Candidate)
            else target.generate(work, of_client(account))
        )
        async with source as items:
            async for item in items:
                if isinstance(item, RequestError):
                    raise item
                if pursuit.take(item):
                    await send.send(item)
                if isinstance(item, Finished):
                    return
        raise PeerFailed("the answer ended without its last record")

    async def _embedded(self, pursuit: Pursuit[Backend]) -> Embedded:
        """Ask one server after the other. Raises RequestError."""
        while True:
            target = pursuit.step()
            assert not isinstance(target, Wait), "there is nothing to go on with"
            if isinstance(target, Seek):
                await self._seek(target)
                continue
            work, account = pursuit.continued(trio.current_time()), pursuit.route.account
            try:
                if isinstance(target, Candidate):
                    return await self._remote.embed(target, sent_on(work, account))
                return await target.embed(work, of_client(account))
            except RequestError as exc:
                pursuit.failed(target, exc)

    async def _seek(self, seek: Seek) -> None:
        self.counts["searches"] += 1
        await self._network.gossip.find(seek.model)


@contextmanager
def _single() -> Iterator[None]:
    """A nursery wraps what is raised in its block into a group; a caller waits for the one error itself."""
    try:
        yield
    except ExceptionGroup as group:
        if len(group.exceptions) > 1:
            raise
        raise group.exceptions[0] from group.exceptions[0].__cause__
