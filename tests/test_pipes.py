"""Bulk over libp2p: records, yamux frames, windows, beside libp2p as it comes."""

from __future__ import annotations

import hashlib
import random
import struct
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from libp2p.io.exceptions import ConnectionClosedError, IncompleteReadError
from libp2p.security.noise.io import NoiseTransportReadWriter
from libp2p.security.secure_session import SecureSession
from libp2p.stream_muxer.yamux.yamux import (
    DEFAULT_WINDOW_SIZE,
    FLAG_SYN,
    HEADER_SIZE,
    TYPE_DATA,
    TYPE_WINDOW_UPDATE,
    YAMUX_HEADER_FORMAT,
)
from libp2p.utils import encode_delim
from noise.connection import NoiseConnection

from p2p import guard_stream
from p2p.errors import StreamClosed
from p2p.frame import FrameReader, encode_frame
from p2p.guard import Drops
from p2p.guard_noise import RECORD_BYTES, GuardedSession
from p2p.guard_socket import WRITE_STALL_BYTES, WRITE_STALL_S, GuardedSocket
from p2p.transport import FRAME_BYTES_MAX, Stream
from tests.libp2p_peers import bare_connection, node, stranger, until

slow = pytest.mark.slow
BLOB = "/openagi/blob/1"
BULK_BYTES = 9 << 20


# ---- records ----


class Wire:
    """What one side wrote; the other side reads it in pieces of any size."""

    def __init__(self, chance: random.Random) -> None:
        self.writes: list[bytes] = []
        self.raw = bytearray()
        self.chance = chance

    async def write(self, data: bytes) -> None:
        self.writes.append(bytes(data))
        self.raw += data

    async def read(self, n: int | None = None) -> bytes:
        most = self.chance.choice([1, 2, 3, 1000, 70_000, 300_000])
        piece = bytes(self.raw[: most if n is None else n])
        del self.raw[: len(piece)]
        return piece


def states() -> tuple[Any, Any]:
    """Both ends of one finished Noise handshake."""
    ours, theirs = (NoiseConnection.from_name(b"Noise_NN_25519_ChaChaPoly_SHA256") for _ in range(2))
    ours.set_as_initiator()
    theirs.set_as_responder()
    ours.start_handshake()
    theirs.start_handshake()
    theirs.read_message(ours.write_message())
    ours.read_message(theirs.write_message())
    return ours, theirs


def session(wire: Wire, state: Any) -> SecureSession:
    who: Any = SimpleNamespace()
    return SecureSession(
        local_peer=who,
        local_private_key=who,
        remote_peer=who,
        remote_permanent_pubkey=who,
        is_initiator=True,
        conn=NoiseTransportReadWriter(wire, state),
    )


@pytest.mark.parametrize("seed", range(6))
async def test_records_are_read_however_they_are_cut(seed: int) -> None:
    chance = random.Random(seed)
    wire = Wire(chance)
    ours, theirs = states()
    sizes = [chance.choice([0, 1, 12, 5000, RECORD_BYTES, RECORD_BYTES + 1, 3 * RECORD_BYTES]) for _ in range(8)]
    sent = b"".join(chance.randbytes(size) for size in sizes)
    writer, reader, start = session(wire, theirs), GuardedSession(session(wire, ours)), 0
    for size in sizes:
        await writer.write(sent[start : start + size])
        start += size
    got = bytearray()
    while len(got) < len(sent):
        n = min(chance.choice([1, 12, 4000, 200_000]), len(sent) - len(got))
        got += await reader.read_some(n) if chance.random() < 0.5 else await reader.read(n)
    assert got == sent
    with pytest.raises(IncompleteReadError):
        await reader.read(1)


async def test_many_records_are_one_write_and_libp2p_reads_them() -> None:
    chance = random.Random(1)
    wire = Wire(chance)
    ours, theirs = states()
    sent = chance.randbytes(4 * RECORD_BYTES + 7)
    await GuardedSession(session(wire, ours)).write(memoryview(sent)[12:], sent[:12])
    assert len(wire.writes) == 1
    assert await session(wire, theirs).read(len(sent)) == sent
    assert wire.raw == b""


