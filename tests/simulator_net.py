"""The simulator's time and wires: a heap of timed events, links that are ordered, slow, cut or half open, a history.

Rules: no clock and no chance but its own, so that a seed is a history. An event belongs to a process: a dead one's are
dropped, a paused one's wait for it. Bytes on a link arrive whole and in order, late rather than lost, as over TCP;
a crash breaks its links at once, or (the power went, the path is cut) only after the health check has missed twice.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from crypto.identity import PeerId

RETRANSMIT_S = 0.25
DIAL_S_MAX = 5.0
HEALTH_S = 10.0
MISSES_MAX = 2


@dataclass(slots=True)
class Timer:
    """An event to come."""

    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


Waiting = tuple[Timer | None, Callable[..., None], tuple[Any, ...]]  # an event of a paused process


class Owner(Protocol):
    """What an event belongs to."""

    alive: bool
    backlog: list[Waiting] | None  # a list while it is paused


class Loop:
    """Timed events in order; equal times in the order in which they were made."""

    def __init__(self) -> None:
        self.now = 0.0
        self.done = 0
        self._heap: list[tuple[float, int, Timer | None, Owner | None, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def after(self, seconds: float, call: Callable[[], None], owner: Owner | None = None) -> Timer:
        return self.at(self.now + seconds, call, owner)

    def at(self, when: float, call: Callable[[], None], owner: Owner | None = None) -> Timer:
        timer = Timer()
        self._count += 1
        heapq.heappush(self._heap, (max(when, self.now), self._count, timer, owner, call, ()))
        return timer

    def post(self, when: float, owner: Owner, call: Callable[..., None], *about: Any) -> None:
        """As `at`, for what is never cancelled; `when` is not in the past."""
        self._count += 1
        heapq.heappush(self._heap, (when, self._count, None, owner, call, about))

    def run_until(self, end: float) -> None:
        """Everything up to `end`, and the time is `end` then."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= end:
            self.now, _, timer, owner, call, about = pop(heap)
            if (timer is not None and timer.cancelled) or (owner is not None and not owner.alive):
                continue
            self.done += 1
            if owner is not None and owner.backlog is not None:
                owner.backlog.append((timer, call, about))
            else:
                call(*about)
        self.now = end


class History:
    """What happened, as a hash: two runs with one hash were the same run."""

    def __init__(self, loop: Loop) -> None:
        self._loop, self._hash, self.lines = loop, hashlib.sha256(), list[str]()
        self.keep = False

    def note(self, what: str, *about: object) -> None:
        line = f"{self._loop.now:.6f} {what} {' '.join(map(str, about))}"
        self._hash.update(line.encode() + b"\n")
        if self.keep:
            self.lines.append(line)

    def digest(self) -> str:
        return self._hash.hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """What the wires do. Delays are one way; loss of a segment costs a retransmission, loss of gossip its message."""

    delay_s: tuple[float, float] = (0.02, 0.08)  # of a pair, drawn once
    jitter_s: float = 0.01
    loss: float = 0.02
    duplicate: float = 0.005  # of gossip
    reorder: float = 0.01  # of gossip: up to `late_s` later
    late_s: float = 1.0
    bytes_per_s: float = 2_500_000.0


class End(Protocol):
    """One end of a link: a process."""

    alive: bool
    backlog: list[Waiting] | None
    links: dict[PeerId, Link]
    expected: dict[bytes, float]  # gossip on its way here -> when the first copy comes
    seen: dict[bytes, None]  # gossip that came: of another copy it is counted only that it was sent
    is_silent: bool  # its machine lost power: nobody is told

    @property
    def peer_id(self) -> PeerId: ...
    def accepts(self, peer: PeerId) -> bool: ...
    def connected(self, link: Link) -> None: ...
    def lost(self, link: Link) -> None: ...
    def take(self, link: Link, kind: str, raw: bytes, about: object) -> None: ...
    def heard(self, link: Link, raw: bytes, publisher: PeerId) -> None: ...


