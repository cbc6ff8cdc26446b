"""Nodes of one process that train: real engines with tiny models, real rounds, over the loopback network.

Rules: real time, real threads, real disk: what is waited for is an event, never a duration.
"""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from crypto.digest import Digest
from crypto.identity import Identity, PeerId
from gossip.blobs import Blobs, BlobsConfig
from gossip.offer import Offer
from gossip.round_door import RoundDoor
from model.config import RuntimeConfig
from model.runtime import Runtime
from node.hosting import Hosting
from node.training import Training, TrainingParts
from node.training_pause import PausePolicy
from node.training_session import Session
from node.training_wish import Begin, Join, Wish
from p2p.calls import Calls
from p2p.hello import RPC_PROTOCOL
from p2p.loopback import LoopbackNetwork
from tests.blob_world import FETCH
from tests.node_swarm import Node, _assembled
from tests.tiny_models import LINES

PATIENCE_S = 120.0  # hang guard; the first test to train adapters imports peft
SMALL: dict[str, Any] = {"steps": 2, "rows": 2, "context": 16, "accumulation": 1, "warmup_steps": 0, "rate": 0.003}


def write_text(path: Path, seed: int, words: int = 3_000) -> Path:
    """Text of some thousand tokens, the same for a seed: enough to hold out rows that scores need."""
    draw, known = random.Random(seed), [word for line in LINES[:2] for word in line.split()]
    path.write_text(" ".join(draw.choice(known) for _ in range(words)))
    return path


@dataclass
class Trainee:
    """One node; `stop` is an orderly end, and `World.start` of the same number the start after it."""

    node: Node
    hosting: Hosting
    training: Training
    folder: Path
    text: Path
    blames: list[tuple[PeerId, str]]
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)

    @property
    def id(self) -> PeerId:
        return self.node.id

    @property
    def status(self) -> dict[str, Any]:
        return self.training.status()

    @property
    def round(self) -> int:
        """The round to come, by the weights; -1 without a session."""
        session = self.training._session
        return -1 if session is None else session.weights.round

    @property
    def steps(self) -> int:
        """Trained here since its session began."""
        session = self.training._session
        return 0 if session is None else session.told.steps

    @property
    def session(self) -> Session:
        session = self.training._session
        assert session is not None, self.status
        return session

    @property
    def revision(self) -> str:
        """What is served."""
        return self.hosting.runtime.facts.revision

    def offers(self) -> list[Offer]:
        """What others advertise, as this node has it."""
        return list(self.node.network.gossip.directory.offers(trio.current_time()))

    def state_at(self, number: int) -> bytes | None:
        """The weights before a round, if they are still kept."""
        [folder] = [each for each in self.folder.iterdir() if each.is_dir()]
        path = folder / f"state-{number}"
        return path.read_bytes() if path.exists() else None

    async def begin(self, name: str = "tales", **asked: Any) -> dict[str, Any]:
        return await self.training.begin(Begin(name=name, data=(str(self.text),), **{**SMALL, **asked}))

    async def join(self, run: str = "tales") -> dict[str, Any]:
        return await self.training.join(Join(run=run, data=(str(self.text),)))

    async def stop(self) -> None:
        self.scope.cancel()
        await self.ended.wait()


