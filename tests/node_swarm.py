"""Whole nodes of one process over the loopback network: transport, peering, gossip, calls, inference, engine.

Rules: no thread and no disk, so that a MockClock replays a run; run.py's own wiring is tests/test_run.py's to prove.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from crypto.identity import Identity, PeerId
from gossip.service import GossipConfig, GossipService
from node.backend import Backend
from node.config import NodeConfig
from node.errors import RequestError
from node.front import RouteHint
from node.hosting import Hosting
from node.inference import INFER_PROTOCOL, Inference
from node.remote import Network
from node.sealed_relay import SealedRelay
from node.sealed_serving import SealedServing
from node.serving import Serving
from node.state import NodeState, Parts
from node.version import AGENT
from node.work import WORK_LIMITS, AnswerItem, Finished, GenerateWork, Piece, Sampling, Started
from p2p.book import Book
from p2p.calls import Calls, Handler
from p2p.hello import RPC_PROTOCOL
from p2p.loopback import LoopbackNetwork, LoopbackTransport
from p2p.peering import Peering, PeeringConfig
from tests.fake_runtime import FakeRuntime, Turns, text_of

START_MS = 1_800_000_000_000
AUTO = RouteHint()


@dataclass(slots=True, kw_only=True)
class Node:
    """A running node; `stop` kills its tasks."""

    network: Network
    infer: Calls
    serving: Serving
    inference: Inference
    state: NodeState
    relay: SealedRelay
    runtime: FakeRuntime | None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    @property
    def id(self) -> PeerId:
        return self.network.transport.peer_id

    @property
    def address(self) -> str:
        return self.network.transport.addresses()[0]

    @property
    def hosting(self) -> Hosting:
        assert isinstance(self.inference.hosting, Hosting)
        return self.inference.hosting

    @property
    def engine(self) -> FakeRuntime:
        assert self.runtime is not None
        return self.runtime

    def offer(self) -> None:
        self.network.gossip.offer(self.state.capacity())

    def sees(self) -> set[PeerId]:
        offers = self.network.gossip.directory.offers(trio.current_time())
        return {offer.peer for offer in offers if offer.capacity.models}

    def score(self, peer: PeerId) -> float:
        return self.network.gossip.standing.score(peer, trio.current_time())


class Swarm:
    """Nodes that know each other, and what can befall them."""

    def __init__(self, seed: int = 1) -> None:
        self.wire = LoopbackNetwork(random.Random(seed))
        self.nodes: list[Node] = []
        self._seed = seed
        self._nursery: trio.Nursery

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Swarm]:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            yield self
            nursery.cancel_scope.cancel()

    async def start(
        self,
        runtime: FakeRuntime | None = None,
        *,
        lies: dict[str, Handler] | None = None,
        backend: Callable[[Node], Backend] | None = None,
    ) -> Node:
        """A node that knows all others. lies: handlers of calls from peers, in place of its own.

        backend: what answers there, if it is no runtime.
        """
        node: Node = await self._nursery.start(self._run, runtime, lies or {}, backend)
        for other in self.nodes:
            if not other.scope.cancel_called:
                await node.network.transport.dial(other.address)
        self.nodes.append(node)
        return node

    async def settled(self, *nodes: Node) -> None:
        """Wait until these (or all) nodes know the offers of all that live."""
        alive = [node for node in self.nodes if not node.scope.cancel_called]
        offering = {node.id for node in alive if node.inference.hosting is not None}
        await eventually(lambda: all(node.sees() >= offering - {node.id} for node in nodes or alive), 30)

    async def crash(self, node: Node) -> None:
        """The process is gone, and the others' streams to it break."""
        self.wire.crash(node.id)
        node.scope.cancel()
        await trio.lowlevel.checkpoint()

    async def _run(
        self,
        runtime: FakeRuntime | None,
        lies: dict[str, Handler],
        backend: Callable[[Node], Backend] | None,
        *,
        task_status: trio.TaskStatus[Node],
    ) -> None:
        identity, rng = Identity.make(), random.Random(self._seed * 1000 + len(self.nodes))
        scope = trio.CancelScope()
        with scope:
            async with self.wire.join(identity) as transport, trio.open_nursery() as nursery:
                node = _assembled(identity, transport, rng, lies)
                node.scope, node.runtime = scope, runtime
                control = Calls(transport, RPC_PROTOCOL, node.network.peering.handlers())
                await nursery.start(control.run)
                await nursery.start(node.infer.run)
                await nursery.start(node.network.gossip.run)
                await nursery.start(node.network.peering.run, control)
                if runtime is not None:
                    hosting = Hosting(runtime, peer=transport.peer_id, on_change=node.offer, hop=Turns(runtime))
                    await nursery.start(hosting.run)
                    node.inference.hosting = hosting
                elif backend is not None:
                    node.state.backend = other = backend(node)
                    await nursery.start(other.run)
                    node.inference.hosting = other
                if node.inference.hosting is not None:
                    node.relay.begin(node.state, rng, NodeConfig(max_tokens=7))
                node.state.phase = "running"
                node.offer()
                task_status.started(node)


