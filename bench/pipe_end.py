"""`python -m bench.pipe_end PATH BYTES receive | send ADDRESS`: one end of bench.pipe, a process of its own.

Rules: the receiver prints its address, then what each transfer cost it; the sender prints a line when it is connected,
then moves BYTES for every line on its standard input and prints what that cost. A transfer begins when both ends have
said so, and ends when the receiver has answered. `plain` never calls p2p.guard.install().
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

import trio

from crypto.digest import digest
from crypto.identity import Identity
from gossip.transfer import Ask, Drop, Finished, Store, Transfer, TransferConfig, decode_manifest, manifest_of
from p2p.direct import Direct, DirectConfig
from p2p.direct_stream import DirectStream
from p2p.errors import StreamClosed, Unreachable
from p2p.transport import FRAME_BYTES_MAX, Stream

PROTOCOL = "/openagi/bench/1"
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
WORD = b"word"
INDEX_BYTES = 4


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
            if isinstance(pipe, BlobPipe):
                assert await pipe.fetch() == size, "another blob came"
            else:
                await pipe.take(size)
            say(cpu_s=time.process_time() - began)
            await pipe.send(WORD)
    except (StreamClosed, Unreachable):
        pass


async def send_all(pipe: Pipe, size: int) -> None:
    """A transfer for every line of the standard input."""
    piece = os.urandom(FRAME_BYTES_MAX)
    if isinstance(pipe, BlobPipe):
        pipe.offer(os.urandom(size))
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
    """A blob fetched by its id over a Stream: its manifest, then the chunks that gossip.transfer asks for, compared."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream)
        self._content = b""

    def offer(self, content: bytes) -> None:
        """What `give` gives."""
        self._content = content
        self._manifest = manifest_of(content)

    async def give(self) -> None:
        """Send the manifest, then every chunk that is asked for, until all of it was."""
        await self._stream.send(self._manifest.encode())
        for _ in range(self._manifest.count):
            index = await self._stream.receive()
            start, length = self._manifest.span(int.from_bytes(index, "big"))
            await self._stream.send(index + self._content[start : start + length])

    async def fetch(self) -> int:
        """Take a whole blob and give its size in bytes."""
        raw = await self._stream.receive()
        transfer = Transfer(decode_manifest(raw, digest(raw)), TransferConfig())
        effects, stored = transfer.joined(self._stream.peer, time.monotonic()), 0
        while True:
            for effect in effects:
                match effect:
                    case Ask():
                        await self._stream.send(effect.index.to_bytes(INDEX_BYTES, "big"))
                    case Store():
                        stored += len(effect.content)
                    case Finished():
                        return stored
                    case Drop():
                        raise SystemExit(f"the donor {effect.reason}")
            frame = await self._stream.receive()
            index, content = int.from_bytes(frame[:INDEX_BYTES], "big"), frame[INDEX_BYTES:]
            effects = transfer.received(self._stream.peer, index, content, time.monotonic())


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


async def direct_receive(size: int, kind: type[OurPipe] = OurPipe) -> None:
    """The receiver of a direct channel."""

    async def serve(stream: Stream) -> None:
        assert isinstance(stream, DirectStream), "it fell back"
        await receive_all(kind(stream), size)

    async with our_host() as host, trio.open_nursery() as nursery:
        direct = Direct(host, DirectConfig())
        await nursery.start(direct.run)
        direct.serve(PROTOCOL, serve)
        say(address=host.addresses()[0])
        await trio.sleep_forever()


async def direct_send(size: int, address: str, kind: type[OurPipe] = OurPipe) -> None:
    """The sender of a direct channel."""
    async with our_host() as host:
        stream = await Direct(host, DirectConfig()).open_stream(await host.dial(address), PROTOCOL)
        assert isinstance(stream, DirectStream), "it fell back"
        await send_all(kind(stream), size)


async def blob_receive(size: int) -> None:
    """Fetches blobs over a direct channel."""
    await direct_receive(size, BlobPipe)


async def blob_send(size: int, address: str) -> None:
    """Gives blobs over a direct channel."""
    await direct_send(size, address, BlobPipe)


RECEIVERS: dict[str, Callable[[int], Awaitable[None]]] = {
    "libp2p": libp2p_receive,
    "direct": direct_receive,
    "blob": blob_receive,
    "plain": plain_receive,
}
SENDERS: dict[str, Callable[[int, str], Awaitable[None]]] = {
    "libp2p": libp2p_send,
    "direct": direct_send,
    "blob": blob_send,
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
