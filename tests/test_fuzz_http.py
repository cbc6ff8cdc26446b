"""Mutated HTTP over a stream in memory: nothing that a client sends ends the node, hangs it, or makes a 500."""

from __future__ import annotations

import re
import time
from functools import partial
from itertools import pairwise
from random import Random

import pytest
import trio
from trio.testing import MockClock

from node.web.app import build_app
from node.web.serve import ServeLimits, _Server
from tests.fake_front import FakeFront

SEEDS = [
    b'POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 14\r\n\r\n{"prompt":"a"}',
    b'POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 28\r\n\r\n{"prompt":"a","stream":true}',
    b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\nGET /readyz HTTP/1.1\r\nhost: localhost\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\n\r\n"
    b'5\r\n{"mes\r\n0\r\n\r\n',
    b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n\x81\x85abcdefgh",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(20),
    b"HEAD /v1/models HTTP/1.0\r\n\r\n",
    b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\ncontent-length: 13\r\n\r\n"
    b'{"input":"a"}',
]
WORDS = [
    b"\r\n",
    b"content-length: 5\r\n",
    b"transfer-encoding: chunked\r\n",
    b"connection: close\r\n",
    b"upgrade: h2c\r\n",
    b"\x00",
]


class MemorySocket:
    family = trio.socket.AF_INET

    def getpeername(self) -> tuple[str, int]:
        return ("127.0.0.1", 1)

    getsockname = getpeername

    def close(self) -> None:
        pass


class MemoryStream:
    """The parts one after another, then the end; what was sent back is kept."""

    def __init__(self, parts: list[bytes]) -> None:
        self.socket = MemorySocket()
        self.sent = b""
        self._parts = parts
        self._closed = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        for _ in range(3):
            await trio.lowlevel.checkpoint()
        return self._parts.pop(0) if self._parts else b""

    async def send_all(self, content: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise trio.ClosedResourceError
        self.sent += content

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        self._closed = True
        await trio.lowlevel.checkpoint()


def mutated(rng: Random) -> list[bytes]:
    """A seed with up to five changes, cut into up to four reads."""
    raw = bytearray(rng.choice(SEEDS))
    for _ in range(rng.randrange(6)):
        at = rng.randrange(len(raw) + 1)
        match rng.randrange(5):
            case 0:
                raw[at : at + 1] = rng.randbytes(1)
            case 1:
                raw[at:at] = rng.randbytes(rng.randrange(1, 8))
            case 2:
                del raw[at : at + rng.randrange(1, 12)]
            case 3:
                raw[at:at] = rng.choice(SEEDS)
            case _:
                raw[at:at] = rng.choice(WORDS)
    cuts = sorted({0, len(raw), *(rng.randrange(len(raw) + 1) for _ in range(rng.randrange(4)))})
    return [bytes(raw[start:end]) for start, end in pairwise(cuts)]


async def attack(count: int, seed: int) -> None:
    rng, front = Random(seed), FakeFront()
    door = build_app(front, Random(1))
    server = _Server(door, ServeLimits(idle_s_max=1.0))
    for number in range(count):
        parts = mutated(rng)
        stream = MemoryStream(list(parts))
        with trio.fail_after(60):
            await server.serve(stream)  # type: ignore[arg-type]
        where = f"SEED={seed} number {number}: {parts}"
        assert not re.match(rb"HTTP/1.1 (101|500)", stream.sent), f"{where} -> {stream.sent[:200]!r}"
        assert door.counts.connections == front.running == 0, where
        assert door.counts.drops["connection_failed"] == 0, where


@pytest.mark.slow
def test_mutated_requests_end_nothing() -> None:
    trio.run(partial(attack, 300, 1), clock=MockClock(autojump_threshold=0))


@pytest.mark.soak
def test_many_mutated_requests_end_nothing() -> None:
    trio.run(partial(attack, 50_000, int(time.time())), clock=MockClock(autojump_threshold=0))
