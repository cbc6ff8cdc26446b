"""`python -m bench.pipe_end PATH BYTES receive | send ADDRESS`: one end of bench.pipe, a process of its own.

Rules: the receiver prints its address, then what each transfer cost it; the sender prints a line when it is connected,
then moves BYTES for every line on its standard input and prints what that cost. A transfer begins when both ends have
said so, and ends when the receiver has answered. `plain` never calls p2p.guard.install().
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import trio

from crypto.digest import Digest
from crypto.identity import Identity
from gossip.blob_fetching import Progress
from gossip.blob_serving import ServingConfig
from gossip.blobs import Blobs, BlobsConfig
from p2p.direct import Direct, DirectConfig
from p2p.direct_stream import DirectStream
from p2p.errors import StreamClosed, Unreachable
from p2p.transport import FRAME_BYTES_MAX, Stream

PROTOCOL = "/openagi/bench/1"
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
WORD = b"word"
UNBOUND_BYTES_PER_S = 1e12  # the bench measures what is possible, not what a node allows


class Pipe(Protocol):
    """One path's stream: exactly as many bytes as were sent, in any pieces."""

    async def send(self, piece: bytes) -> None:
        """Send at most FRAME_BYTES_MAX."""

    async def take(self, size: int) -> None:
        """Receive `size` bytes and drop them. Raises StreamClosed, Unreachable."""


class OurPipe:
    """A p2p.transport.Stream."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    async def send(self, piece: bytes) -> None:
        """One frame."""
        await self._stream.send(piece)

    async def take(self, size: int) -> None:
        """Frames."""
        while size > 0:
            size -= len(await self._stream.receive())
        assert size == 0, "a frame too long"


class PlainPipe:
    """libp2p's own stream."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def send(self, piece: bytes) -> None:
        """One write."""
        await self._stream.write(piece)

    async def take(self, size: int) -> None:
        """Reads of at most 1 MiB."""
        while size > 0:
            size -= len(await self._stream.read(min(size, 1 << 20)))


def say(**line: object) -> None:
    """One line to bench.pipe."""
    print(json.dumps(line), flush=True)


async def receive_all(pipe: Pipe, size: int) -> None:
    """Take transfers until the sender is gone."""
    try:
        while True:
            await pipe.take(len(WORD))
            began = time.process_time()
            await pipe.send(WORD)
            path = None
            if isinstance(pipe, BlobPipe):
                path = await pipe.fetch()
            else:
                await pipe.take(size)
            say(cpu_s=time.process_time() - began)
            await pipe.send(WORD)
            if path is not None and isinstance(pipe, BlobPipe):
                assert path.stat().st_size == size, "another blob came"
                await pipe.forget(path)
    except (StreamClosed, Unreachable):
        pass


