"""A swarm of simulated peers under weather, churn and liars; the history of every request is checked.

Rules: all chance comes from the seed: the same seed and scenario give the same history hash. A failure names the seed
and the command that replays it. Statements are read and checked by the node's own code, once each.
"""

from __future__ import annotations

import gc
import hashlib
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import crypto.envelope
import gossip.claims
import gossip.directory
from crypto.identity import Identity, PeerId
from gossip.standing import Verdict
from node.errors import REQUEST_ERRORS
from node.front import Route, RouteHint
from node.work import GenerateWork, Sampling
from tests.simulator_blob import Fetch
from tests.simulator_engine import text_at, token_at
from tests.simulator_net import History, Link, Loop, Net, Weather
from tests.simulator_node import MODEL, Peer, Process
from tests.simulator_request import Ask
from tests.simulator_summaries import SummaryBytes

QUIET_S = 38.0  # after the last request, at most: longer than any deadline, and than the health check needs
CALM_S = 10.0  # with nothing under way any more: longer than what is still on a wire, or a dial, can take
WARM_UP_S = 6.0
GRACE_S = 0.001
STATEMENTS_MAX = 100_000
GARBAGE_AT = 500_000  # objects more than there were
STARTS_PER_S = 100  # more at once is a storm of its own: adverts of ten thousand before anybody speaks less
SYBIL_NETWORKS = 4
FETCH_DONORS = 6
ENDS = frozenset({"finished", "cancelled", *REQUEST_ERRORS})


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What befalls a swarm. Rates are per second unless a name says otherwise; bad actors are shares of who serves."""

    peers: int = 64
    serving: float = 0.5
    seconds: float = 60.0
    requests_per_peer_min: float = 7.5
    churn_per_min: float = 0.3  # of the peers crash, and come back after `down_s`
    down_s: tuple[float, float] = (2.0, 20.0)
    silent: float = 0.3  # of the crashes take the machine with them: no connection is reset
    pauses_per_min: float = 0.1
    pause_s: tuple[float, float] = (0.5, 15.0)
    cuts_per_min: float = 6.0  # paths cut, one way or both
    cut_s: tuple[float, float] = (1.0, 25.0)
    cancels: float = 0.1  # of the requests
    deadline_s: tuple[float, float] = (10.0, 30.0)
    skew_ms: int = 20_000  # at most, either way
    black_holes: float = 0.0  # take requests and say nothing
    stallers: float = 0.0  # say that they have begun, and then nothing
    liars: float = 0.0
    flooders: float = 0.0
    equivocators: float = 0.0
    fetches_per_min: float = 0.0  # of a blob that all who serve have
    sybils: int = 0  # beside the others, in four networks; they claim much, answer nothing, and tell of each other only
    rare_models: int = 0  # each served by one peer only
    rare_requests: float = 0.0  # of the requests ask for one of them by name
    summaries: float = 1.0  # of the peers tell of their own state
    weather: Weather = field(default_factory=Weather)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one seed."""

    seed: int
    accepted: int
    ends: dict[str, int]
    unresolved: int
    wrong: tuple[str, ...]  # each a sentence
    takeovers: int  # of answers that had begun
    latencies_s: tuple[float, ...]  # of the answered
    asked_of_holes: int  # the most requests that one black hole, staller or sybil got from one door
    flooder_kept_s: float  # the longest that somebody honest kept a connection with a flooder
    banned: dict[str, float]  # bad actors by kind -> share of the honest peers that have banned them
    bytes_per_peer_s: float
    bytes_per_peer_s_max: float  # of the peer that sent most
    searches: int  # for a model that nobody known served
    found: int  # of these
    fetches: dict[str, int]  # blobs by how their fetch ended
    events: int
    digest: str
    lines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """What a node has to do in a network that has settled: in the second half of a scenario's time."""

    bytes_per_peer_s: float
    bytes_per_peer_s_max: float  # of the peer that sent most
    events_per_peer_s: float
    offers_known: float  # live ones of others, at the end, a mean
    summary_bytes_per_peer_s: float = 0.0  # of bytes_per_peer_s
    claims_known: float = 0.0  # at the end, a mean


