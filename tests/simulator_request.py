"""The simulator's requests: a client's at a door, and each attempt at a peer; node/inference.py's and remote.py's part.

Rules: what is asked next and what is believed is node/pursuit.py's and node/judge.py's to say. A request that ends
twice is a violation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gossip.routing import Candidate
from node.errors import PeerFailed, RequestError
from node.front import RouteHint
from node.judge import Judge, judged
from node.pursuit import Pursuit, Seek, Wait, pursue
from node.work import AnswerItem, Finished, GenerateWork, Piece, Progress, from_wire, item_from_wire, to_wire
from p2p.errors import P2PError, RemoteError, RemoteProtocolError, Unreachable
from p2p.rpc import CallId
from tests.simulator_engine import Engine
from tests.simulator_net import Link, Timer

if TYPE_CHECKING:
    from tests.simulator_node import Process


class Ask:
    """One client's request at this peer's door, to its one end."""

    def __init__(self, process: Process, number: int, work: GenerateWork, route: RouteHint) -> None:
        self.process, self.number, self.work = process, number, work
        self.pursuit: Pursuit[Engine] = pursue(work, route, process, process.now)
        self.began, self.ended = process.now, None if process.alive else process.now
        self.outcome: str | None = None
        self.text = ""
        self.takeovers = 0
        self._attempt = 0
        self._leave: Callable[[], None] = lambda: None  # what tells the server that we go
        self._timer: Timer | None = None
        self._deadline = process.after(work.remaining_ms / 1000, lambda: self._end(self.pursuit.too_late().code))

    def go(self) -> None:
        """The next step of the pursuit."""
        self._attempt += 1
        try:
            target = self.pursuit.step()
        except RequestError as exc:
            return self._end(exc.code)
        self.takeovers += self.pursuit.started is not None and not isinstance(target, Wait | Seek)
        if isinstance(target, Wait):
            self.process.after(target.seconds, self._if_still(self._attempt, self.go))
        elif isinstance(target, Seek):
            self.process.finder.find(target.model, self._if_still(self._attempt, self.go))
        elif isinstance(target, Engine):
            self._ask_here(target)
        else:
            RemoteAsk(self, target, self._attempt).begin()

    def cancel(self) -> None:
        """The client leaves."""
        if self.outcome is None:
            self._end("cancelled")

    def died(self) -> None:
        """The door died under the client: its connection breaks."""
        if self.outcome is None:
            self._end("door_died")

    def take(self, item: AnswerItem) -> None:
        if self.pursuit.take(item) and isinstance(item, Piece):
            self.text += item.text
        if isinstance(item, Finished):
            self._end("finished")

    def failed(self, target: Engine | Candidate, error: RequestError) -> None:
        self._leave = lambda: None
        try:
            self.pursuit.failed(target, error)
        except RequestError as exc:
            return self._end(exc.code)
        self.process.after(0.0, self._if_still(self._attempt, self.go))

    def hurried(self, target: Candidate) -> None:
        """It said nothing in time: others first."""
        self._leave = lambda: None
        self.pursuit.hurried(target)
        self.process.net.history.note("passed_over", self.number, target.peer[-6:])
        self.process.after(0.0, self._if_still(self._attempt, self.go))

    def serving(self, leave: Callable[[], None]) -> None:
        self._leave = leave

    def is_at(self, attempt: int) -> bool:
        return self.outcome is None and self._attempt == attempt

    def _if_still(self, attempt: int, call: Callable[[], None]) -> Callable[[], None]:
        return lambda: call() if self.is_at(attempt) else None

    def _ask_here(self, engine: Engine) -> None:
        attempt = self._attempt

        def emit(item: AnswerItem | RequestError) -> None:
            if not self.is_at(attempt):
                return
            if isinstance(item, RequestError):
                self.failed(engine, item)
            elif not isinstance(item, Progress):
                self.take(item)

        try:
            job = engine.add(self.pursuit.continued(self.process.now), emit)
        except RequestError as exc:
            return self.failed(engine, exc)
        self._leave = lambda: engine.remove(job)

    def _end(self, outcome: str) -> None:
        if self.outcome is not None:
            self.process.net.history.note("ended_twice", self.number, self.outcome, outcome)
            self.process.violations.append(f"request {self.number} ended twice: {self.outcome}, {outcome}")
            return
        self.outcome, self.ended = outcome, self.process.now
        self.process.net.history.note("end", self.number, outcome, len(self.pursuit.tokens))
        self._deadline.cancel()
        leave, self._leave = self._leave, lambda: None
        leave()
        self.process.asks.pop(self.number, None)


class RemoteAsk:
    """One attempt of a request at one peer; node/remote.py's part."""

    def __init__(self, ask: Ask, candidate: Candidate, attempt: int) -> None:
        self.ask, self.candidate, self.attempt = ask, candidate, attempt
        self.process = ask.process
        self.work: GenerateWork = ask.pursuit.continued(self.process.now)
        self.judge = Judge(candidate.peer, candidate.offer.capacity, self.work, self.process.now)
        self.began = self.process.now
        self.over = False
        self._waits: Timer | None = None
        self._hurry: Timer | None = None
        self._waits_from = 0.0
        self._call: tuple[Link, CallId] | None = None

    def begin(self) -> None:
        self.process.observations.started(self.candidate.peer, self.process.now)
        self.ask.serving(self._leave)
        hurry_s = self.ask.pursuit.hurry_s(self.candidate)
        if hurry_s < math.inf:
            self._hurry = self.process.after(hurry_s, self._silent)
        self._is_new = self.candidate.peer not in self.process.links
        self.process.net.dial(self.process, self.candidate.peer, self._dialled)

    def _dialled(self, link: Link | None) -> None:
        if self.over:
            return
        if link is None:
            return self.fail(Unreachable("no connection"))
        link.used_at = self.process.now
        if self._is_new and link.lent_to is None:
            link.lent_to = self.process.peer_id
        try:
            self._call = (link, self.process.call(link, "generate", to_wire(self.work), self))
        except P2PError as exc:
            return self.fail(exc)
        self._wait()

    def item(self, body: Any) -> None:
        """An item of the peer's."""
        if self._hurry is not None:
            self._hurry.cancel()
        try:
            item = item_from_wire(body)
            self.judge.waited(self.process.now - self._waits_from)
            is_news = self.judge.take(item, self.process.now)
        except RemoteProtocolError as exc:
            return self.fail(exc)
        self._wait()
        if is_news:
            self.ask.take(item)

    def end(self, body: Any) -> None:
        """The peer's last record."""
        try:
            item = from_wire(body, Finished)
            self.judge.end(item)
        except RemoteProtocolError as exc:
            return self.fail(exc)
        now, watch, peer = self.process.now, self.process.observations, self.candidate.peer
        first_s = self.judge.first_token_s
        if first_s is not None:
            watch.first_token(peer, first_s)
        watch.finished(peer, self.judge.tokens_received, now - self.began - (first_s or 0.0), now)
        self._close(tell=False)
        self.ask.take(item)

    def _silent(self) -> None:
        if not self.over:
            self._close(tell=True)
            if self.ask.is_at(self.attempt):
                self.ask.hurried(self.candidate)

    def fail(self, failure: P2PError | PeerFailed) -> None:
        """The attempt is over; the pursuit goes on elsewhere."""
        if self.over:
            return
        verdict = judged(failure, self.candidate.peer)
        if verdict.fault is not None:
            self.process.hearing.blame(self.candidate.peer, verdict.fault, str(failure), self.process.now)
        self.process.observations.failed(self.candidate.peer, verdict.reason, self.process.now)
        self.process.net.history.note("failed", self.ask.number, self.candidate.peer[-6:], verdict.reason)
        self._close(tell=not isinstance(failure, RemoteError))
        if self.ask.is_at(self.attempt):
            self.ask.failed(self.candidate, verdict.error)

    def _wait(self) -> None:
        if self._waits is not None:
            self._waits.cancel()
        self._waits_from = self.process.now
        until = self.judge.waits_until(self.process.now)
        self._waits = self.process.after(until - self.process.now, lambda: self.fail(self.judge.late(self.process.now)))

    def _leave(self) -> None:
        if not self.over:
            self._close(tell=True)

    def _close(self, *, tell: bool) -> None:
        self.over = True
        if self._waits is not None:
            self._waits.cancel()
        if self._call is not None and tell:
            self.process.leave(*self._call)
        self.process.observations.ended(self.candidate.peer, self.process.now)
