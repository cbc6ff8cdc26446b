"""A whole node in a process of its own, for tests/test_fuzz_host.py: the real host, handlers, gossip and engine.

Rules: it offers a blob, and of whoever connects it wants another, and a place as at a relay. It is in a run, whose only
voter it is: its rounds go on, and whoever connects may be a member. It thinks that routers
show it at an address from which no socket can be bound: hole punching goes its whole way, and no packet leaves. Prints
its address once the model is served; lives until its standard input ends, then stops in order and prints what it
counted. FAILED counts log records with a traceback: an exception that a handler did not foresee.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import trio
from multiaddr import Multiaddr

from crypto.identity import Identity, PeerId
from gossip.blobs import Blobs
from gossip.electors import Electors, Terms
from gossip.errors import Unavailable
from gossip.round_history import RoundHistory, RunPlace
from gossip.round_payloads import Payloads
from gossip.round_service import RoundService, Work
from gossip.round_state import Chain
from gossip.round_store import RoundStore
from gossip.transfer import manifest_of
from node.arenas import few_arenas
from node.config import NodeConfig
from node.run import Node, topics_of
from p2p.errors import P2PError
from p2p.host import Libp2pTransport
from p2p.transport import PeerChange
from tests.fuzz_bulk import OFFERED, WANTED_ID
from tests.fuzz_frames import RUN, RUN_BASE
from tests.libp2p_peers import node
from tests.round_world import Disk, Everybody, HashOwner
from tests.tiny_models import save_causal

NETWORK = "fuzz"
UNBINDABLE = "192.0.2.1"  # of no machine (RFC 5737): a socket that is bound to it fails
WANTED_S = 2.0
failed: list[str] = []


class Doors:
    """Counts the streams that reach each protocol that the host serves."""

    def __init__(self, host: Any) -> None:
        self.reached: Counter[str] = Counter()
        handlers = host.get_mux().handlers
        self.registered = sorted(map(str, handlers))
        for protocol, handler in tuple(handlers.items()):
            handlers[protocol] = self._counting(str(protocol), handler)

    def _counting(self, protocol: str, handler: Callable[[Any], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
        async def counted(stream: Any) -> None:
            self.reached[protocol] += 1
            await handler(stream)

        return counted


class Wants:
    """What this node asks of whoever connects: a place at a relay, and a blob."""

    def __init__(self, transport: Libp2pTransport, blobs: Blobs, nursery: trio.Nursery) -> None:
        self.came: Counter[str] = Counter()
        self._transport, self._blobs, self._nursery = transport, blobs, nursery
        transport.watch(self._watch)

    def _watch(self, change: PeerChange) -> None:
        if change.connected:
            self._nursery.start_soon(self._place, change.peer)
            if change.peer[-1] in "abcdefghijklmnop":  # not all: a donor that lies is banned, and says no more
                self._nursery.start_soon(self._blob, change.peer)

    async def _place(self, peer: PeerId) -> None:
        try:
            await self._transport.relay.reserve(peer, "/ip4/127.0.0.1/tcp/4001")
            self.came["places"] += 1
        except P2PError:
            self.came["no_place"] += 1

    async def _blob(self, peer: PeerId) -> None:
        with trio.move_on_after(WANTED_S):
            try:
                await self._blobs.fetch(WANTED_ID, [peer])
                self.came["blobs"] += 1
                await self._blobs.forget(WANTED_ID)
            except Unavailable:
                self.came["no_blob"] += 1


async def take_part(here: Node, identity: Identity, path: Path, services: list[RoundService]) -> None:
    """In a run with everybody who speaks of it."""
    electors = Electors.of_founders([identity.peer_id], Terms())
    chain = Chain(run=RUN, round=0, base=RUN_BASE, electors=electors)
    place = RunPlace(
        identity=identity,
        transport=here._network.transport,
        network=NETWORK,
        door=here._door,
        genesis=chain,
        plan=b"the plan",
    )
    payloads, owner = Payloads(here.blobs, path, 3, place.admits), HashOwner(path / "weights", Disk())
    service = RoundService(place, RoundHistory(place, owner, RoundStore(path, NETWORK), payloads), Everybody())
    services.append(service)

    async def train() -> None:
        while True:
            at = await service.opened()
            await trio.sleep(0.5)
            payloads.own_path(at.round).write_bytes(at.base)
            await service.contribute(at, Work(steps=1, tokens=1, made_of=manifest_of(at.base)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(train)
        await service.run()


class Tracebacks(logging.Handler):
    """Keeps the first of each kind of failure that was logged with a traceback."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and len(failed) < 20:
            failed.append(self.format(record)[-1500:])


def _heard(service: RoundService) -> dict[str, int]:
    """What became of what strangers said of the run."""
    told = service.statistics()
    return {} if told is None else told.drops


async def main(path: Path) -> None:
    identity = Identity.make()
    config = NodeConfig(
        data_dir=path, http="off", mdns=False, network=NETWORK, model=str(path / "model"), threads=1,
        ready_file=path / "ready.json",
    )  # fmt: skip
    async with (
        node(identity, upgrade_s=10.0, topics=topics_of(NETWORK)) as transport,
        trio.open_nursery() as nursery,
    ):
        here = Node(config, identity, transport, (), outside=transport.relay)
        nursery.start_soon(here.run)
        while not (path / "ready.json").exists():  # noqa: ASYNC110  # a file
            await trio.sleep(0.05)
        here.blobs.offer_bytes(OFFERED)
        services: list[RoundService] = []
        nursery.start_soon(take_part, here, identity, path / "run", services)
        address = transport.addresses()[0]
        puncher: Any = transport._puncher
        puncher._own = lambda: [Multiaddr(f"/ip4/{UNBINDABLE}/tcp/4001").to_bytes()]
        puncher._bound = lambda: [(UNBINDABLE, 4001)]
        doors, wants = Doors(transport._host), Wants(transport, here.blobs, nursery)
        print(address, flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
        host, gossip, calls = transport.statistics(), here._gossip.statistics(), here._network.calls.statistics()
        counted = {
            "failed": failed,
            "registered": doors.registered,
            "reached": dict(doors.reached),
            "wants": dict(wants.came),
            "blobs": asdict(here.blobs.statistics()),
            "direct": here._direct.statistics().counts,
            "relay": asdict(transport.relay.desk.statistics(trio.current_time())),
            "frames_in": host.frames_in,
            "host": host.drops,
            "gossip": gossip.drops,
            "faults": gossip.standing.faults,
            "adverts": {str(outcome): count for outcome, count in gossip.directory.outcomes.items()},
            "infer": {"calls": calls.calls_in, **calls.drops},
            "control": {"calls": here._control.statistics().calls_in, **here._control.statistics().drops},
            "rounds": {
                "calls": here._door.calls.statistics().calls_in,
                "drops": dict(here._door.drops),
                "committed": services[0].round,
                "heard": dict(_heard(services[0])),
                "counts": dict(services[0].history.counts),
            },
            "engine": asdict(here._inference.hosting.statistics()) if here._inference.hosting else None,
        }
        print("COUNTED " + json.dumps(counted), flush=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    logging.getLogger().addHandler(Tracebacks())
    few_arenas()  # as a node's start does
    with tempfile.TemporaryDirectory() as folder:
        save_causal(Path(folder) / "model")
        trio.run(main, Path(folder))