class Swarm:
    """One seed's world."""

    def __init__(self, seed: int, scenario: Scenario, *, keep_lines: bool = False) -> None:
        self.scenario, self.rng = scenario, random.Random(seed)
        self.loop = Loop()
        self.history = History(self.loop)
        self.history.keep = keep_lines
        self.net = Net(self.loop, random.Random(self.rng.getrandbits(64)), scenario.weather, self.history)
        self.peers = self._make_peers()
        self.net.addresses = {peer.identity.peer_id: peer.address for peer in self.peers}
        self._actors = {peer.identity.peer_id: peer.actor for peer in self.peers}
        self.everybody = tuple(peer.identity.peer_id for peer in self.peers)
        self.alive: dict[PeerId, Process] = {}
        self.asks: list[Ask] = []
        self.fetches: list[Fetch] = []
        self.violations: list[str] = []
        self.flooder_kept_s = 0.0
        self.net.on_drop = self._dropped

    def run(self, seed: int) -> Outcome:
        scenario, end = self.scenario, WARM_UP_S + self.scenario.seconds
        start_s = max(2.0, scenario.peers / STARTS_PER_S)
        for peer in self.peers:
            self.loop.after(self.rng.random() * start_s, lambda peer=peer: self._start(peer))  # type: ignore[misc]
        self._each(scenario.peers * scenario.requests_per_peer_min / 60, self._ask, end)
        self._each(scenario.fetches_per_min / 60, self._fetch, end)
        self._each(scenario.peers * scenario.churn_per_min / 60, self._crash, end)
        self._each(scenario.peers * scenario.pauses_per_min / 60, self._pause, end)
        self._each(scenario.cuts_per_min / 60, self._cut, end)
        self.loop.run_until(WARM_UP_S + scenario.seconds / 2)
        half = (self.net.bytes, self.net.sent.copy(), self.loop.done, self.net.gossiped[SummaryBytes.__name__])
        self.loop.run_until(end)
        self.crowd = self._settled(*half)
        self.net.heal()
        for link in list(self.net.links):
            self._dropped(link)
        sent_bytes = (self.net.bytes, max(self.net.sent.values()))
        self._fall_quiet(end + QUIET_S)
        for process in self.alive.values():
            self.violations += process.violations
            self.violations += [f"{process.peer_id[-6:]}: {what}" for what in process.leftovers()]
        return self._outcome(seed, *sent_bytes)

    def _fall_quiet(self, end: float) -> None:
        """Until nothing is under way and has not been for CALM_S, in which nothing may come to life again.

        Verdicts on who floods or contradicts itself go on spreading: with those to the very end.
        """
        busy_at = self.loop.now
        calm_s = QUIET_S if set(self._actors.values()) & {"flooder", "equivocator"} else CALM_S
        while self.loop.now < min(end, busy_at + calm_s):
            self.loop.run_until(min(end, self.loop.now + 1.0))
            if self._is_busy():
                busy_at = self.loop.now

    def _is_busy(self) -> bool:
        return (
            any(each.outcome is None for each in self.asks)
            or any(each.outcome is None for each in self.fetches)
            or any(each.backlog is not None or each.leftovers() for each in self.alive.values())
        )

    def _settled(self, size: int, sent: Counter[PeerId], events: int, told: int) -> Crowd:
        seconds, count = self.scenario.seconds / 2, self.scenario.peers
        known = [len(each.directory.offers(self.loop.now)) for each in self.alive.values()]
        return Crowd(
            bytes_per_peer_s=(self.net.bytes - size) / seconds / count,
            bytes_per_peer_s_max=max((self.net.sent - sent).values()) / seconds,
            events_per_peer_s=(self.loop.done - events) / seconds / count,
            offers_known=sum(known) / len(known),
            summary_bytes_per_peer_s=(self.net.gossiped[SummaryBytes.__name__] - told) / seconds / count,
            claims_known=sum(len(each.self_talk.claims) for each in self.alive.values()) / len(self.alive),
        )

    def _make_peers(self) -> list[Peer]:
        scenario, peers = self.scenario, list[Peer]()
        serving = round(scenario.serving * scenario.peers)
        actors: list[str] = []
        for actor, share in (
            ("black_hole", scenario.black_holes),
            ("staller", scenario.stallers),
            ("liar", scenario.liars),
            ("flooder", scenario.flooders),
            ("equivocator", scenario.equivocators),
        ):
            actors += [actor] * round(share * serving)
        for number in range(scenario.peers):
            actor = actors[number] if number < len(actors) else "honest"
            serves = number < serving
            skew_ms = self.rng.randint(-scenario.skew_ms, scenario.skew_ms)
            is_rare = serves and number >= serving - scenario.rare_models
            model = f"rare{number}" if is_rare else MODEL
            address = f"/ip4/{20 + number // 65536}.{number // 256 % 256}.{number % 256}.1/tcp/4001"
            tells = number < scenario.peers * scenario.summaries
            peers.append(Peer(_identity(number), serves, actor, address, skew_ms, model, tells))
        for number in range(scenario.peers, scenario.peers + scenario.sybils):
            address = f"/ip4/45.0.{number % SYBIL_NETWORKS}.{number % 250}/tcp/{4001 + number // 250}"
            tells = scenario.summaries > 0.0
            peers.append(Peer(_identity(number), serves=True, actor="sybil", address=address, tells=tells))
        return peers

    def _each(self, rate_per_s: float, act: Any, end: float) -> None:
        """`act` at Poisson times from the warm-up to the end."""

        def again() -> None:
            if self.loop.now < end:
                act()
                self.loop.after(self.rng.expovariate(rate_per_s), again)

        if rate_per_s > 0:
            self.loop.at(WARM_UP_S + self.rng.expovariate(rate_per_s), again)

    def _start(self, peer: Peer) -> None:
        process = Process(peer, self.net, random.Random(self.rng.getrandbits(64)), self.everybody)
        self.net.processes[process.peer_id] = process
        self.alive[process.peer_id] = process
        self.history.note("start", process.peer_id[-6:])
        process.begin()
        if peer.actor == "flooder":
            self._flood(process)

    def _flood(self, process: Process) -> None:
        process.publish()
        process.after(0.02, lambda: self._flood(process))

    def _dropped(self, link: Link) -> None:
        """How long somebody honest put up with a flooder."""
        if sorted(self._actors[end.peer_id] == "flooder" for end in link.ends) == [False, True]:
            self.flooder_kept_s = max(self.flooder_kept_s, self.loop.now - link.made_at)

    def _honest(self) -> list[Process]:
        return [each for each in self.alive.values() if each.peer.actor == "honest"]

    def _ask(self) -> None:
        rng, scenario = self.rng, self.scenario
        doors = [each for each in self._honest() if each.backlog is None]
        door = rng.choice(doors)
        tokens = tuple(rng.randrange(1000) for _ in range(rng.randint(1, 8)))
        work = GenerateWork(
            request_id=f"r{len(self.asks)}",
            model=self._wanted(),
            tokens=tokens,
            sampling=Sampling(max_tokens=rng.randint(1, 100)),
            remaining_ms=int(1000 * rng.uniform(*scenario.deadline_s)),
        )
        route = RouteHint(route=Route.REMOTE if rng.random() < 0.5 else Route.AUTO)
        ask = Ask(door, len(self.asks), work, route)
        self.asks.append(ask)
        door.asks[ask.number] = ask
        self.history.note("ask", ask.number, door.peer_id[-6:])
        if rng.random() < scenario.cancels:
            door.after(rng.uniform(0.0, 5.0), ask.cancel)
        ask.go()

    def _fetch(self) -> None:
        """Somebody honest wants the blob, of some who have it."""
        process = self.rng.choice([each for each in self._honest() if each.backlog is None])
        donors = [peer.identity.peer_id for peer in self.peers if peer.serves and peer is not process.peer]
        chosen = self.rng.sample(donors, min(FETCH_DONORS, len(donors)))
        fetch = Fetch(process, len(self.fetches), chosen)
        self.fetches.append(fetch)
        process.fetches.append(fetch)
        self.history.note("fetch", fetch.number, process.peer_id[-6:])
        fetch.go()

    def _wanted(self) -> str | None:
        """The model that a client names, if it does."""
        rare = [peer.model for peer in self.peers if peer.model != MODEL] if self.scenario.rare_requests else []
        if not rare:
            return None
        return self.rng.choice(rare) if self.rng.random() < self.scenario.rare_requests else MODEL

    def _crash(self) -> None:
        process = self.rng.choice(list(self.alive.values()))
        silent = self.rng.random() < self.scenario.silent
        self.history.note("crash", process.peer_id[-6:], silent)
        del self.alive[process.peer_id]
        self.violations += process.violations
        for ask in list(process.asks.values()):
            ask.died()
        for fetch in process.fetches:
            fetch.died()
        self.net.crashed(process, silent=silent)
        self.loop.after(self.rng.uniform(*self.scenario.down_s), lambda: self._start(process.peer))

    def _pause(self) -> None:
        process = self.rng.choice(list(self.alive.values()))
        if process.backlog is None:
            process.pause()
            self.history.note("pause", process.peer_id[-6:])
            self.loop.after(self.rng.uniform(*self.scenario.pause_s), process.resume)

    def _cut(self) -> None:
        one, two = self.rng.sample(self.everybody, 2)
        cut = {(one, two)} if self.rng.random() < 0.5 else {(one, two), (two, one)}
        self.net.cut |= cut
        self.history.note("cut", one[-6:], two[-6:], len(cut))
        self.loop.after(self.rng.uniform(*self.scenario.cut_s), lambda: self.net.mend(cut))

    def _outcome(self, seed: int, sent_bytes: int, sent_bytes_max: int) -> Outcome:
        ends = Counter(ask.outcome for ask in self.asks if ask.outcome is not None)
        wrong = list(self.violations)
        for ask in self.asks:
            if ask.outcome is not None and ask.outcome not in ENDS | {"door_died"}:
                wrong.append(f"request {ask.number} ended as {ask.outcome!r}")
            wrong += _faults(ask)
        wrong += [f"fetch {each.number} has not ended" for each in self.fetches if each.outcome is None]
        seconds = WARM_UP_S + self.scenario.seconds
        return Outcome(
            seed=seed,
            accepted=len(self.asks),
            ends=dict(sorted(ends.items())),
            unresolved=sum(ask.outcome is None for ask in self.asks),
            wrong=tuple(wrong),
            takeovers=sum(ask.takeovers for ask in self.asks),
            latencies_s=tuple(
                ask.ended - ask.began for ask in self.asks if ask.outcome == "finished" and ask.ended is not None
            ),
            asked_of_holes=max(self.net.asked_of_holes.values(), default=0),
            flooder_kept_s=self.flooder_kept_s,
            banned=self._banned(),
            bytes_per_peer_s=sent_bytes / seconds / self.scenario.peers,
            bytes_per_peer_s_max=sent_bytes_max / seconds,
            searches=sum(each.finder.searches for each in self.alive.values()),
            found=sum(each.finder.found for each in self.alive.values()),
            fetches=dict(sorted(Counter(str(each.outcome) for each in self.fetches).items())),
            events=self.loop.done,
            digest=self.history.digest(),
            lines=tuple(self.history.lines),
        )

    def _banned(self) -> dict[str, float]:
        """Of each kind the one that fewest have banned."""
        shares: dict[str, float] = {}
        honest = self._honest()
        for peer in self.peers:
            if peer.actor != "honest":
                who, now = peer.identity.peer_id, self.loop.now
                share = sum(each.standing.verdict(who, now) is Verdict.BANNED for each in honest) / len(honest)
                shares[peer.actor] = min(share, shares.get(peer.actor, 1.0))
        return shares


