"""A member of a run with its door, and strangers who call it: over the loopback network, without a disk."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from crypto.digest import Digest, digest
from crypto.identity import Identity, PeerId
from gossip.errors import CannotStore
from gossip.round_door import (
    ROUND_LIMITS,
    ROUND_PROTOCOL,
    RoundDoor,
)
from gossip.rounds import Prevote, Statement, sign_statement
from gossip.standing import Fault
from p2p.calls import Calls, Handler
from p2p.loopback import LoopbackNetwork, LoopbackTransport

NETWORK = "tests"
RUN, OTHER_RUN, BASE = digest(b"run"), digest(b"another"), digest(b"base")
START_MS = 1_800_000_000_000


def statement(identity: Identity, *, run: Digest = RUN, view: int = 0, time_ms: int = START_MS) -> Statement:
    body = Prevote(run=run, round=5, base=BASE, view=view, manifest=None)
    return sign_statement(identity, body, network=NETWORK, sequence=time_ms, time_ms=time_ms)


@dataclass
class Run:
    """What a member knows; what it was told of."""

    id: Digest = RUN
    plan: bytes = b"the plan"
    kept: list[bytes] = field(default_factory=list)
    statements: tuple[Statement, ...] = ()
    refuses: frozenset[PeerId] = frozenset()
    told: list[Statement] = field(default_factory=list)
    behinds: list[tuple[PeerId, int]] = field(default_factory=list)
    read: list[tuple[int, int]] = field(default_factory=list)
    is_broken: bool = False
    changes: int = 0

    def peers_changed(self) -> None:
        self.changes += 1

    @property
    def round(self) -> int:
        return len(self.kept)

    def admits(self, peer: PeerId) -> bool:
        return peer not in self.refuses

    def is_voter(self, peer: PeerId) -> bool:
        return peer == "voter"

    def heard(self, statement: Statement) -> None:
        self.told.append(statement)

    def behind(self, peer: PeerId, number: int) -> None:
        self.behinds.append((peer, number))

    async def records(self, first: int, count_max: int) -> list[bytes]:
        await trio.lowlevel.checkpoint()
        if self.is_broken:
            raise CannotStore("the disk is failing")
        self.read.append((first, count_max))
        return self.kept[first : first + count_max]

    def known(self) -> tuple[Statement, ...]:
        return self.statements


@dataclass
class Member:
    identity: Identity
    transport: LoopbackTransport
    door: RoundDoor
    run: Run
    blames: list[tuple[PeerId, Fault, str]]

    @property
    def id(self) -> PeerId:
        return self.transport.peer_id


class Town:
    """A member, and strangers with calls of the same protocol."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.network = LoopbackNetwork(random.Random(2))
        self._nursery = nursery
        self.clock_ms = START_MS

    async def join(self) -> tuple[Identity, LoopbackTransport]:
        identity = Identity.make()
        return identity, await self._nursery.start(self._live, identity)

    async def _live(self, identity: Identity, *, task_status: trio.TaskStatus[LoopbackTransport]) -> None:
        async with self.network.join(identity) as transport:
            task_status.started(transport)
            await trio.sleep_forever()

    async def member(self) -> Member:
        identity, transport = await self.join()
        blames: list[tuple[PeerId, Fault, str]] = []
        door = RoundDoor(transport, NETWORK, lambda *blame: blames.append(blame), lambda: self.clock_ms)
        await self._nursery.start(door.calls.run)
        run = Run()
        await door.open(run)
        return Member(identity, transport, door, run, blames)

    async def stranger(
        self, member: Member, handlers: dict[str, Handler] | None = None
    ) -> tuple[Identity, LoopbackTransport, Calls]:
        identity, transport = await self.join()
        calls = Calls(transport, ROUND_PROTOCOL, handlers or {}, limits=ROUND_LIMITS)
        await self._nursery.start(calls.run)
        await transport.dial(member.transport.addresses()[0])
        return identity, transport, calls


@asynccontextmanager
async def town() -> AsyncIterator[Town]:
    async with trio.open_nursery() as nursery:
        yield Town(nursery)
        nursery.cancel_scope.cancel()
