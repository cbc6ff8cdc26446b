"""Nodes that keep peers on the loopback network, for tests on a mock clock."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import trio

from crypto.identity import Identity, PeerId
from p2p.book import Book
from p2p.bootstrap import bootstrap_peer
from p2p.calls import Calls
from p2p.hello import RPC_PROTOCOL
from p2p.loopback import LoopbackNetwork
from p2p.peering import Peering, PeeringConfig
from p2p.peering_status import PeeringStatus


@dataclass
class Node:
    """A running node of the tests."""

    identity: Identity
    transport: Any
    calls: Calls
    book: Book
    peering: Peering
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    duplicates: list[str] = field(default_factory=list)

    @property
    def id(self) -> PeerId:
        return self.identity.peer_id

    @property
    def address(self) -> str:
        return str(self.transport.addresses()[0])

    @property
    def status(self) -> PeeringStatus:
        return self.peering.status()


class Swarm:
    """Nodes on one loopback network; each dies with its scope."""

    def __init__(self, network: LoopbackNetwork, nursery: trio.Nursery) -> None:
        self.network = network
        self._nursery = nursery
        self._count = 0

    async def start(self, *bootstrap: str, identity: Identity | None = None, **options: Any) -> Node:
        self._count += 1
        identity = identity or Identity.make()
        join = {key: options.pop(key) for key in ("ip", "port") if key in options}
        wrap: Callable[[Any], Any] = options.pop("wrap", lambda transport: transport)
        config = PeeringConfig(
            network=options.pop("network", "main"),
            agent="test",
            instance=f"{self._count:032x}",
            bootstrap=tuple(bootstrap_peer(text, "a friend") for text in bootstrap),
            mdns=False,
            **options,
        )
        node: Node = await self._nursery.start(self._run, identity, config, join, wrap)
        return node

    async def _run(
        self,
        identity: Identity,
        config: PeeringConfig,
        join: dict[str, Any],
        wrap: Callable[[Any], Any],
        *,
        task_status: trio.TaskStatus[Node],
    ) -> None:
        rng = random.Random(config.instance)
        scope = trio.CancelScope()
        with scope:
            async with self.network.join(identity, **join) as joined:
                transport = wrap(joined)
                duplicates: list[str] = []
                book = Book(identity.peer_id, rng)
                peering = Peering(transport, book, config, rng, duplicates.append)
                calls = Calls(transport, RPC_PROTOCOL, peering.handlers())
                async with trio.open_nursery() as nursery:
                    await nursery.start(calls.run)
                    await nursery.start(peering.run, calls)
                    task_status.started(Node(identity, transport, calls, book, peering, scope, duplicates))


async def until(condition: Callable[[], object], within_s: float = 120.0) -> float:
    """Wait for something that a test expects; the mock clock makes it cheap. Gives the seconds it took."""
    began = trio.current_time()
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110  # the condition is of several nodes
            await trio.sleep(0.1)
    return trio.current_time() - began


def missing_address(port: int = 9) -> str:
    return f"/ip4/127.0.0.1/tcp/{port}/p2p/{Identity.make().peer_id}"