def _faults(ask: Ask) -> Iterator[str]:
    """What is wrong with a request's answer and its time."""
    work, prompt = ask.work, ask.work.tokens or ()
    got = ask.pursuit.tokens
    if got != [token_at(prompt, position) for position in range(len(got))]:
        yield f"request {ask.number} got wrong tokens"
    if ask.text != "".join(text_at(prompt, position) for position in range(len(got))):
        yield f"request {ask.number} got wrong text"
    if ask.outcome == "finished" and len(got) != work.sampling.max_tokens:
        yield f"request {ask.number} got {len(got)} tokens of {work.sampling.max_tokens}"
    # a paused door cannot keep the time; its clients' own deadlines are their own
    late_s = 0.0 if ask.ended is None else ask.ended - ask.began - work.remaining_ms / 1000
    if late_s > GRACE_S and ask.number not in ask.process.paused_asks:
        yield f"request {ask.number} ended {late_s:.3f} s after its deadline"


def simulate(seed: int, scenario: Scenario, *, keep_lines: bool = False) -> Outcome:
    """Run one seed to its quiet end."""
    with _each_statement_once():
        return Swarm(seed, scenario, keep_lines=keep_lines).run(seed)


def crowd(seed: int, scenario: Scenario) -> tuple[Outcome, Crowd]:
    """The same, and what it cost a node."""
    with _each_statement_once():
        swarm = Swarm(seed, scenario)
        outcome = swarm.run(seed)
        return outcome, swarm.crowd


