"""The real swarm's nodes and what befalls them: kills, freezes, cuts, narrow and slow cables, on a seeded timetable.

Rules: at each instant at least one node that serves is healthy, on each side of a cut. What was done is kept with its
time (time.monotonic()), so that the clients' records can be read against it. A fault that this machine cannot make is
left out, and said.
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx

from bench.real_clients import DoorNow
from bench.real_net import Fabric, Host
from crypto.identity import Identity
from node.commands.processes import Cluster, NodeProcess
from node.config import KEY_FILE

RESTART_S = 6.0
FREEZE_S, CUT_S, NARROW_S, SLOW_S = 9.0, 14.0, 10.0, 12.0
NARROW_MBIT_S, SLOW_MS, SLOW_LOSS = 4.0, 40.0, 0.01
HEALED_S_MAX = 60.0  # how long is waited for a cut to be forgotten
ALL = ("kill", "freeze", "cut", "narrow", "slow")


@dataclass(slots=True, kw_only=True)
class Member:
    """One node of the swarm, over all its lives."""

    name: str
    host: Host
    port: int
    serves: bool
    process: NodeProcess | None = None
    ready: bool = False
    frozen: bool = False
    restart_at: float = 0.0
    kills: list[float] = field(default_factory=list)
    freezes: list[float] = field(default_factory=list)
    peer_id: str = ""

    @property
    def healthy(self) -> bool:
        """Whether it can do its work now."""
        return self.process is not None and self.ready and not self.frozen

    def door(self) -> DoorNow | None:
        """Its HTTP door now."""
        if self.process is None or not self.ready:
            return None
        lives = len(self.kills)  # counted before the signal is sent, so that no client sees its effect first
        return DoorNow(name=self.name, url=self.process.url, killed=lambda: len(self.kills) > lives)


@dataclass(frozen=True, slots=True, kw_only=True)
class Happened:
    """One fault: what, to whom, from when to when."""

    what: str
    whom: str
    at: float
    until: float


class Swarm:
    """All members; starts, kills and restarts them."""

    def __init__(self, cluster: Cluster, hosts: list[Host], count: int, servers: int) -> None:
        """Starts `count` nodes, the first `servers` of which serve, over the hosts in turn."""
        self._cluster = cluster
        self.members: list[Member] = []
        for number in range(count):
            host = hosts[number % len(hosts)]
            name = f"server{number}" if number < servers else f"door{number}"
            member = Member(name=name, host=host, port=next(host.ports), serves=number < servers)
            member.peer_id = Identity.load_or_make(cluster.root / name / KEY_FILE).peer_id
            self.members.append(member)
        self._file = cluster.root / "bootstrap_peers.json"
        known = [self.members[0], self.members[servers], self.members[-1]]
        self._file.write_text(json.dumps([{"addr": self._address(one), "note": one.name} for one in known]))
        for member in self.members:
            self.start(member)

    def _address(self, member: Member) -> str:
        return f"/ip4/{member.host.address}/tcp/{member.port}/p2p/{member.peer_id}"

    def start(self, member: Member) -> None:
        """Start a node, or start it again with the data it had."""
        member.process = self._cluster.start(
            member.name,
            *("--bootstrap-file", str(self._file), "--listen", f"/ip4/{member.host.address}/tcp/{member.port}"),
            *(() if member.serves else ("--model", "none")),
            inside=member.host.inside,
        )
        member.ready, member.restart_at = False, 0.0

    def look(self, now: float) -> None:
        """Notice who has become ready; start again who is due."""
        for member in self.members:
            if member.process is None and now >= member.restart_at > 0:
                self.start(member)
            elif member.process is not None and not member.ready and self._has_word(member, member.process):
                member.process.wait_ready()  # raises what its log says when it has ended instead
                member.ready = True

    def _has_word(self, member: Member, process: NodeProcess) -> bool:
        return (self._cluster.root / f"{member.name}.ready").exists() or process.process.poll() is not None

    def kill(self, member: Member) -> None:
        """kill -9, and a restart later."""
        assert member.process is not None
        member.ready = False  # first: who asked it from here on would take its end for a fault
        member.kills.append(time.monotonic())
        member.process.process.kill()
        member.process.process.wait()
        self._cluster.nodes.remove(member.process)
        member.process, member.ready, member.frozen = None, False, False
        member.restart_at = time.monotonic() + RESTART_S

    def freeze(self, member: Member) -> None:
        """SIGSTOP."""
        assert member.process is not None
        member.freezes.append(time.monotonic())
        member.process.process.send_signal(signal.SIGSTOP)
        member.frozen = True

    def thaw(self, member: Member) -> None:
        """SIGCONT, if it lives."""
        if member.process is not None:
            member.process.process.send_signal(signal.SIGCONT)
        member.frozen = False

    def healthy(self, *, serving: bool) -> list[Member]:
        """Who can work now, of one kind."""
        return [member for member in self.members if member.serves is serving and member.healthy]

    def doors(self, host: Host) -> list[DoorNow]:
        """The doors of a host that clients may ask."""
        found = [member.door() for member in self.members if member.host is host and not member.serves]
        return [door for door in found if door is not None]


class Faults:
    """The timetable: a generator of waits, which does things between them."""

    def __init__(self, swarm: Swarm, fabric: Fabric | None, kinds: frozenset[str], rng: random.Random) -> None:
        """fabric: None where there are no namespaces; then only kills and freezes are possible."""
        self._swarm, self._fabric, self._rng, self._kinds = swarm, fabric, rng, kinds
        self.happened: list[Happened] = []
        self.recoveries_s: list[float] = []
        self._spared: set[str] = set()  # who must not be killed while there is a cut
        self.link_told: list[str] = []

    def kill_one(self) -> None:
        """Kill a node at random, if one may be killed: as often one that serves as a door."""
        swarm, rng = self._swarm, self._rng
        serving, doors = swarm.healthy(serving=True), swarm.healthy(serving=False)
        candidates = [one for one in serving if one.name not in self._spared] if len(serving) > 1 else []
        if not candidates or (rng.random() < 0.5 and len(doors) > 2):
            candidates = doors
        if candidates:
            victim = rng.choice(candidates)
            now = time.monotonic()
            swarm.kill(victim)
            self._note(Happened(what="kill", whom=victim.name, at=now, until=now))

    def _note(self, fault: Happened) -> None:
        self.happened.append(fault)
        healthy = [member.name for member in self._swarm.members if member.healthy]
        print(f"{fault.what} {fault.whom} for {fault.until - fault.at:.0f} s; healthy now: {healthy}", flush=True)

    def others(self) -> Iterator[float]:
        """The other kinds of faults in turn, for ever; yields how long to wait before it goes on."""
        kinds = [getattr(self, f"_{kind}") for kind in ALL[1:] if kind in self._kinds]
        while True:
            for kind in kinds:
                yield self._rng.uniform(2.0, 5.0)
                yield from kind()
            if not kinds:
                yield 1.0

    def _freeze(self) -> Iterator[float]:
        serving = self._swarm.healthy(serving=True)
        candidates = (serving if len(serving) > 2 else []) + self._swarm.healthy(serving=False)
        if not candidates:
            return
        victim = next((one for one in serving if one in candidates), self._rng.choice(candidates))
        self._spared = {one.name for one in serving}  # nobody else who serves is killed meanwhile
        self._swarm.freeze(victim)
        began, process = time.monotonic(), victim.process
        yield FREEZE_S
        if victim.process is process:
            self._swarm.thaw(victim)
        self._spared = set()
        self._note(Happened(what="freeze", whom=victim.name, at=began, until=time.monotonic()))

    def _cut(self) -> Iterator[float]:
        assert self._fabric is not None
        ones, others = self._sides()
        if not ones:
            return
        self._fabric.cut(ones, others)
        began = time.monotonic()
        yield CUT_S
        self._fabric.heal()
        healed = time.monotonic()
        whom = ", ".join(host.address for host in ones)
        self._note(Happened(what="cut", whom=whom, at=began, until=healed))
        while time.monotonic() - healed < HEALED_S_MAX:
            if self._joined(ones, others):
                break
            yield 0.25
        self.recoveries_s.append(time.monotonic() - healed)
        self._spared = set()

    def _sides(self) -> tuple[list[Host], list[Host]]:
        """Two sides with a healthy server each, which is spared from now on; or none."""
        assert self._fabric is not None
        serving = self._swarm.healthy(serving=True)
        if not serving:
            return [], []
        one = self._rng.choice(serving)
        ones, others = [one.host], [host for host in self._fabric.hosts if host is not one.host]
        other = next((server for server in serving if server.host in others), None)
        if other is None:
            return [], []
        self._spared = {one.name, other.name}
        return ones, others

    def _joined(self, ones: list[Host], others: list[Host]) -> bool:
        """Whether every healthy door is connected again to the spared servers of the other side."""
        for member in self._swarm.healthy(serving=False):
            door = member.door()
            far = others if member.host in ones else ones
            wanted = {one.peer_id for one in self._swarm.members if one.name in self._spared and one.host in far}
            if door is not None and not wanted <= connected(member.host, door):
                return False
        return True

    def _narrow(self) -> Iterator[float]:
        assert self._fabric is not None
        host = self._rng.choice(self._fabric.hosts)
        self._fabric.narrow(host, NARROW_MBIT_S)
        began = time.monotonic()
        yield NARROW_S
        self._fabric.widen(host)
        self._note(Happened(what="narrow", whom=host.address, at=began, until=time.monotonic()))

    def _slow(self) -> Iterator[float]:
        assert self._fabric is not None
        host = self._rng.choice(self._fabric.hosts)
        self._fabric.slow(host, SLOW_MS, SLOW_LOSS, self._rng.randrange(1 << 30))
        began = time.monotonic()
        yield SLOW_S
        self.link_told.append(self._fabric.quicken(host))
        self._note(Happened(what="slow", whom=host.address, at=began, until=time.monotonic()))

    def lift(self) -> None:
        """No fault is left."""
        for member in self._swarm.members:
            if member.frozen:
                self._swarm.thaw(member)
        if self._fabric is None:
            return
        self._fabric.heal()
        for host in self._fabric.hosts:
            if host.link is not None:
                self.link_told.append(self._fabric.quicken(host))


def connected(host: Host, door: DoorNow) -> set[str]:
    """Whom a door is connected to; nobody when it does not answer."""

    def ask() -> set[str]:
        try:
            rows = httpx.get(f"{door.url}/api/v1/peers", trust_env=False, timeout=5.0).json()["peers"]
        except (httpx.HTTPError, ValueError):
            return set()
        return {row["peer_id"] for row in rows if row["connected"]}

    return host.call(ask)
