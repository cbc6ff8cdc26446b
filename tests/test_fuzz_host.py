"""A host under mutated frames, over every protocol it registers: it lives, serves others, and does not grow.

FRAMES_SOAK is `pytest -m soak`; each frame counted was taken by the host's process, on a stream that was still open.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack
import psutil
import pytest
import trio
from google.protobuf.message import DecodeError
from libp2p.exceptions import BaseLibp2pError
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.pubsub.pb import rpc_pb2
from libp2p.utils import encode_delim, encode_varint_prefixed

from crypto.identity import Identity
from p2p.host import Libp2pTransport
from tests.libp2p_peers import TOPIC, Stranger, bare_connection, node, raw_socket, stranger

FRAMES = 50_000
FRAMES_SOAK = 1_000_000
GROWTH_BYTES_MAX = 32 << 20
WARM_UP = 0.1  # of the frames, before the memory is first read
ATTACKERS = 3
FRAMES_PER_STREAM = 64
FRAMES_PER_CONNECTION = 250  # the host identifies each new connection once, and reads a damaged answer
# protocol -> share of the frames
SHARES = {
    "/meshsub/1.1.0": 0.40,
    "/openagi/rpc/1": 0.23,
    "/openagi/infer/1": 0.23,
    "/ipfs/ping/1.0.0": 0.06,
    "/ipfs/id/push/1.0.0": 0.04,
    "/ipfs/id/1.0.0": 0.04,
}


class Mutator:
    """Frames of the right form, then damaged. All chance comes from `rng`."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def damaged(self, raw: bytes) -> bytes:
        """Flip, cut, double, insert or replace some bytes."""
        data, rng = bytearray(raw or b"\0"), self.rng
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data) or 1)
            match rng.randrange(6):
                case 0 if data:
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    del data[at : at + rng.randint(1, 16)]
                case 2:
                    data[at:at] = rng.randbytes(rng.randint(1, 16))
                case 3:
                    data[at:at] = data[at : at + 32]
                case 4:
                    data[at : at + 8] = rng.choice([b"\xff" * 8, bytes(8), b"\x80" * 8, b"\x7f" + b"\xff" * 7])
                case _:
                    data += rng.randbytes(rng.randint(0, 64))
        return bytes(data[:60_000])

    def words(self, count_max: int, size_max: int) -> list[str]:
        letters = "Aa\x7f\u03b1\U0001f600"
        sizes = [self.rng.randint(0, size_max) for _ in range(self.rng.randint(0, count_max))]
        return ["".join(self.rng.choices(letters, k=size)) for size in sizes]

    def numbers(self) -> list[bytes]:
        return [self.rng.randbytes(self.rng.randint(0, 42)) for _ in range(self.rng.randint(0, 4))]

    def gossip(self) -> bytes:
        """A pubsub RPC with anything in its fields."""
        rng, rpc = self.rng, rpc_pb2.RPC()
        topic = rng.choice([TOPIC, "", *self.words(1, 40)])
        for _ in range(rng.randint(0, 2)):
            rpc.subscriptions.add(subscribe=rng.random() < 0.5, topicid=topic)
        for _ in range(rng.randint(0, 3)):
            rpc.publish.add(
                data=rng.randbytes(rng.randint(0, 200)),
                topicIDs=[topic, *self.words(1, 8)],
                from_id=rng.choice([b"", b"\0\x24\x08\x01\x12\x20" + rng.randbytes(32), rng.randbytes(34)]),
                seqno=rng.randbytes(8),
                signature=rng.randbytes(64),
                key=rng.choice([b"", rng.randbytes(36)]),
            )
        if rng.random() < 0.6:
            control = rpc.control
            control.ihave.add(topicID=topic, messageIDs=self.numbers())
            control.iwant.add(messageIDs=self.numbers())
            control.graft.add(topicID=topic)
            control.prune.add(topicID=topic, backoff=rng.choice([0, 1, 2**31, 2**64 - 1]))
        raw = bytes(rpc.SerializeToString())
        if rng.random() < 0.5:
            worse = self.damaged(raw)
            if rng.random() < 0.1 or decodes(worse):  # most that do not decode are left out: they end the stream
                return worse
        return raw

    def identify(self) -> bytes:
        """An identify message with anything in its fields."""
        rng = self.rng
        message = Identify(
            protocol_version="ipfs/0.1.0",
            agent_version="".join(self.words(1, 100)),
            public_key=rng.randbytes(36),
            listen_addrs=[rng.randbytes(rng.randint(0, 40)) for _ in range(rng.randint(0, 30))],
            observed_addr=rng.randbytes(8),
            protocols=self.words(30, 40),
        )
        return self.damaged(bytes(message.SerializeToString()))

    def call(self) -> bytes:
        """One of our own frames' contents."""
        rng = self.rng
        body = {
            "method": "hello",
            "body": [rng.random(), rng.getrandbits(60), rng.randbytes(20)],
            "id": rng.getrandbits(31),
        }
        return self.damaged(msgpack.packb(body))