async def send_all(pipe: Pipe, size: int) -> None:
    """A transfer for every line of the standard input."""
    piece = os.urandom(FRAME_BYTES_MAX)
    if isinstance(pipe, BlobPipe):
        await pipe.offer(os.urandom(size))
    say(ready=True)
    while await trio.to_thread.run_sync(sys.stdin.readline):
        await pipe.send(WORD)
        await pipe.take(len(WORD))
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        if isinstance(pipe, BlobPipe):
            await pipe.give()
        else:
            for _ in range(size // len(piece)):
                await pipe.send(piece)
        await pipe.take(len(WORD))
        say(cpu_s=time.process_time() - cpu_s, wall_s=time.perf_counter() - wall_s)


class BlobPipe(OurPipe):
    """A stream for words, and beside it the blobs of a node (gossip.blobs), files at both ends."""

    def __init__(self, stream: Stream, blobs: Blobs, folder: Path) -> None:
        super().__init__(stream)
        self._blobs, self._folder = blobs, folder

    async def offer(self, content: bytes) -> None:
        """What `give` names."""
        path = self._folder / "offered"
        path.write_bytes(content)
        self._blob = await self._blobs.offer_file(path)

    async def give(self) -> None:
        """Say which blob to fetch."""
        await self._stream.send(self._blob)

    async def fetch(self) -> Path:
        """Take the blob that the sender names from it."""
        return await self._blobs.fetch(Digest(await self._stream.receive()), [self._stream.peer])

    async def forget(self, path: Path) -> None:
        """So that the next fetch finds nothing."""
        await self._blobs.forget(Digest(bytes.fromhex(path.name)))


@asynccontextmanager
async def our_host() -> AsyncIterator[Any]:
    """A host of ours."""
    from p2p.host import open_host
    from p2p.host_config import HostConfig

    async with open_host(Identity.make(), HostConfig(listen=(LOOPBACK,))) as host:
        yield host


async def libp2p_receive(size: int) -> None:
    """Our receiver."""

    async def serve(stream: Stream) -> None:
        await receive_all(OurPipe(stream), size)

    async with our_host() as host:
        host.serve(PROTOCOL, serve)
        say(address=host.addresses()[0])
        await trio.sleep_forever()


async def libp2p_send(size: int, address: str) -> None:
    """Our sender."""
    async with our_host() as host:
        stream = await host.open_stream(await host.dial(address), PROTOCOL)
        await send_all(OurPipe(stream), size)


@asynccontextmanager
async def plain_host(listen: tuple[str, ...]) -> AsyncIterator[Any]:
    """libp2p as it comes, with Noise and yamux."""
    from libp2p import new_host
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.crypto.x25519 import create_new_key_pair as create_new_noise_pair
    from libp2p.security.noise.transport import PROTOCOL_ID, Transport
    from multiaddr import Multiaddr

    key_pair = create_new_key_pair()
    noise = Transport(key_pair, noise_privkey=create_new_noise_pair().private_key)
    host = new_host(key_pair=key_pair, sec_opt={PROTOCOL_ID: noise}, muxer_preference="YAMUX")
    async with host.run([Multiaddr(each) for each in listen]):
        yield host


async def plain_receive(size: int) -> None:
    """The rival's receiver."""
    from libp2p.custom_types import TProtocol

    async def serve(stream: Any) -> None:
        await receive_all(PlainPipe(stream), size)

    async with plain_host((LOOPBACK,)) as host:
        host.set_stream_handler(TProtocol(PROTOCOL), serve)
        say(address=str(host.get_addrs()[0]))
        await trio.sleep_forever()


async def plain_send(size: int, address: str) -> None:
    """The rival's sender."""
    from libp2p.custom_types import TProtocol
    from libp2p.peer.peerinfo import info_from_p2p_addr
    from multiaddr import Multiaddr

    async with plain_host(()) as host:
        peer = info_from_p2p_addr(Multiaddr(address))
        await host.connect(peer)
        await send_all(PlainPipe(await host.new_stream(peer.peer_id, [TProtocol(PROTOCOL)])), size)


async def direct_receive(size: int) -> None:
    """The receiver of a direct channel."""

    async def serve(stream: Stream) -> None:
        assert isinstance(stream, DirectStream), "it fell back"
        await receive_all(OurPipe(stream), size)

    async with our_host() as host, trio.open_nursery() as nursery:
        direct = Direct(host, DirectConfig())
        await nursery.start(direct.run)
        direct.serve(PROTOCOL, serve)
        say(address=host.addresses()[0])
        await trio.sleep_forever()


async def direct_send(size: int, address: str) -> None:
    """The sender of a direct channel."""
    async with our_host() as host:
        stream = await Direct(host, DirectConfig()).open_stream(await host.dial(address), PROTOCOL)
        assert isinstance(stream, DirectStream), "it fell back"
        await send_all(OurPipe(stream), size)


@asynccontextmanager
async def blob_host() -> AsyncIterator[tuple[Any, Blobs, Path]]:
    """A host of ours with direct channels and blobs in a folder of their own."""
    with tempfile.TemporaryDirectory() as folder:
        async with our_host() as host, trio.open_nursery() as nursery:
            direct = Direct(host, DirectConfig())
            await nursery.start(direct.run)
            serving = ServingConfig(upload_bytes_per_s=UNBOUND_BYTES_PER_S)
            yield host, Blobs(host, direct, BlobsConfig(folder=Path(folder) / "blobs", serving=serving)), Path(folder)
            assert not direct.counts["fell_back"], "it fell back"
            nursery.cancel_scope.cancel()


async def blob_receive(size: int) -> None:
    """Fetches blobs over direct channels."""
    async with blob_host() as (host, blobs, folder):

        async def serve(stream: Stream) -> None:
            await receive_all(BlobPipe(stream, blobs, folder), size)

        host.serve(PROTOCOL, serve)
        say(address=host.addresses()[0])
        await trio.sleep_forever()


async def blob_send(size: int, address: str) -> None:
    """Gives blobs over direct channels."""
    async with blob_host() as (host, blobs, folder):
        stream = await host.open_stream(await host.dial(address), PROTOCOL)
        await send_all(BlobPipe(stream, blobs, folder), size)


async def join_receive(size: int) -> None:
    """A donor of a blob of so many bytes, the same at each donor; says its address and the blob's digest."""
    async with blob_host() as (host, blobs, folder):
        (folder / "offered").write_bytes(random.Random(size).randbytes(size))
        blob = await blobs.offer_file(folder / "offered")
        say(address=host.addresses()[0], blob=blob.hex())
        await trio.sleep_forever()


async def join_send(size: int, told: str) -> None:
    """A late joiner: for every line on the standard input it fetches the blob; says when it has half, and the cost."""
    blob, *addresses = told.split(",")
    async with blob_host() as (host, blobs, _):
        donors = [await host.dial(address) for address in addresses]
        say(ready=True)
        while await trio.to_thread.run_sync(sys.stdin.readline):
            halves: list[int] = []

            def on_progress(progress: Progress, halves: list[int] = halves) -> None:
                if 2 * progress.stored_bytes >= progress.blob_bytes and not halves:
                    halves.append(progress.stored_bytes)
                    say(half=progress.stored_bytes)

            cpu_s, wall_s = time.process_time(), time.perf_counter()
            path = await blobs.fetch(Digest(bytes.fromhex(blob)), donors, on_progress)
            say(cpu_s=time.process_time() - cpu_s, wall_s=time.perf_counter() - wall_s)
            assert path.stat().st_size == size, "another blob came"
            await blobs.forget(Digest(bytes.fromhex(blob)))


RECEIVERS: dict[str, Callable[[int], Awaitable[None]]] = {
    "libp2p": libp2p_receive,
    "direct": direct_receive,
    "blob": blob_receive,
    "join": join_receive,
    "plain": plain_receive,
}
SENDERS: dict[str, Callable[[int, str], Awaitable[None]]] = {
    "libp2p": libp2p_send,
    "direct": direct_send,
    "blob": blob_send,
    "join": join_send,
    "plain": plain_send,
}


def main() -> None:
    """Be one end until ended."""
    path, size, role = sys.argv[1:4]
    if role == "send":
        trio.run(SENDERS[path], int(size), sys.argv[4])
    else:
        trio.run(RECEIVERS[path], int(size))


if __name__ == "__main__":
    main()
