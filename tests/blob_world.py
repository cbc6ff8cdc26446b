"""Nodes with blobs on a loopback network, and donors of every conduct."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from crypto.digest import Digest, digest
from crypto.identity import Identity, PeerId
from gossip.blob_fetching import FetchConfig
from gossip.blob_wire import (
    BLOB_PROTOCOL,
    RangeAsk,
    here_frame,
    piece_head,
)
from gossip.blobs import Blobs, BlobsConfig
from gossip.donors import DonorsConfig
from gossip.transfer import TransferConfig, manifest_of
from p2p.errors import P2PError
from p2p.loopback import LoopbackNetwork, LoopbackTransport
from p2p.transport import Stream

SMALL = 1024
CONTENT = random.Random(5).randbytes(40 * SMALL + 9)
MANIFEST = manifest_of(CONTENT, SMALL)
RAW = MANIFEST.encode()
BLOB = digest(RAW)
FETCH = FetchConfig(
    transfer=TransferConfig(asks_max=16, asks_per_donor_max=4, answer_s=5.0, lates_max=3),
    donors=DonorsConfig(patience_s=30.0),
    answer_s=4.0,
)


async def inline(function: Callable[..., Any], *arguments: Any) -> Any:
    """In the place of a thread, of which a MockClock knows nothing."""
    await trio.lowlevel.checkpoint()
    return function(*arguments)


@dataclass
class Peer:
    """A node with blobs; `config` is what it was made with."""

    transport: LoopbackTransport
    blobs: Blobs
    config: BlobsConfig
    faults: list[tuple[PeerId, str, bool]] = field(default_factory=list)

    @property
    def id(self) -> PeerId:
        return self.transport.peer_id

    def again(self) -> Peer:
        """The same node after a restart."""
        return made(self.transport, self.config)

    def part(self, blob: Digest = BLOB) -> Path:
        return self.config.folder / f"{blob.hex()}.part"


def made(transport: LoopbackTransport, config: BlobsConfig) -> Peer:
    faults: list[tuple[PeerId, str, bool]] = []

    def blame(peer: PeerId, what: str, lied: bool) -> None:
        faults.append((peer, what, lied))

    blobs = Blobs(transport, transport, config, on_fault=blame, blocking=inline)
    return Peer(transport, blobs, config, faults)


class World:
    """A loopback network with one who fetches and whoever joins."""

    def __init__(self, stack: AsyncExitStack, path: Path) -> None:
        self.network = LoopbackNetwork(random.Random(1))
        self._stack, self._path = stack, path
        self.me: Peer

    async def peer(self, **changes: Any) -> Peer:
        transport = await self._stack.enter_async_context(self.network.join(Identity.make()))
        config = BlobsConfig(**{"folder": self._path / transport.peer_id, "fetch": FETCH, **changes})
        return made(transport, config)

    async def donor(self, conduct: Conduct, name: str = "") -> LoopbackTransport:
        """A peer that serves the blob as `conduct` says, connected to the one who fetches."""
        transport = await self._stack.enter_async_context(self.network.join(Identity.make()))

        async def serve(stream: Stream) -> None:
            with trio.move_on_after(10_000):
                try:
                    await conduct(stream)
                except P2PError:
                    return

        transport.serve(BLOB_PROTOCOL, serve)
        await self.me.transport.dial(transport.addresses()[0])
        return transport


Conduct = Callable[[Stream], Awaitable[None]]


@asynccontextmanager
async def world(path: Path, **changes: Any) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        there = World(stack, path)
        there.me = await there.peer(**changes)
        yield there


# ---- how donors behave ----


async def asked(stream: Stream) -> RangeAsk:
    from crypto.canonical import decode_struct

    return decode_struct(await stream.receive(), RangeAsk)


def piece(ask: RangeAsk, content: bytes = CONTENT) -> bytes:
    return piece_head(ask.start) + content[ask.start : ask.start + ask.length]


async def begin(stream: Stream) -> None:
    await stream.receive()
    await stream.send(here_frame(RAW))


async def honest(stream: Stream) -> None:
    await begin(stream)
    while True:
        await stream.send(piece(await asked(stream)))


def dies_after(pieces: int) -> Conduct:
    async def conduct(stream: Stream) -> None:
        await begin(stream)
        for _ in range(pieces):
            await stream.send(piece(await asked(stream)))
        await trio.sleep(0.5)
        await stream.reset()

    return conduct


async def liar(stream: Stream) -> None:
    await begin(stream)
    while True:
        ask = await asked(stream)
        await stream.send(piece_head(ask.start) + bytes(ask.length))


async def staller(stream: Stream) -> None:
    await begin(stream)
    await trio.sleep_forever()


async def mute(stream: Stream) -> None:
    await trio.sleep_forever()


def says(frame: bytes) -> Conduct:
    async def conduct(stream: Stream) -> None:
        await stream.receive()
        await stream.send(frame)
        await stream.close()

    return conduct


def slowly(seconds: float) -> Conduct:
    async def conduct(stream: Stream) -> None:
        await begin(stream)
        while True:
            ask = await asked(stream)
            await trio.sleep(seconds)
            await stream.send(piece(ask))

    return conduct