def replay_command(seed: int, scenario: Scenario) -> str:
    """The command that shows a seed's history."""
    changed = {
        name: value
        for name, value in asdict(scenario).items()
        if name != "weather" and value != asdict(Scenario())[name]
    }
    options = "".join(f" --{name.replace('_', '-')} {value}" for name, value in changed.items())
    return f"python -m bench.swarm --seed {seed}{options} --replay"


_IDENTITIES: dict[int, Identity] = {}


def _identity(number: int) -> Identity:
    """The same peer in every seed: making a key costs more than a second of its life."""
    if number not in _IDENTITIES:
        _IDENTITIES[number] = Identity(hashlib.sha256(b"simulator %d" % number).digest())
    return _IDENTITIES[number]


def _opened_once(genuine: Any) -> Any:
    """A directory opens envelopes whatever their time; so the time need not tell them apart."""
    once = lru_cache(maxsize=STATEMENTS_MAX)(
        lambda raw, domain, network, skew_ms: genuine(raw, domain=domain, network=network, now_ms=0, skew_ms=skew_ms)
    )
    return lambda raw, *, domain, network, now_ms, skew_ms: once(raw, domain, network, skew_ms)


@contextmanager
def _each_statement_once() -> Iterator[None]:
    """A statement reaches every peer: what it says, and whether it is signed rightly, are pure functions of its bytes.

    They are asked once for each distinct statement; errors are asked again. Garbage is looked for seldom: what a
    process leaves when it crashes is all the cycles that there are.
    """
    names = [
        (crypto.envelope, ("verify_key", "peer_id_of", "_parse")),
        (gossip.directory, ("advert_of", "open_envelope")),
        (gossip.claims, ("summary_of",)),
    ]
    places = [(module, name, vars(module)[name]) for module, each in names for name in each]
    for module, name, genuine in places:
        once = _opened_once if name == "open_envelope" else lru_cache(maxsize=STATEMENTS_MAX)
        setattr(module, name, once(genuine))
    thresholds = gc.get_threshold()
    gc.set_threshold(GARBAGE_AT)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        for module, name, genuine in places:
            setattr(module, name, genuine)
