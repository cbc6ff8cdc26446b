"""Routing by remembered reliability, ablated in the simulator; a part of bench/selfstate.py.

Rules: one door asks, 32 others serve, of which three in ten are unreliable: black holes, stallers, and flaky ones that
leave every other request unanswered. The door asks for a while, its machine dies, and it starts again: its first
requests then are counted. What it remembers is what its memory would have, events of the requests that were answered
and of those that a peer failed, read by node/remembered.py. Every setting goes through the same seeds.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from bench.harness import Row, quantile
from crypto.identity import PeerId
from gossip.breaker import State
from gossip.observations import FULL_REASONS, NEUTRAL_REASONS, Observations, Observed
from gossip.routing import Candidate
from node import events
from node.errors import NoRoom, RequestError
from node.front import Route, RouteHint
from node.remembered import remembered
from node.work import AnswerItem, GenerateWork, Piece, Sampling
from p2p.rpc import Call
from tests.simulator import WARM_UP_S, Scenario, Swarm, _each_statement_once
from tests.simulator_engine import REVISION, Engine
from tests.simulator_net import Link
from tests.simulator_node import MODEL, START_MS, Peer, Process
from tests.simulator_request import Ask

SERVING, UNRELIABLE = 32, 0.3
BEFORE, AFTER = 200, 200  # requests of the door before it dies, and those that are counted
EVERY_S = 0.5
DOWN_S = 60.0
REST_S = 20.0  # after the last request
DEADLINE_MS = 60_000
FLAKY = "flaky"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """observes: within a run; remembers: over the restart."""

    name: str
    observes: bool = True
    remembers: bool = False


SETTINGS = (
    Setting(name="neutral", observes=False),
    Setting(name="forgets"),
    Setting(name="remembers", remembers=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Restarted:
    """What came of the requests after the restart."""

    asked: int
    answered: int
    first_failed: int
    first_token_s: tuple[float, ...]  # of those that had one


class Noting(Observations):
    """Observations that leave the events which a node's memory has of them."""

    def __init__(self, log: list[events.Kept]) -> None:
        super().__init__()
        self._log = log

    def finished(self, peer: PeerId, tokens: int, seconds: float, now: float) -> None:
        super().finished(peer, tokens, seconds, now)
        body = events.Inference(
            model=MODEL, revision=REVISION, prompt_tokens=1, answer_tokens=tokens, duration_ms=int(1000 * seconds),
            outcome="ok", served_by=peer,
        )  # fmt: skip
        self._note("inference", body, now)

    def failed(self, peer: PeerId, reason: str, now: float) -> None:
        super().failed(peer, reason, now)
        if reason not in FULL_REASONS and reason not in NEUTRAL_REASONS:
            self._note("peer", events.Peer(peer=peer, happened="failed"), now)

    def _note(self, kind: str, body: events.Body, now: float) -> None:
        ts_ms = START_MS + int(1000 * now)
        self._log.append(events.Kept(id=len(self._log) + 1, ts_ms=ts_ms, kind=kind, body=body, hash=b""))


class Neutral(Observations):
    """Observations of which routing learns nothing."""

    def observed(self, peer: PeerId, now: float) -> Observed:
        return Observed(
            state=State.CLOSED, proven=False, in_flight=0, answers=0, rtt_s=None, first_token_s=None, tok_s=None,
            success=1.0, refusing=super().observed(peer, now).refusing, connected=None,
        )  # fmt: skip

    def is_proven(self, peer: PeerId) -> bool:
        return False

    def is_dubious(self, network: str, now: float) -> bool:
        return False


class Watched(Ask):
    """A request whose first attempt and first token are noted."""

    first_failed = False
    first_token_at: float | None = None

    def take(self, item: AnswerItem) -> None:
        if isinstance(item, Piece) and self.first_token_at is None:
            self.first_token_at = self.process.now
        super().take(item)

    def failed(self, target: Engine | Candidate, error: RequestError) -> None:
        self.first_failed = self.first_failed or (self.pursuit.tries == 1 and not isinstance(error, NoRoom))
        super().failed(target, error)


class Flaky(Process):
    """Leaves every other request unanswered, if it is of that kind."""

    calls = 0

    def _begin(self, link: Link, call: Call) -> None:
        self.calls += 1
        if self.peer.actor != FLAKY or self.calls % 2:
            return super()._begin(link, call)
        self.peer.actor = "black_hole"
        super()._begin(link, call)
        self.peer.actor = FLAKY


