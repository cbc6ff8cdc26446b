"""`python -m bench.flood`: a node of its own under three attacks, and what its honest peers notice of each.

Rules: victim, attacker and honest peers are separate processes (the honest ones are two hosts in this one). Honest
gossip is one advert a second from one peer to the other, who are connected to the victim alone. Memory is the victim's
RSS, against what it was before the attack.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import trio

from bench.harness import Row, options, quantile, report
from crypto.identity import Identity, PeerId
from gossip.messages import Advert, Capacity, advert_topic, seal_advert
from node.commands.processes import Cluster, NodeProcess
from p2p.errors import P2PError
from p2p.host import Libp2pTransport, open_host
from p2p.host_config import HostConfig

MIB = 1 << 20
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
MESH_S = 3.0  # until the two honest peers are in the victim's mesh
LATE_S = 10.0  # what has not come by then is lost
JOIN_EVERY_S = 1.0
LOOK_S = 0.2  # between looks at the memory


@dataclass
class Honest:
    """One peer that speaks once a second, one that hears it through the victim."""

    speaker: Libp2pTransport
    hearer: Libp2pTransport
    identity: Identity
    network: str
    sent_s: dict[bytes, float] = field(default_factory=dict)
    delays_s: list[float] = field(default_factory=list)
    joins_s: list[float] = field(default_factory=list)  # LATE_S for one that was refused
    refused: int = 0

    def heard(self, _peer: PeerId, raw: bytes) -> bool:
        """A gossip message came through."""
        if (began := self.sent_s.pop(raw, None)) is not None:
            self.delays_s.append(time.monotonic() - began)
        return True

    async def speak(self) -> None:
        """An advert a second, until cancelled."""
        while True:
            now_ms = time.time_ns() // 1_000_000
            advert = Advert(instance="cd" * 16, started_ms=1, agent="honest", capacity=Capacity(accepting=True))
            raw = seal_advert(self.identity, advert, network=self.network, sequence=now_ms, time_ms=now_ms)
            self.sent_s[raw] = time.monotonic()
            with trio.CancelScope(shield=True):  # what is counted as sent is sent
                await self.speaker.publish(advert_topic(self.network), raw)
            await trio.sleep(1.0)

    async def join(self, address: str) -> None:
        """A new honest peer connects, again and again, until cancelled; how long each took."""
        while True:
            began = time.monotonic()
            async with open_host(Identity.make(), HostConfig(listen=(LOOPBACK,))) as newcomer:
                began = time.monotonic()
                try:
                    await newcomer.dial(address)
                    self.joins_s.append(time.monotonic() - began)
                except P2PError:
                    self.refused += 1
                    self.joins_s.append(LATE_S)
            await trio.sleep(JOIN_EVERY_S)

    @property
    def lost(self) -> int:
        """Messages that never came."""
        return len(self.sent_s)


@asynccontextmanager
async def honest(address: str, network: str) -> AsyncIterator[Honest]:
    """Two honest peers of the victim, subscribed and in its mesh."""
    topic = advert_topic(network)
    config = HostConfig(listen=(LOOPBACK,), topics=frozenset({topic}))
    identity = Identity.make()
    async with open_host(identity, config) as speaker, open_host(Identity.make(), config) as hearer:
        pair = Honest(speaker, hearer, identity, network)
        await speaker.subscribe(topic, lambda _peer, _raw: False)
        await hearer.subscribe(topic, pair.heard)
        for each in (speaker, hearer):
            await each.dial(address)
        await trio.sleep(MESH_S)
        yield pair


@contextmanager
def attacker(*words: str) -> Iterator[subprocess.Popen[str]]:
    """The attacker's process, ready and waiting for a line; without words one that does nothing."""
    nothing = "print('ready', flush=True); input(); print('{}', flush=True)"
    command = [sys.executable, "-m", "bench.flood_end", *words] if words else [sys.executable, "-c", nothing]
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What an attack did: to the honest peers, to the victim's memory, and what the attacker says of itself."""

    delays_s: tuple[float, ...]
    joins_s: tuple[float, ...]
    lost: int
    grown_mib: float
    told: dict[str, Any]