def decodes(frame: bytes) -> bool:
    """Whether a pubsub frame is a protobuf at all."""
    try:
        rpc_pb2.RPC().ParseFromString(frame)
    except DecodeError:
        return False
    return True


def burst(mutator: Mutator, protocol: str) -> tuple[bytes, int]:
    """The bytes of some frames for one stream, and how many the host will take from them."""
    rng, raw = mutator.rng, bytearray()
    for count in range(1, FRAMES_PER_STREAM + 1):
        match protocol:
            case "/meshsub/1.1.0":
                frame = mutator.gossip()
                raw += encode_varint_prefixed(frame)
                if not decodes(frame):
                    return bytes(raw), count  # the host ends the stream here
            case "/ipfs/ping/1.0.0":
                raw += mutator.damaged(rng.randbytes(32))
            case "/ipfs/id/push/1.0.0" | "/ipfs/id/1.0.0":
                return encode_varint_prefixed(mutator.identify()), 1
            case _:
                frame = mutator.call()
                last = count == FRAMES_PER_STREAM
                raw += (
                    mutator.damaged(len(frame).to_bytes(4, "big") + frame)
                    if last
                    else len(frame).to_bytes(4, "big") + frame
                )
    return bytes(raw), FRAMES_PER_STREAM


class Attack:
    """Counts down what is still to be sent, over several connections."""

    def __init__(self, frames: int, seed: int) -> None:
        self.left = Counter({protocol: int(frames * share) for protocol, share in SHARES.items()})
        self.sent: Counter[str] = Counter()
        self.rng = random.Random(seed)

    async def run(self, target: Libp2pTransport, until_left: int) -> None:
        """Send until no more than `until_left` frames are left."""
        mutator = Mutator(random.Random(self.rng.getrandbits(64)))
        while self.left.total() > until_left:
            try:
                await self._connection(target, mutator, until_left)
            except* (BaseLibp2pError, OSError, trio.BrokenResourceError):
                pass  # the host dropped us, as it may; the next connection goes on

    async def _connection(self, target: Libp2pTransport, mutator: Mutator, until_left: int) -> None:
        async with stranger(target) as eve:

            async def answer(stream: Any) -> None:
                await stream.write(burst(mutator, "/ipfs/id/1.0.0")[0])
                self.sent["identify answers"] += 1
                await stream.close()

            eve.host.set_stream_handler("/ipfs/id/1.0.0", answer)
            taken = 0
            while taken < FRAMES_PER_CONNECTION and self.left.total() > until_left:
                wanted = [protocol for protocol, count in self.left.items() if count > 0]
                protocol = mutator.rng.choices(wanted, [self.left[each] for each in wanted])[0]
                taken += await self._stream(eve, protocol, mutator)

    async def _stream(self, eve: Stranger, protocol: str, mutator: Mutator) -> int:
        raw, count = burst(mutator, protocol)
        count = min(count, self.left[protocol])
        self.left[protocol] -= count
        taken = 0
        try:
            with trio.fail_after(60):  # the host ends every stream that we end
                stream = await eve.stream(protocol)
                await stream.write(raw)
                taken = count
                await stream.close_write()
                while await stream.read(65_536):
                    pass
        except BaseLibp2pError:
            pass  # ended by the host: that is its answer
        self.left[protocol] += count - taken
        self.sent[protocol] += taken
        return max(taken, 1)


