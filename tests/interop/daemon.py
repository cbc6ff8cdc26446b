"""A client of p2pd, the daemon around go-libp2p: start it, connect, open and serve streams, publish and subscribe.

Rules: one socket for each request, as the daemon wants it; an opened stream goes on over the socket that asked for it.
Messages are protobuf, each after its length as a varint; only the few that are used are written here.
Source: hivemind's p2pd.proto; github.com/libp2p/go-libp2p-daemon specs/CONTROL.md.
"""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio
from multiaddr import Multiaddr

from crypto.identity import peer_id_of, public_key_of

IDENTIFY, CONNECT, STREAM_OPEN, STREAM_HANDLER, PUBSUB = 0, 1, 2, 3, 8
PUBLISH, SUBSCRIBE = 2, 3
START_S = 30.0
PEER_PREFIX = bytes((0x00, 0x24, 0x08, 0x01, 0x12, 0x20))  # docs/PROTOCOLS.md, peer ids
Fields = dict[int, list[bytes | int]]


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes(out) + bytes([number])


def message(**fields: int | str | bytes) -> bytes:
    """A protobuf message: _1=... is field 1; an int is a varint, text and bytes carry their length."""
    raw = b""
    for name, value in fields.items():
        number = int(name[1:])
        if isinstance(value, int):
            raw += varint(number << 3) + varint(value)
        else:
            content = value.encode() if isinstance(value, str) else value
            raw += varint(number << 3 | 2) + varint(len(content)) + content
    return raw


def fields_of(raw: bytes) -> Fields:
    """The fields of a message, by number."""
    found: Fields = {}
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = raw[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(raw):
        key = number()
        size = number()
        if key & 7 == 2:
            found.setdefault(key >> 3, []).append(raw[at : at + size])
            at += size
        else:
            found.setdefault(key >> 3, []).append(size)
    return found


class Socket:
    """Bytes of one connection with the daemon."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._held = b""

    async def read(self, n: int) -> bytes:
        while len(self._held) < n:
            piece = await self.stream.receive_some(65_536)
            assert piece, "the daemon closed its socket"
            self._held += piece
        taken, self._held = self._held[:n], self._held[n:]
        return taken

    async def read_some(self) -> bytes:
        taken, self._held = self._held, b""
        return taken or bytes(await self.stream.receive_some(65_536))

    async def read_message(self) -> Fields:
        head = b""
        while not head or head[-1] & 0x80:
            head += await self.read(1)
        size = sum((byte & 0x7F) << 7 * place for place, byte in enumerate(head))
        return fields_of(await self.read(size))

    async def ask(self, **request: int | str | bytes) -> Fields:
        """Send a request, read its answer; fails when it is an error."""
        raw = message(**request)
        await self.stream.send_all(varint(len(raw)) + raw)
        answer = await self.read_message()
        assert answer[1] == [0], f"p2pd: {answer}"
        return answer


@dataclass(frozen=True)
class Daemon:
    """A running p2pd, whose sockets are in `folder`."""

    folder: Path

    async def _socket(self) -> Socket:
        return Socket(await trio.open_unix_socket(str(self.folder / "control")))

    async def ask(self, **request: int | str | bytes) -> Fields:
        socket = await self._socket()
        async with socket.stream:
            return await socket.ask(**request)

    async def connect(self, address: str) -> bytes:
        """Dial a peer; gives its id, as bytes."""
        bare, _, text = address.rpartition("/p2p/")
        peer = PEER_PREFIX + public_key_of(text)
        await self.ask(_1=CONNECT, _2=message(_1=peer, _2=Multiaddr(bare).to_bytes()))
        return peer

    @asynccontextmanager
    async def open_stream(self, peer: bytes, protocol: str) -> AsyncIterator[Socket]:
        socket = await self._socket()
        async with socket.stream:
            await socket.ask(_1=STREAM_OPEN, _3=message(_1=peer, _2=protocol))
            yield socket

    async def serve(self, protocol: str, nursery: trio.Nursery, handler: Callable[[Socket], Awaitable[None]]) -> None:
        """Run `handler` in the nursery for each stream of `protocol` that peers open; one protocol a daemon."""

        async def accepted(stream: trio.SocketStream) -> None:
            async with stream:
                socket = Socket(stream)
                await socket.read_message()  # who opened it, and for what
                await handler(socket)

        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, accepted, [listener])
        address = Multiaddr(f"/ip4/127.0.0.1/tcp/{listener.socket.getsockname()[1]}").to_bytes()
        await self.ask(_1=STREAM_HANDLER, _4=message(_1=address, _2=protocol, _3=0))

    async def publish(self, topic: str, data: bytes) -> None:
        await self.ask(_1=PUBSUB, _8=message(_1=PUBLISH, _2=topic, _3=data))

    @asynccontextmanager
    async def subscribe(self, topic: str) -> AsyncIterator[Socket]:
        """Messages of a topic, one by `read_message` each: field 1 who signed it, field 2 what it says."""
        socket = await self._socket()
        async with socket.stream:
            await socket.ask(_1=PUBSUB, _8=message(_1=SUBSCRIBE, _2=topic))
            yield socket


@asynccontextmanager
async def daemon(program: Path, folder: Path) -> AsyncIterator[tuple[Daemon, str]]:
    """A p2pd on loopback TCP with Noise, yamux and gossipsub; the daemon and its address."""
    command = [str(program), "-listen", f"/unix{folder / 'control'}", "-hostAddrs", "/ip4/127.0.0.1/tcp/0"]
    command += ["-pubsub", "-q", "-gossipsubHeartbeatInterval", "1s"]
    process = subprocess.Popen(  # noqa: ASYNC220  # forks and waits for nothing
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        found = Daemon(folder)
        with trio.fail_after(START_S):
            while True:
                try:
                    (identity,) = (await found.ask(_1=IDENTIFY))[4]
                    break
                except OSError:  # it does not listen yet
                    assert process.poll() is None, f"p2pd ended with {process.returncode}"
                    await trio.sleep(0.05)
        assert isinstance(identity, bytes)
        told = fields_of(identity)
        peer, addresses = told[1][0], [Multiaddr(raw) for raw in told[2] if isinstance(raw, bytes)]
        assert isinstance(peer, bytes)
        assert peer.startswith(PEER_PREFIX)
        (address,) = [str(each) for each in addresses if "/tcp/" in str(each)]
        yield found, f"{address}/p2p/{peer_id_of(peer[len(PEER_PREFIX) :])}"
    finally:
        process.kill()
        process.wait()
