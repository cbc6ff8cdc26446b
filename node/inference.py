"""Where a request is answered: by the model hosted here, or by the best peer, with takeover when that peer fails.

Rules: shell of node/pursuit.py, which says who is asked next. A request carries its remaining time and the tokens
already delivered, so that another peer goes on where the last one stopped. A peer that serves never routes further, so
there are no loops.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Protocol

import trio

from crypto.identity import PeerId
from gossip.routing import Candidate, Need, WhyNot
from node.backend import Backend
from node.errors import NO_ROOM_RETRY_S, NotReady, PeerFailed, RequestError
from node.front import FrontStatistics, RouteHint
from node.loading import Loading
from node.pursuit import Pursuit, Seek, Wait, pursue
from node.recent import Flows
from node.remote import Network, Remote
from node.request_ended import CANCELLED, OK, Ended, text_of
from node.requester import Requester, of_client, of_peer
from node.tallies import Passage, Tallies
from node.work import AnswerItem, Embedded, EmbedWork, Finished, GenerateWork, sent_on

INFER_PROTOCOL = "/openagi/infer/1"
PIECES_BUFFERED = 64  # a client that reads slower than the model writes holds this many pieces back


class Watcher(Protocol):
    """Who is told, by sync calls, what becomes of requests."""

    def ended(self, request: Ended) -> None:
        """One has ended."""

    def peer_failed(self, peer: PeerId, reason: str) -> None:
        """One failed at a peer."""


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
        self.loading: Loading | None = None  # until `hosting` is there
        self.draining = False
        self.watcher: Watcher | None = None
        self.remembers_text = False  # of own clients' requests that are neither private nor sealed
        self.counts: Counter[str] = Counter()  # requests; finished, cancelled, error:CODE; takeovers, ...
        self.tallies = Tallies(trio.current_time())
        self._remote = Remote(network, self.counts, self._peer_failed)
        self._running = 0
        self._ended = trio.lowlevel.ParkingLot()
        self._latency_s_sum = 0.0

    @asynccontextmanager
    async def answer(self, work: GenerateWork, route: RouteHint) -> AsyncIterator[Answer]:
        """Answer a request wherever it is best answered. Leaving the block cancels it there within one step."""
        with self._counted(), single():
            send, receive = trio.open_memory_channel[AnswerItem | RequestError](PIECES_BUFFERED)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._drive, work, route, send)
                try:
                    yield Answer(receive)
                finally:
                    nursery.cancel_scope.cancel()

    async def embed(self, work: EmbedWork, route: RouteHint) -> Embedded:
        """Embed texts here or at a peer. Raises RequestError. If cancelled, the work is given up wherever it runs."""
        began = trio.current_time()
        with self._counted(), self._outcome(work, route, began) as passage:
            pursuit = pursue(work, route, self, began)
            with trio.move_on_at(pursuit.deadline):
                embedded = await self._embedded(pursuit, passage)
                self.tallies.embedded(passage, embedded)
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

    def _asker(self, route: RouteHint) -> Requester:
        return of_client(route.account) if route.guest is None else self.requester(route.guest)

    @contextmanager
    def relaying(self) -> Iterator[None]:
        """Count a sealed request that goes through this node. Raises NotReady. It is waited for at the end."""
        with self._counted(), self._ended_as():
            self.counts["sealed_relayed"] += 1
            yield

    @property
    def running(self) -> int:
        """Requests of this node's own clients that have not ended."""
        return self._running

    @property
    def busiest_peers(self) -> dict[str, dict[str, int]]:
        """How requests to the peers that are asked most ended."""
        return self._remote.tallies.busiest()

    @property
    def flows(self) -> Flows:
        """Requests between this node and each peer."""
        return self._remote.flows

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
    def _outcome(self, work: GenerateWork | EmbedWork, route: RouteHint, began: float) -> Iterator[Passage]:
        """Count the one way in which a request ends, also for its model, and tell the watcher."""
        error, is_whole = "", False
        passage = self.tallies.enter(work.model, began)
        passage.said = [] if self.remembers_text and not _is_hidden(work, route) else None
        try:
            with self._ended_as():
                yield passage
            is_whole = True
        except RequestError as exc:
            error = exc.code
            raise
        finally:
            now = trio.current_time()
            self.tallies.end(passage, error, is_whole=is_whole, now=now)
            self._tell_ended(passage, work, route, error or (OK if is_whole else CANCELLED), now - began)

    def _tell_ended(
        self, passage: Passage, work: GenerateWork | EmbedWork, route: RouteHint, outcome: str, took_s: float
    ) -> None:
        """Tell of a request of this node's own clients, or of one that came sealed."""
        if self.watcher is None:
            return
        model, revision, served_by = passage.served
        self.watcher.ended(
            Ended(
                account=route.account if route.guest is None else route.guest,
                is_hidden=_is_hidden(work, route),
                model=model or work.model or "",
                revision=revision,
                prompt_tokens=passage.prompt_tokens,
                answer_tokens=passage.answer_tokens,
                took_s=took_s,
                outcome=outcome,
                served_by="" if served_by == self.own else served_by,
                text=None if passage.said is None else text_of(work, "".join(passage.said)),
            )
        )

    def _peer_failed(self, peer: PeerId, reason: str) -> None:
        if self.watcher is not None:
            self.watcher.peer_failed(peer, reason)

    @contextmanager
    def _ended_as(self) -> Iterator[None]:
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
                with self._outcome(work, route, began) as passage:
                    with trio.move_on_at(pursuit.deadline) as scope:
                        await self._pursued(pursuit, passage, send)
                    if scope.cancelled_caught:
                        raise pursuit.too_late()
            except RequestError as exc:
                await send.send(exc)
            else:
                self._answered(began, pursuit.prompt_tokens, len(pursuit.tokens))

    async def _pursued(
        self, pursuit: Pursuit[Backend], passage: Passage, send: trio.MemorySendChannel[AnswerItem | RequestError]
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
            with trio.move_on_after(pursuit.hurry_s(target)) as hurry:
                with self._attempted(target, pursuit, passage):
                    return await self._serve_at(target, pursuit, passage, send, hurry)
            if hurry.cancelled_caught:
                self.counts["passed_over"] += 1
                pursuit.hurried(target)

    @contextmanager
    def _attempted(self, target: Backend | Candidate, pursuit: Pursuit[Backend], passage: Passage) -> Iterator[None]:
        """Count one attempt by where and how it ended, and tell the pursuit of its failure, which goes no further."""
        passage.model = target.model.name if isinstance(target, Candidate) else self._own_model(target, pursuit)
        if pursuit.tries > 1:
            self.counts["failover:mid_stream" if pursuit.tokens else "failover:before_first_token"] += 1
        is_here = not isinstance(target, Candidate)
        try:
            yield
            self.counts["route:local" if is_here else "route:peer"] += 1
        except RequestError as exc:
            if is_here:
                self.counts[f"local_failed:{exc.code}"] += 1
            pursuit.failed(target, exc)

    def _own_model(self, target: Backend, pursuit: Pursuit[Backend]) -> str | None:
        """The name of the model here that answers such a request; from then on it is known to the tallies."""
        facts = target.facts("encoder" if isinstance(pursuit.work, EmbedWork) else "causal")
        if facts is None:
            return None
        self.tallies.know(facts.name, facts.revision)
        return facts.name

    async def _serve_at(
        self,
        target: Backend | Candidate,
        pursuit: Pursuit[Backend],
        passage: Passage,
        send: trio.MemorySendChannel[AnswerItem | RequestError],
        hurry: trio.CancelScope,
    ) -> None:
        """Forward one server's items to the client until Finished. Raises RequestError when that server fails.

        hurry: what cancels this if no item comes in time.
        """
        work, account = pursuit.continued(trio.current_time()), pursuit.route.account
        source = (
            self._remote.generate(target, sent_on(work, account))
            if isinstance(target, Candidate)
            else target.generate(work, self._asker(pursuit.route))
        )
        async with source as items:
            async for item in items:
                hurry.deadline = math.inf
                if isinstance(item, RequestError):
                    raise item
                if pursuit.take(item):
                    self.tallies.take(passage, item, trio.current_time())
                    await send.send(item)
                if isinstance(item, Finished):
                    return
        raise PeerFailed("the answer ended without its last record")

    async def _embedded(self, pursuit: Pursuit[Backend], passage: Passage) -> Embedded:
        """Ask one server after the other. Raises RequestError."""
        while True:
            target = pursuit.step()
            assert not isinstance(target, Wait), "there is nothing to go on with"
            if isinstance(target, Seek):
                await self._seek(target)
                continue
            work, account = pursuit.continued(trio.current_time()), pursuit.route.account
            with self._attempted(target, pursuit, passage):
                if isinstance(target, Candidate):
                    return await self._remote.embed(target, sent_on(work, account))
                return await target.embed(work, self._asker(pursuit.route))

    async def _seek(self, seek: Seek) -> None:
        self.counts["searches"] += 1
        await self._network.gossip.find(seek.model)


def _is_hidden(work: GenerateWork | EmbedWork, route: RouteHint) -> bool:
    return work.private or route.is_sealed


@contextmanager
def single() -> Iterator[None]:
    """A nursery wraps what is raised in its block into a group; a caller waits for the one error itself."""
    try:
        yield
    except ExceptionGroup as group:
        if len(group.exceptions) > 1:
            raise
        raise group.exceptions[0] from group.exceptions[0].__cause__