def _assembled(identity: Identity, transport: LoopbackTransport, rng: random.Random, lies: dict[str, Handler]) -> Node:
    instance = rng.randbytes(16).hex()
    book = Book(identity.peer_id, rng)
    peering_config = PeeringConfig(network="main", agent=AGENT, instance=instance, mdns=False)
    gossip_config = GossipConfig(network="main", agent=AGENT, instance=instance, wall_clock_ms=wall_clock_ms)
    gossip = GossipService(transport, identity, gossip_config, rng)
    serving = Serving()
    sealed = SealedServing(identity, "main")
    handlers = {**serving.handlers(), **sealed.handlers(), **lies}
    infer = Calls(transport, INFER_PROTOCOL, handlers, limits=WORK_LIMITS)
    network = Network(
        transport=transport, peering=Peering(transport, book, peering_config, rng), calls=infer, gossip=gossip
    )
    inference = serving.inference = Inference(network)
    config = NodeConfig(data_dir=Path("unused"), http="off", model="none")
    relay = SealedRelay(network, inference, sealed)
    state = NodeState(Parts(config=config, network=network, inference=inference, relay=relay))
    return Node(
        network=network, infer=infer, serving=serving, inference=inference, state=state, relay=relay, runtime=None
    )


def wall_clock_ms() -> int:
    return START_MS + int(trio.current_time() * 1000)


async def eventually(true: Callable[[], bool], within_s: float) -> float:
    """Wait on the mock clock; returns how long it took."""
    began = trio.current_time()
    with trio.fail_after(within_s):
        while not true():  # noqa: ASYNC110  # on a mock clock
            await trio.sleep(0.05)
    return trio.current_time() - began


def work(prompt: str = "hello", tokens: int = 10, **changes: object) -> GenerateWork:
    fields: dict[str, object] = {"request_id": "q", "text": prompt, "sampling": Sampling(max_tokens=tokens)}
    return GenerateWork(**{**fields, **changes})  # type: ignore[arg-type]  # a test's own fields


def expected(prompt: str, tokens: int) -> str:
    """The one right answer to work(prompt, tokens)."""
    return text_of(tuple(map(ord, prompt)), tokens)


@dataclass(slots=True)
class Got:
    """What a client has of an answer, and how it ended."""

    items: list[AnswerItem] = field(default_factory=list)
    error: RequestError | None = None
    left: bool = False
    servers: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(item.text for item in self.items if isinstance(item, Piece))

    @property
    def tokens(self) -> list[int]:
        return [token for item in self.items if isinstance(item, Piece) for token in item.tokens]

    @property
    def finished(self) -> Finished | None:
        return self.items[-1] if self.items and isinstance(self.items[-1], Finished) else None

    @property
    def started(self) -> list[Started]:
        return [item for item in self.items if isinstance(item, Started)]

    def is_right(self, prompt: str, tokens: int) -> bool:
        """Whether it is the whole answer, with each token once."""
        return (
            self.error is None
            and len(self.started) == 1
            and isinstance(self.items[0], Started)
            and self.text == expected(prompt, tokens)
            and len(self.tokens) == tokens
            and self.finished is not None
            and self.finished.completion_tokens == tokens
        )


async def ask(
    node: Node,
    asked: GenerateWork,
    route: RouteHint = AUTO,
    *,
    on_item: Callable[[Got], object] | None = None,
    got: Got | None = None,
) -> Got:
    """One client's request to its end; its error is kept, not raised."""
    got = got or Got()
    try:
        async with node.inference.answer(asked, route) as answer:
            async for item in answer:
                got.items.append(item)
                if on_item is not None:
                    on_item(got)
    except RequestError as exc:
        got.error = exc
    return got


def prefer(door: Node, first: Node, *others: Node) -> None:
    """Let the door measure the others as far away, so that it asks `first` first."""
    observations = door.network.gossip.observations
    for other in others:
        observations.rtt(other.id, 60.0)
    observations.rtt(first.id, 0.001)