@dataclass(slots=True, eq=False)
class Link:
    """A connection of two processes."""

    ends: tuple[End, End]
    made_at: float
    delay_s: float  # one way
    alive: bool = True
    misses: int = 0
    lent_to: PeerId | None = None  # who made it for a request, and not to have company
    used_at: float = 0.0
    busy_until: list[float] = field(default_factory=lambda: [0.0, 0.0])
    held: list[list[tuple[str, bytes, object]]] = field(default_factory=lambda: [[], []])

    def other(self, end: End) -> End:
        return self.ends[1] if self.ends[0] is end else self.ends[0]

    def deliver(self, receiver: End, kind: str, raw: bytes, about: object) -> None:
        """What was sent arrives, if the link still lives."""
        if self.alive:
            receiver.take(self, kind, raw, about)

    def deliver_gossip(self, receiver: End, raw: bytes, publisher: PeerId) -> None:
        receiver.expected.pop(raw, None)
        if self.alive:
            receiver.heard(self, raw, publisher)


class Net:
    """All wires."""

    def __init__(self, loop: Loop, rng: random.Random, weather: Weather, history: History) -> None:
        self.loop, self.rng, self.weather, self.history = loop, rng, weather, history
        self.processes: dict[PeerId, End] = {}
        self.addresses: dict[PeerId, str] = {}
        self.cut: set[tuple[PeerId, PeerId]] = set()
        self.links: dict[Link, None] = {}
        self.bytes = 0
        self.sent: Counter[PeerId] = Counter()  # bytes by sender
        self.gossiped: Counter[str] = Counter()  # bytes by kind of gossip
        self.asked_of_holes: Counter[tuple[PeerId, PeerId]] = Counter()  # (door, black hole) -> calls
        self.told_by_sybils: list[bytes] = []  # newest first
        self.on_drop: Callable[[Link], None] = lambda _link: None
        self._delays: dict[tuple[PeerId, PeerId], float] = {}
        self._uplinks: dict[PeerId, float] = {}  # when what a machine has sent so far is on the wire

    def delay_s(self, here: PeerId, there: PeerId) -> float:
        """One way between two machines, drawn once."""
        pair = (here, there) if here < there else (there, here)
        if pair not in self._delays:
            self._delays[pair] = self.rng.uniform(*self.weather.delay_s)
        return self._delays[pair]

    def flight_s(self, here: PeerId, delay_s: float, size: int) -> float:
        """How long some bytes are on their way, behind what `here` sent before, with the retransmissions they need."""
        now, weather, chance = self.loop.now, self.weather, self.rng.random
        sent = max(now, self._uplinks.get(here, 0.0)) + size / weather.bytes_per_s
        self._uplinks[here] = sent
        seconds = sent - now + delay_s + chance() * weather.jitter_s
        wait_s = RETRANSMIT_S
        while chance() < weather.loss:
            seconds, wait_s = seconds + wait_s, 2 * wait_s
        return seconds

    def blocked(self, here: PeerId, there: PeerId) -> bool:
        return (here, there) in self.cut

    def send(self, link: Link, sender: End, kind: str, raw: bytes, about: object = None) -> None:
        """Ordered and reliable, for as long as the link lives."""
        if not link.alive:
            return
        side = 0 if link.ends[0] is sender else 1
        receiver, here, size = link.ends[1 - side], sender.peer_id, len(raw)
        if self.cut and self.blocked(here, receiver.peer_id):
            link.held[side].append((kind, raw, about))
            return
        self.bytes += size
        self.sent[here] += size
        when = max(link.busy_until[side], self.loop.now + self.flight_s(here, link.delay_s, size))
        link.busy_until[side] = when
        self.loop.post(when, receiver, link.deliver, receiver, kind, raw, about)

    def gossip(self, links: Iterable[Link], sender: End, raw: bytes, publisher: PeerId) -> None:
        """A message to several, that may be lost, doubled and overtaken on its way to each."""
        weather, chance, now, size, here = self.weather, self.rng.random, self.loop.now, len(raw), sender.peer_id
        sent = 0
        for link in links:
            ends = link.ends
            receiver = ends[1] if ends[0] is sender else ends[0]
            if not link.alive or (self.cut and self.blocked(here, receiver.peer_id)):
                continue
            if raw in receiver.seen:  # it would be dropped when it comes: no event for that
                sent += 1
                continue
            for _ in range(1 + (chance() < weather.duplicate) - (chance() < weather.loss)):
                sent += 1
                seconds = self.flight_s(here, link.delay_s, size)
                if chance() < weather.reorder:
                    seconds += chance() * weather.late_s
                when = now + seconds
                if when < receiver.expected.get(raw, math.inf):  # else another copy will be there before it
                    receiver.expected[raw] = when
                    self.loop.post(when, receiver, link.deliver_gossip, receiver, raw, publisher)
        self.bytes += sent * size
        self.sent[here] += sent * size
        self.gossiped[type(raw).__name__] += sent * size

    def dial(self, here: End, there: PeerId, done: Callable[[Link | None], None]) -> None:
        """A connection, the one that is there if there is one; None when it cannot be had within DIAL_S_MAX."""
        if there in here.links:
            done(here.links[there])
            return
        delay_s = self.delay_s(here.peer_id, there)
        round_trip_s = self.flight_s(here.peer_id, delay_s, 200) + self.flight_s(there, delay_s, 200)
        target = self.processes.get(there)
        cut = self.blocked(here.peer_id, there) or self.blocked(there, here.peer_id)
        if cut or (target is not None and (target.backlog is not None or (not target.alive and target.is_silent))):
            self.loop.after(DIAL_S_MAX, lambda: done(here.links.get(there)), here)
            return

        def arrive() -> None:
            if there in here.links:
                done(here.links[there])
            elif target is None or not target.alive or not target.accepts(here.peer_id):
                done(None)
            else:
                done(self._connect(here, target))

        self.loop.after(1.5 * round_trip_s, arrive, here)

    def _connect(self, here: End, there: End) -> Link:
        link = Link((here, there), self.loop.now, self.delay_s(here.peer_id, there.peer_id))
        self.links[link] = None
        here.links[there.peer_id] = link
        there.links[here.peer_id] = link
        self.loop.after(0.0, lambda: there.connected(link), there)
        here.connected(link)
        self.loop.after(HEALTH_S, lambda: self._check(link))
        return link

    def _check(self, link: Link) -> None:
        """The health check of both ends: a link over which no ping comes back is given up."""
        if not link.alive:
            return
        one, two = link.ends
        is_cut = self.blocked(one.peer_id, two.peer_id) or self.blocked(two.peer_id, one.peer_id)
        bad = is_cut or any(not end.alive or end.backlog is not None for end in link.ends)
        link.misses = link.misses + 1 if bad else 0
        if link.misses >= MISSES_MAX:
            self.drop(link)
        else:
            self.loop.after(HEALTH_S, lambda: self._check(link))

    def drop(self, link: Link, but: End | None = None) -> None:
        """The link is over; its ends learn it (`but` knows it already)."""
        if not link.alive:
            return
        link.alive = False
        del self.links[link]
        self.on_drop(link)
        for end in link.ends:
            other = link.other(end).peer_id
            if end.links.get(other) is link:
                del end.links[other]
            if end is not but:
                self.loop.after(0.0, lambda end=end: end.lost(link), end)  # type: ignore[misc]

    def crashed(self, process: End, *, silent: bool) -> None:
        """A process is gone. silent: the machine went with it, so that nobody's connection is reset."""
        process.alive, process.is_silent = False, silent
        if silent:
            return
        for link in list(process.links.values()):
            self.loop.after(self.weather.delay_s[0], lambda link=link: self.drop(link, process))  # type: ignore[misc]

    def mend(self, cut: set[tuple[PeerId, PeerId]]) -> None:
        """These paths open, and what was held back flows."""
        self.cut -= cut
        self._flow()

    def heal(self) -> None:
        """Every path opens."""
        self.cut.clear()
        self._flow()

    def _flow(self) -> None:
        for link in list(self.links):
            for side in (0, 1):
                if self.blocked(link.ends[side].peer_id, link.ends[1 - side].peer_id):
                    continue
                held, link.held[side] = link.held[side], []
                for kind, raw, about in held:
                    self.send(link, link.ends[side], kind, raw, about)