class World:
    """Nodes that know each other, each with the same model unless it is said otherwise."""

    def __init__(self, path: Path, model: Path, nursery: trio.Nursery) -> None:
        self.wire = LoopbackNetwork(random.Random(3))
        self.path, self.model, self._nursery = path, model, nursery
        self.identities = [Identity.make() for _ in range(6)]
        self.trainees: list[Trainee] = []

    def peers(self, *numbers: int) -> tuple[str, ...]:
        return tuple(self.identities[number].peer_id for number in numbers)

    async def start(self, number: int, **changes: Any) -> Trainee:
        """changes: model, network, policy, wish, dtype, quantize, adopts (before it trains)."""
        trainee: Trainee = await self._nursery.start(self._live, number, changes)
        for other in self.trainees:
            if not other.scope.cancel_called:
                await trainee.node.network.transport.dial(other.node.address)
        self.trainees.append(trainee)
        return trainee

    async def _live(self, number: int, changes: dict[str, Any], *, task_status: trio.TaskStatus[Trainee]) -> None:
        identity, folder = self.identities[number], self.path / f"node-{number}"
        folder.mkdir(exist_ok=True)
        config = RuntimeConfig(
            threads=1, slots=1, dtype=changes.get("dtype", "auto"), quantize=changes.get("quantize", "none")
        )
        model = str(changes.get("model", self.model))
        runtime = await trio.to_thread.run_sync(Runtime.load, model, config)
        async with self.wire.join(identity) as transport, trio.open_nursery() as nursery:
            node = _assembled(identity, transport, random.Random(number), {})
            hosting = Hosting(runtime, peer=identity.peer_id, on_change=node.offer)
            blames: list[tuple[PeerId, str]] = []
            gossip = node.network.gossip

            def blame(peer: PeerId, fault: Any, what: str) -> None:
                blames.append((peer, what))
                gossip.blame(peer, fault, what)

            network = changes.get("network", "main")
            door = RoundDoor(transport, "main", blame, lambda: time.time_ns() // 1_000_000)
            parts = TrainingParts(
                identity=identity,
                network=network,
                transport=transport,
                peering=node.network.peering,
                inference=node.inference,
                blobs=Blobs(transport, transport, BlobsConfig(folder=folder / "blobs", fetch=FETCH)),
                door=door,
                folder=folder / "training",
                policy=changes.get("policy", PausePolicy()),
            )
            wish: Wish | None = changes.get("wish")
            training = Training(parts, wish)
            text = folder / "text.txt"
            if not text.exists():
                write_text(text, number)
            trainee = Trainee(node, hosting, training, folder / "training", text, blames)
            with trainee.scope:
                async with trio.open_nursery() as inner:
                    control = Calls(transport, RPC_PROTOCOL, node.network.peering.handlers())
                    await inner.start(control.run)
                    await inner.start(node.infer.run)
                    await inner.start(door.calls.run)
                    await inner.start(node.network.gossip.run)
                    await inner.start(node.network.peering.run, control)
                    await inner.start(hosting.run)
                    node.inference.hosting = hosting
                    node.state.trains, node.state.phase = training, "running"
                    node.offer()
                    inner.start_soon(training.run)
                    task_status.started(trainee)
            nursery.cancel_scope.cancel()
        trainee.ended.set()

    async def rounds(self, number: int, *trainees: Trainee) -> None:
        """These (or all that live) stand at this round or later."""
        wanted = trainees or tuple(each for each in self.trainees if not each.scope.cancel_called)
        await until(lambda: all(each.round >= number for each in wanted), lambda: [each.status for each in wanted])


async def until(true: Callable[[], bool], told: Callable[[], object] = lambda: "") -> None:
    """Wait for what knows no trio."""
    with trio.move_on_after(PATIENCE_S):
        while not true():  # noqa: ASYNC110  # see above
            await trio.sleep(0.02)
        return
    raise AssertionError(f"it never came: {told()}")


@asynccontextmanager
async def world(path: Path, model: Path) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        yield World(path, model, nursery)
        nursery.cancel_scope.cancel()


def common_rounds(*trainees: Trainee) -> dict[int, set[bytes]]:
    """Round -> the different weights before it that these nodes have on disk, where two or more have any."""
    found: dict[int, list[bytes]] = {}
    for each in trainees:
        for number in range(each.round + 1):
            if (state := each.state_at(number)) is not None:
                found.setdefault(number, []).append(state)
    return {number: set(states) for number, states in found.items() if len(states) > 1}


def root_of(trainee: Trainee) -> Digest:
    """The base of the round to come: it names all that was before."""
    return Digest(trainee.session.service.history.chain.base)


async def grown(all_of_them: World, founders: int, **asked: Any) -> list[Trainee]:
    """A run of so many founders, all in it."""
    trainees = [await all_of_them.start(number) for number in range(founders)]
    await trainees[0].begin(founders=all_of_them.peers(*range(1, founders)), absent_max=50, **asked)
    for each in trainees[1:]:
        await each.join()
    return trainees