async def test_a_record_that_was_changed_ends_the_connection_and_gives_nothing() -> None:
    wire = Wire(random.Random(2))
    ours, theirs = states()
    await session(wire, theirs).write(bytes(100))
    wire.raw[50] ^= 1
    reader = GuardedSession(session(wire, ours))
    with pytest.raises(ConnectionClosedError):
        await reader.read(1)
    assert reader.unread == 0


@slow
@settings(max_examples=150, deadline=None)
@given(
    records=st.lists(st.binary(max_size=40), max_size=3),
    rest=st.binary(max_size=9),
    right=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_bytes_after_the_handshake_end_the_connection(
    records: list[bytes], rest: bytes, right: bool, seed: int
) -> None:
    """Whole records of noise, cut ones, empty ones: nothing comes out that the peer did not encrypt."""
    wire = Wire(random.Random(seed))
    raw = b"".join(len(record).to_bytes(2, "big") + record for record in records) + rest
    ours, theirs = states()

    async def attack() -> None:
        if right:
            await session(wire, theirs).write(b"right")
        wire.raw += raw
        reader, got = GuardedSession(session(wire, ours)), bytearray()

        async def read_all() -> None:
            while True:
                got.extend(await reader.read())

        with pytest.raises((ConnectionClosedError, IncompleteReadError)):
            await read_all()
        assert got == (b"right" if right else b"") or (got == b"" and raw)

    trio.run(attack)


# ---- the socket ----


class SlowSocket:
    """Takes so many bytes after so long."""

    def __init__(self, taken: int, seconds: float) -> None:
        self.taken, self.seconds, self.closed = taken, seconds, False

    def getpeername(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    async def send(self, data: memoryview) -> int:
        await trio.sleep(self.seconds)
        return min(self.taken, len(data))

    def close(self) -> None:
        self.closed = True


async def test_a_slow_peer_that_takes_something_keeps_its_connection(autojump_clock: trio.testing.MockClock) -> None:
    below: Any = SimpleNamespace(socket=SlowSocket(WRITE_STALL_BYTES, WRITE_STALL_S / 2))
    socket = GuardedSocket(below, Drops())
    await socket.write(bytes(20 * WRITE_STALL_BYTES))
    assert socket.bytes_out == 20 * WRITE_STALL_BYTES
    assert trio.current_time() > 2 * WRITE_STALL_S


async def test_a_peer_that_takes_a_byte_now_and_then_loses_it(autojump_clock: trio.testing.MockClock) -> None:
    below: Any = SimpleNamespace(socket=SlowSocket(1, WRITE_STALL_S / 2))
    drops = Drops()
    with pytest.raises(ConnectionClosedError):
        await GuardedSocket(below, drops).write(bytes(WRITE_STALL_BYTES))
    assert below.socket.closed
    assert drops.counts == {"write_stalled": 1}


# ---- frames ----


def test_a_frame_in_single_bytes_is_kept_in_one_piece() -> None:
    reader = FrameReader()
    for byte in encode_frame(bytes(50_000))[:-1]:
        assert reader.feed(bytes([byte])) == []
    assert len(reader._pieces) == 1
    assert reader.bytes_pending == 50_003


# ---- beside libp2p as it comes ----


@slow
async def test_bulk_from_libp2p_as_it_comes() -> None:
    got = hashlib.sha256()
    sent = random.Random(4).randbytes(BULK_BYTES)
    ended = trio.Event()

    async def take(stream: Stream) -> None:
        try:
            while True:
                got.update(await stream.receive())
        except StreamClosed:
            ended.set()

    async with node() as bob:
        bob.serve(BLOB, take)
        async with stranger(bob) as eve:
            stream = await eve.stream(BLOB)
            for start in range(0, len(sent), FRAME_BYTES_MAX):
                await stream.write(encode_frame(sent[start : start + FRAME_BYTES_MAX]))
            await stream.close_write()
            with trio.fail_after(60):
                await ended.wait()
    assert got.digest() == hashlib.sha256(sent).digest()


@slow
async def test_bulk_to_libp2p_as_it_comes() -> None:
    sent = random.Random(5).randbytes(BULK_BYTES)
    frames = [sent[start : start + FRAME_BYTES_MAX] for start in range(0, len(sent), FRAME_BYTES_MAX)]
    past: list[int] = []

    async def give(stream: Stream) -> None:
        for frame in frames:
            await stream.send(frame)

    async with node() as bob:
        bob.serve(BLOB, give)
        async with stranger(bob) as eve:
            stream = await eve.stream(BLOB)
            reader, got = FrameReader(), []
            with trio.fail_after(60):
                while len(got) < len(frames):
                    got += reader.feed(await stream.read(1 << 20))
                    past.append(stream.muxed_stream.recv_window)
            assert got == frames
    assert min(past) >= 0


@slow
async def test_a_peer_never_gets_more_than_its_window() -> None:
    async def give(stream: Stream) -> None:
        await stream.send(bytes(FRAME_BYTES_MAX))

    async with node() as bob, bare_connection(bob) as muxed:
        bob.serve(BLOB, give)
        secured = muxed.secured_conn
        lines = b"".join(map(encode_delim, (b"/multistream/1.0.0", BLOB.encode())))
        await secured.write(struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_DATA, FLAG_SYN, 1, len(lines)) + lines)
        got = 0

        async def read_data() -> None:
            nonlocal got
            while True:
                _, kind, _, number, length = struct.unpack(YAMUX_HEADER_FORMAT, await secured.read(HEADER_SIZE))
                if kind == TYPE_DATA:
                    body = await secured.read(length)
                    got += len(body) if number == 1 else 0

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_data)
            for window in (DEFAULT_WINDOW_SIZE, 1000, 100_000):
                expected = got + window
                if window != DEFAULT_WINDOW_SIZE:
                    await secured.write(struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_WINDOW_UPDATE, 0, 1, window))
                await until(lambda wanted=expected: got >= wanted, 30)
                await trio.sleep(0.2)
                assert got == expected
            nursery.cancel_scope.cancel()