@dataclass
class Siege:
    """An attack under way. `pair`: the honest peers beside it; `grown_bytes`: of the victim, at most so far."""

    pair: Honest
    attack: subprocess.Popen[str]
    grown_bytes: int = 0
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)  # of what happens beside

    async def end(self) -> dict[str, Any]:
        """End the attack, and no more is sent by the honest; what the attacker says of itself."""
        assert self.attack.stdin is not None
        assert self.attack.stdout is not None
        with suppress(OSError):  # it has ended by itself
            os.write(self.attack.stdin.fileno(), b"end\n")  # past Python's buffer, which would try again at its end
        told: dict[str, Any] = json.loads(await trio.to_thread.run_sync(self.attack.stdout.readline))
        self.scope.cancel()
        return told

    async def beside(self, victim: NodeProcess) -> None:
        """The honest peers' doings, until the siege ends."""
        with self.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.watch, psutil.Process(victim.process.pid))
                nursery.start_soon(self.pair.speak)
                nursery.start_soon(self.pair.join, victim.address)

    async def watch(self, process: psutil.Process) -> None:
        """Take note of the victim's memory, until cancelled."""
        before = process.memory_info().rss
        while True:
            self.grown_bytes = max(self.grown_bytes, process.memory_info().rss - before)
            await trio.sleep(LOOK_S)


@asynccontextmanager
async def besieged(victim: NodeProcess, seconds: float, network: str, *words: str) -> AsyncIterator[Siege]:
    """An attack on a node with honest peers beside it, until it is ended, at most `seconds`.

    words: of bench.flood_end; none: no attack.
    """
    more = [words[0], victim.address, str(seconds), *words[1:]] if words else []
    with attacker(*more) as attack:  # its start blocks this thread, so the honest come after it
        async with honest(victim.address, network) as pair:
            async with trio.open_nursery() as nursery:
                siege = Siege(pair, attack)
                nursery.start_soon(siege.beside, victim)
                assert attack.stdin is not None
                attack.stdin.write("go\n")
                attack.stdin.flush()
                yield siege
                nursery.cancel_scope.cancel()


async def attacked(victim: NodeProcess, network: str, seconds: float, *words: str) -> Outcome:
    """Run an attack of `seconds` on a node, with honest peers beside it. words: of bench.flood_end; none: no attack."""
    async with besieged(victim, seconds, network, *words) as siege:
        await trio.sleep(seconds)
        told = await siege.end()
        await trio.sleep(1.0)
        pair = siege.pair
        fresh = sum(time.monotonic() - sent < LATE_S for sent in pair.sent_s.values())
        return Outcome(
            delays_s=tuple(pair.delays_s),
            joins_s=tuple(pair.joins_s),
            lost=pair.lost - min(fresh, 1),
            grown_mib=siege.grown_bytes / MIB,
            told=told,
        )


def main() -> None:
    """Measure and report."""
    chosen = options(__doc__)
    seconds = 10.0 if chosen.quick else 60.0
    with tempfile.TemporaryDirectory() as place, Cluster(Path(place)) as cluster:
        victim = cluster.start("victim", "--model", "none").wait_ready()

        def attack(*words: str) -> Outcome:
            return trio.run(attacked, victim, cluster.network, seconds, *words)

        attack()  # its memory settles
        calm = attack()
        flood = attack("gossip", cluster.network, "10000")
        idle = attack("idle", "2000", "127.0.9", "50")
        claims = attack("claims", "200")
    calm_ms = 1000 * quantile(calm.delays_s, 0.99)
    report(
        "flood",
        [
            Row(
                figure="gossip_honest_p99",
                value=1000 * quantile(flood.delays_s, 0.99),
                unit="ms",
                better="lower",
                rival="without an attack",
                rival_value=calm_ms,
            ),
            Row(figure="gossip_attacker_cut_after", value=flood.told["first_cut_s"], unit="s", better="lower"),
            Row(
                figure="gossip_out_until_cut",
                value=flood.told["sent_first"] / flood.told["first_cut_s"],
                unit="messages/s of 10,000 offered",
                better="higher",
            ),
            Row(figure="gossip_lost", value=flood.lost, unit="honest messages", better="lower"),
            Row(figure="gossip_memory", value=flood.grown_mib, unit="MiB", better="lower"),
            Row(
                figure="idle_2000_join_worst",
                value=max(idle.joins_s),
                unit="s",
                better="lower",
                rival="without an attack",
                rival_value=max(calm.joins_s),
            ),
            Row(
                figure="idle_2000_honest_p99",
                value=1000 * quantile(idle.delays_s, 0.99),
                unit="ms",
                better="lower",
                rival="without an attack",
                rival_value=calm_ms,
            ),
            Row(figure="idle_2000_lost", value=idle.lost, unit="honest messages", better="lower"),
            Row(figure="idle_2000_opened", value=idle.told["opened"], unit="sockets in all", better="higher"),
            Row(figure="claims_200_sent", value=claims.told["taken_bytes"] / 1e6, unit="MB", better="higher"),
            Row(figure="claims_200_memory", value=claims.grown_mib, unit="MiB", better="lower"),
        ],
        chosen,
    )


if __name__ == "__main__":
    main()
