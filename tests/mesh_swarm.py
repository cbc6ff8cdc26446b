"""Gossipsub's routers, as p2p/guard_gossip.py sets them up, over the connections of nodes on the loopback network.

Control messages take their time; nobody is frozen and nothing is lost. Back-offs are by the wall clock and so, on a
mock clock, outlast the test, as those of a minute do in truth.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import trio
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11
from libp2p.pubsub.pb import rpc_pb2

from p2p.guard import Drops
from p2p.guard_gossip import GuardedGossipSub
from p2p.transport import PeerChange
from tests.peering_swarm import Node

TOPIC = "openagi/1/test/advert"
DELAY_S = (0.05, 0.6)  # of a control message, and of opening a stream: of 32 nodes on two cores each waits for its turn


class Router(GuardedGossipSub):
    """A router, and as much of a Pubsub as it asks for."""

    def __init__(self, node: Node, meshes: Meshes) -> None:
        super().__init__(Drops())
        self.my_id = ID.from_base58(node.id)
        self.peers: set[ID] = set()
        self.peer_topics: dict[str, set[ID]] = {TOPIC: set()}
        self.pubsub: Any = self
        self.mesh: dict[str, set[ID]] = {TOPIC: set()}
        self._meshes = meshes

    @property
    def neighbours(self) -> set[ID]:
        """With whom gossip is exchanged at once."""
        return self.mesh[TOPIC]

    def send_rpc(self, peer_id: ID, rpc: Any, priority: bool = False) -> None:
        """Instead of libp2p's queues and streams."""
        self._meshes.send(self.my_id, peer_id, rpc.control)

    def forget_gone(self, known: set[ID]) -> None:
        """Nothing: here a router is told of each peer that leaves."""


class Meshes:
    """The routers of all nodes, and what is on its way between them. `sent`: how many GRAFTs and PRUNEs."""

    def __init__(self, rng: random.Random, nursery: trio.Nursery) -> None:
        self.routers: dict[ID, Router] = {}
        self.sent: Counter[str] = Counter()
        self._rng = rng
        self._nursery = nursery
        self._due: dict[tuple[ID, ID], float] = {}

    def add(self, node: Node) -> Router:
        """Give a node a router. Its beats and what it sends run in the nursery that came when this was made."""
        router = self.routers[ID.from_base58(node.id)] = Router(node, self)

        def changed(change: PeerChange) -> None:
            peer = ID.from_base58(change.peer)
            if change.connected:
                self._nursery.start_soon(self._connected, router, peer)
            else:
                router.peers.discard(peer)
                router.peer_topics[TOPIC].discard(peer)
                router.remove_peer(peer)

        node.transport.watch(changed)
        for peer in node.transport.peers():
            self._nursery.start_soon(self._connected, router, ID.from_base58(peer))
        router.heartbeat_initial_delay = self._rng.random()
        self._nursery.start_soon(router.heartbeat)
        return router

    def send(self, sender: ID, receiver: ID, control: Any) -> None:
        """In order, after a while."""
        self.sent += Counter({"graft": len(control.graft), "prune": len(control.prune)})
        due = max(self._due.get((sender, receiver), 0.0), trio.current_time() + self._rng.uniform(*DELAY_S))
        self._due[sender, receiver] = due + 1e-6
        self._nursery.start_soon(self._deliver, sender, receiver, control, due)

    async def _deliver(self, sender: ID, receiver: ID, control: Any, due: float) -> None:
        await trio.sleep_until(due)
        if sender in self.routers[receiver].peers:
            await self.routers[receiver].handle_rpc(rpc_pb2.RPC(control=control), sender)

    async def _connected(self, router: Router, peer: ID) -> None:
        """Our stream to the peer opens, and its subscription comes over its own."""
        await trio.sleep(self._rng.uniform(*DELAY_S))
        router.peers.add(peer)
        router.add_peer(peer, PROTOCOL_ID_V11)
        await trio.sleep(self._rng.uniform(*DELAY_S))
        router.peer_topics[TOPIC].add(peer)
        await router.on_peer_subscribed(peer, TOPIC)
