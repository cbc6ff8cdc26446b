"""Gossiping nodes on the loopback network, for tests on a mock clock."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import trio

from crypto.identity import Identity, PeerId
from gossip.messages import Capacity, ModelKind, ModelOffer, advert_topic
from gossip.service import GossipConfig, GossipService
from p2p.loopback import LoopbackNetwork, LoopbackTransport

START_MS = 1_800_000_000_000
TALE = ModelOffer(name="tale", revision="r1", kind=ModelKind.CAUSAL, context_tokens=512, dtype="bf16")
CAPACITY = Capacity(models=(TALE,), slots_total=4, slots_free=4, kv_tokens_free=2048, device="cpu", accepting=True)
TOPIC = advert_topic("main")


@dataclass
class Node:
    """A transport with gossip on it."""

    identity: Identity
    transport: LoopbackTransport
    gossip: GossipService

    @property
    def peer(self) -> PeerId:
        return self.identity.peer_id

    def sees(self) -> set[PeerId]:
        return {offer.peer for offer in self.gossip.directory.offers(trio.current_time())}


def wall_clock_ms() -> int:
    return START_MS + int(trio.current_time() * 1000)


def config(**changes: object) -> GossipConfig:
    fields: dict[str, object] = {"network": "main", "instance": random.randbytes(8).hex(), "agent": "test"}
    return GossipConfig(**{"wall_clock_ms": wall_clock_ms, **fields, **changes})  # type: ignore[arg-type]


@asynccontextmanager
async def node(
    network: LoopbackNetwork, identity: Identity | None = None, port: int | None = None, **changes: object
) -> AsyncIterator[Node]:
    identity = identity or Identity.make()
    async with network.join(identity, port=port) as transport, trio.open_nursery() as nursery:
        gossip = GossipService(transport, identity, config(**changes), random.Random(1))
        await nursery.start(gossip.run)
        yield Node(identity, transport, gossip)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def swarm(network: LoopbackNetwork, count: int) -> AsyncIterator[list[Node]]:
    """`count` nodes in a ring with one chord each."""
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(node(network)) for _ in range(count)]
        for number, here in enumerate(nodes):
            for step in (1, 2):
                await here.transport.dial(nodes[(number + step) % count].transport.addresses()[0])
        yield nodes


async def connect(one: Node, other: Node) -> None:
    await one.transport.dial(other.transport.addresses()[0])


async def until(true: Callable[[], bool], within_s: float) -> float:
    """Wait on the mock clock; returns how long it took."""
    began = trio.current_time()
    with trio.fail_after(within_s):
        while not true():  # noqa: ASYNC110  # on a mock clock, and of cores that know no trio
            await trio.sleep(0.05)
    return trio.current_time() - began