@slow
async def test_a_peer_may_use_its_whole_window_and_not_a_byte_more() -> None:
    async def hang(stream: Stream) -> None:
        await trio.sleep_forever()

    async with node() as bob, bare_connection(bob) as muxed:
        bob.serve(BLOB, hang)
        secured = muxed.secured_conn
        lines = b"".join(map(encode_delim, (b"/multistream/1.0.0", BLOB.encode())))
        await secured.write(struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_DATA, FLAG_SYN, 1, len(lines)) + lines)
        room, quiet = DEFAULT_WINDOW_SIZE - len(lines), False
        while not quiet:  # what negotiating gave back, and how far the window grew by that
            with trio.move_on_after(1) as scope:
                _, kind, _, number, length = struct.unpack(YAMUX_HEADER_FORMAT, await secured.read(HEADER_SIZE))
                if kind == TYPE_DATA:
                    await secured.read(length)
                room += length if kind == TYPE_WINDOW_UPDATE and number == 1 else 0
            quiet = scope.cancelled_caught
        while room:
            size = min(room, 60_000)
            await secured.write(struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_DATA, 0, 1, size) + bytes(size))
            room -= size
        await trio.sleep(0.5)
        assert bob.peers()
        await secured.write(struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_DATA, 0, 1, 1) + b"x")
        await until(lambda: not bob.peers())
        assert bob.statistics().drops["window_exceeded"] == 1


@slow
async def test_a_writer_goes_on_as_soon_as_its_window_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_stream, "WINDOW_POLL_S", 3600.0)
    got: list[int] = []

    async def take(stream: Stream) -> None:
        await trio.sleep(0.3)
        for _ in range(8):
            got.append(len(await stream.receive()))

    async with node() as alice, node() as bob:
        bob.serve(BLOB, take)
        stream = await alice.open_stream(await alice.dial(bob.addresses()[0]), BLOB)
        with trio.fail_after(60):
            for _ in range(8):
                await stream.send(bytes(FRAME_BYTES_MAX))
        await until(lambda: len(got) == 8, 60)