class Restarting(Swarm):
    """The last peer is the door; it asks, dies, starts again and asks."""

    def __init__(self, seed: int, setting: Setting) -> None:
        share = UNRELIABLE / 3
        scenario = Scenario(
            peers=SERVING + 1, serving=SERVING / (SERVING + 1), churn_per_min=0.0, pauses_per_min=0.0, cuts_per_min=0.0,
            black_holes=share, stallers=share, skew_ms=0,
        )  # fmt: skip
        super().__init__(seed, scenario)
        self.setting = setting
        self.log: list[events.Kept] = []
        self.door = self.peers[-1]
        honest = [peer for peer in self.peers[:-1] if peer.actor == "honest"]
        for peer in honest[: round(share * SERVING)]:
            peer.actor = FLAKY
        self._draw = random.Random(seed)

    def restarted(self) -> Restarted:
        for peer in self.peers:
            self.loop.after(self.rng.random() * 2.0, lambda peer=peer: self._start(peer))  # type: ignore[misc]
        self.loop.run_until(WARM_UP_S)
        self._asked(BEFORE)
        process = self.alive.pop(self.door.identity.peer_id)
        for ask in list(process.asks.values()):
            ask.died()
        self.net.crashed(process, silent=False)
        self.loop.run_until(self.loop.now + DOWN_S)
        self._start(self.door)
        self.loop.run_until(self.loop.now + WARM_UP_S)
        asks = self._asked(AFTER)
        return Restarted(
            asked=len(asks),
            answered=sum(ask.outcome == "finished" for ask in asks),
            first_failed=sum(ask.first_failed for ask in asks),
            first_token_s=tuple(ask.first_token_at - ask.began for ask in asks if ask.first_token_at is not None),
        )

    def _start(self, peer: Peer) -> None:
        process = Flaky(peer, self.net, random.Random(self.rng.getrandbits(64)), self.everybody)
        if peer is self.door:
            self._equip(process)
        self.net.processes[process.peer_id] = process
        self.alive[process.peer_id] = process
        process.begin()

    def _equip(self, process: Process) -> None:
        now = self.loop.now
        process.observations = Noting(self.log) if self.setting.observes else Neutral()
        if self.setting.remembers:
            for each in remembered(self.log, START_MS + int(1000 * now)):
                process.observations.remember(
                    PeerId(each.peer), worked=each.worked, failed=each.failed, age_s=each.age_s, now=now,
                    rtt_s=each.rtt_s,
                )  # fmt: skip

    def _asked(self, count: int) -> list[Watched]:
        asks = list[Watched]()
        door = self.alive[self.door.identity.peer_id]
        for _ in range(count):
            work = GenerateWork(
                request_id=f"r{len(self.asks)}",
                tokens=tuple(self._draw.randrange(1000) for _ in range(self._draw.randint(1, 8))),
                sampling=Sampling(max_tokens=self._draw.randint(1, 60)),
                remaining_ms=DEADLINE_MS,
            )
            ask = Watched(door, len(self.asks), work, RouteHint(route=Route.REMOTE))
            self.asks.append(ask)
            door.asks[ask.number] = ask
            asks.append(ask)
            ask.go()
            self.loop.run_until(self.loop.now + self._draw.expovariate(1 / EVERY_S))
        self.loop.run_until(self.loop.now + REST_S)
        return asks


def measured(seeds: int) -> dict[str, Restarted]:
    """All seeds of each setting, in sum."""
    found: dict[str, Restarted] = {}
    with _each_statement_once():
        for setting in SETTINGS:
            for seed in range(seeds):
                one, before = Restarting(seed, setting).restarted(), found.get(setting.name)
                found[setting.name] = one if before is None else _sum(before, one)
    return found


def _sum(one: Restarted, two: Restarted) -> Restarted:
    return replace(
        one,
        asked=one.asked + two.asked,
        answered=one.answered + two.answered,
        first_failed=one.first_failed + two.first_failed,
        first_token_s=one.first_token_s + two.first_token_s,
    )


def rows(seeds: int) -> Iterator[Row]:
    """The figures; the rival is what is ablated."""
    found = measured(seeds)
    for name, told in found.items():
        rival = {"remembers": "forgets", "forgets": "neutral"}.get(name)
        beside = None if rival is None else found[rival]
        yield Row(
            figure=f"routing_{name}_first_failed",
            value=100 * told.first_failed / told.asked,
            unit="% of the first attempts after a restart",
            better="lower",
            rival=rival,
            rival_value=None if beside is None else 100 * beside.first_failed / beside.asked,
        )
        yield Row(
            figure=f"routing_{name}_first_token_p95_s",
            value=quantile(told.first_token_s, 0.95),
            unit="s to the first token, p95",
            better="lower",
            rival=rival,
            rival_value=None if beside is None else quantile(beside.first_token_s, 0.95),
        )
        yield Row(
            figure=f"routing_{name}_answered",
            value=100 * told.answered / told.asked,
            unit=f"% of {told.asked} requests",
            better="higher",
        )