@asynccontextmanager
async def victim() -> AsyncIterator[tuple[psutil.Process, Any, Any]]:
    """The host's process; its address is read by `remote`."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "tests.fuzz_victim"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )
    try:
        assert process.stdout is not None
        with trio.fail_after(60):
            address = await line(process.stdout)

        class Remote:
            def addresses(self) -> tuple[str, ...]:
                return (address,)

            peer_id = address.rpartition("/")[2]

        yield psutil.Process(process.pid), process, Remote()
    finally:
        process.kill()
        await process.wait()


async def line(stream: trio.abc.ReceiveStream) -> str:
    """The next line of a process that prints one at a time."""
    text = b""
    while not text.endswith(b"\n"):
        piece = await stream.receive_some(65_536)
        assert piece, f"the process ended after {text!r}"
        text += piece
    return text.decode().strip()


def rss(process: psutil.Process) -> int:
    return int(process.memory_info().rss)


async def serves(honest: Libp2pTransport, peer: Any, number: int) -> None:
    """The host still answers somebody who behaves."""
    with trio.fail_after(60):
        stream = await honest.open_stream(peer, "/openagi/rpc/1")
        await stream.send(b"%d" % number)
        assert await stream.receive() == b"%d" % number
        await stream.close()


async def fuzz(frames: int) -> None:
    seed = int(os.environ.get("FUZZ_SEED", "20261122"))
    print(f"SEED={seed} FRAMES={frames}")
    attack = Attack(frames, seed)
    total = attack.left.total()
    async with victim() as (memory, process, remote), node(Identity.make()) as honest:
        peer = await honest.dial(remote.addresses()[0])
        readings = []
        for left in (int(total * (1 - WARM_UP)), total // 2, 0):
            async with trio.open_nursery() as nursery:
                for _ in range(ATTACKERS):
                    nursery.start_soon(attack.run, remote, left)
            await serves(honest, peer, left)
            await trio.sleep(1)
            readings.append(rss(memory))
        print({**attack.sent}, "total", attack.sent.total(), "MB", [round(each / 1e6, 1) for each in readings])
        assert process.returncode is None
        assert attack.sent.total() >= total
        assert readings[-1] - readings[0] < GROWTH_BYTES_MAX
        assert peer in honest.peers()
        process.stdin.close()
        drops = json.loads(await line(process.stdout))
        print(drops)
        with trio.fail_after(30):
            assert await process.wait() == 0
        assert "daemon_failed" not in drops


@pytest.mark.slow
async def test_50000_mutated_frames_end_nothing_and_grow_nothing() -> None:
    await fuzz(FRAMES)


@pytest.mark.soak
async def test_a_million_mutated_frames_end_nothing_and_grow_nothing() -> None:
    await fuzz(FRAMES_SOAK)


@pytest.mark.slow
async def test_damaged_handshakes_and_multiplexing_end_their_connection_only() -> None:
    mutator = Mutator(random.Random(5))
    handshake = encode_delim(b"/multistream/1.0.0") + encode_delim(b"/noise")
    async with node() as bob, node() as alice:
        await alice.dial(bob.addresses()[0])

        async def quietly(run: Callable[[], Any]) -> None:
            try:
                with trio.fail_after(20):
                    await run()
            except* (BaseLibp2pError, OSError, trio.BrokenResourceError, trio.TooSlowError):
                pass

        async def before() -> None:
            async with await raw_socket(bob) as stream:
                await stream.send_all(mutator.damaged(handshake))
                await stream.send_eof()
                while await stream.receive_some():
                    pass

        async def after() -> None:
            async with bare_connection(bob) as muxed:
                for _ in range(20):
                    header = bytes([0, mutator.rng.randrange(5), 0, mutator.rng.randrange(16)])
                    header += mutator.rng.choice([0, 1, 2, 3, 2**31]).to_bytes(4, "big")
                    body = mutator.damaged(b"body")
                    size = mutator.rng.choice([len(body), 0, 5, 70_000, 2**32 - 1])
                    await muxed.secured_conn.write(header + size.to_bytes(4, "big") + body)

        for _ in range(100):
            await quietly(before)
        for _ in range(60):
            await quietly(after)
        assert alice.peers() == {bob.peer_id}
        async with node() as carol:
            await carol.dial(bob.addresses()[0])
