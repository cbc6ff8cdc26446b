"""The attack of tests/test_fuzz_host.py: strangers that connect again and again, and say damaged things on every door.

Rules: what is said is of fuzz_frames.py, fuzz_bulk.py and fuzz_relay.py; here is who says it, on what, and how many
frames were said. `sent` is by protocol, of streams that we open; `answered` of those that the host opens to us.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import Status, StopMessage
from libp2p.utils.varint import encode_varint_prefixed, read_varint_prefixed_bytes_limited

from gossip.blob_wire import BLOB_PROTOCOL
from gossip.finding import FIND_PROTOCOL
from gossip.messages import advert_topic
from gossip.round_door import ROUND_PROTOCOL
from gossip.service import ADVERTS_PROTOCOL
from node.inference import INFER_PROTOCOL
from p2p.direct import DIRECT_PROTOCOL
from p2p.errors import P2PError
from p2p.frame import FrameReader
from p2p.guard_punch import DCUTR
from p2p.guard_relay import HOP, STOP
from p2p.hello import RPC_PROTOCOL
from tests import fuzz_bulk, fuzz_relay
from tests.fuzz_frames import IDENTIFY, MESHSUB, PING, PUSH, Attacker
from tests.fuzz_victim import NETWORK
from tests.libp2p_peers import Stranger, over_a_circuit, stranger

FRAMES_PER_CONNECTION = 250  # the host identifies each new connection once, and reads a damaged answer
REFUSALS_MAX = 3  # streams that the host did not take, in a row: we are cut off or banned
STREAM_S_MAX = 300.0  # the host ends every stream that we end; on a machine that is busy with other things too
LED_S = 2.0  # until the host begins a punch with a peer that came through a relay
# protocol -> share of the frames that we send
SHARES = {
    MESHSUB: 0.33,
    RPC_PROTOCOL: 0.19,
    ROUND_PROTOCOL: 0.03,
    INFER_PROTOCOL: 0.20,
    ADVERTS_PROTOCOL: 0.05,
    PING: 0.04,
    BLOB_PROTOCOL: 0.04,
    PUSH: 0.03,
    IDENTIFY: 0.005,
    DIRECT_PROTOCOL: 0.03,
    FIND_PROTOCOL: 0.015,
    HOP: 0.02,
    STOP: 0.01,
    DCUTR: 0.01,
}
# what the host asks of who connects to it
ASKED = (
    IDENTIFY,
    ADVERTS_PROTOCOL,
    RPC_PROTOCOL,
    FIND_PROTOCOL,
    BLOB_PROTOCOL,
    ROUND_PROTOCOL,
    DIRECT_PROTOCOL,
    HOP,
    STOP,
    DCUTR,
)


class Attack:
    """Counts down what is still to be sent, over several connections."""

    def __init__(self, frames: int, seed: int) -> None:
        self.left = Counter({protocol: int(frames * share) for protocol, share in SHARES.items()})
        self.sent: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.connections = 0
        self.claimed = 0  # direct channels
        self.circuits = 0
        self.rng = random.Random(seed)
        self._peers: deque[bytes] = deque([b"\0"], maxlen=4)  # ids of who attacked last

    async def run(self, target: Any, until_left: int) -> None:
        """Send until no more than `until_left` frames are left."""
        while self.left.total() > until_left:
            try:
                await self._connection(target, until_left)
            except* (BaseLibp2pError, OSError, trio.BrokenResourceError):
                pass  # the host dropped us, as it may; the next connection goes on

    async def _connection(self, target: Any, until_left: int) -> None:
        attacker = Attacker(random.Random(self.rng.getrandbits(64)), NETWORK, advert_topic(NETWORK))
        attacker.others = list(self._peers)
        self._peers.append(ID.from_base58(attacker.identity.peer_id).to_bytes())
        self.connections += 1
        handlers = {protocol: self._answering(protocol, attacker) for protocol in ASKED}
        if attacker.rng.random() < 0.5:
            del handlers[DIRECT_PROTOCOL]  # then the host takes an ordinary stream
        async with stranger(target, key_pair=attacker.key_pair, handlers=handlers) as eve:
            taken = refused = 0
            while refused < REFUSALS_MAX and taken < FRAMES_PER_CONNECTION and self.left.total() > until_left:
                wanted = [protocol for protocol, count in self.left.items() if count > 0]
                protocol = attacker.rng.choices(wanted, [self.left[each] for each in wanted])[0]
                more = await self._say(eve, protocol, attacker)
                taken += more
                refused = 0 if more else refused + 1

    async def _say(self, eve: Stranger, protocol: str, attacker: Attacker) -> int:
        """On one stream that we open; how many frames the host took."""
        if protocol == DCUTR and attacker.rng.random() < 0.9:
            return await self._counted(protocol, 2, self._circuit, eve, attacker)
        if protocol == DIRECT_PROTOCOL and attacker.rng.random() < 0.5:
            return await self._counted(protocol, fuzz_bulk.ASKS_MAX, self._claim, eve, attacker)
        frames = attacker.frames(protocol)
        return await self._counted(protocol, frames.count, self._stream, eve, protocol, frames.raw, frames.count)

    async def _counted(self, protocol: str, most: int, say: Callable[..., Any], *args: Any) -> int:
        """Run `say`, which gives how many frames the host took, `most` if all goes well."""
        reserved = min(most, self.left[protocol])
        self.left[protocol] -= reserved
        taken = 0
        try:
            with trio.fail_after(STREAM_S_MAX):
                taken = min(await say(*args), reserved)
        except BaseLibp2pError:
            pass  # ended by the host: that is its answer
        except trio.TooSlowError as exc:
            raise AssertionError(f"the host did not end a stream of {protocol} within {STREAM_S_MAX} s") from exc
        finally:
            self.left[protocol] += reserved - taken
            self.sent[protocol] += taken
        return taken

    async def _stream(self, eve: Stranger, protocol: str, raw: bytes, count: int) -> int:
        stream = await eve.stream(protocol)
        await stream.write(raw)
        try:
            await stream.close_write()
            while await stream.read(65_536):
                pass
        except BaseLibp2pError:
            pass
        return count

    async def _claim(self, eve: Stranger, attacker: Attacker) -> int:
        """A direct channel that is agreed on and claimed, then damaged inside; or a knock at its port."""
        rng = attacker.rng
        claim = fuzz_bulk.Claim(rng, attacker.identity.peer_id, eve.peer.to_base58())
        stream = await eve.stream(DIRECT_PROTOCOL)
        await stream.write(claim.ask)
        claim.offered((await _frames(stream, 1))[0])
        if not claim.port:
            await stream.reset()
            return 1
        if rng.random() < 0.2:
            await fuzz_bulk.knock(rng, claim.port)
            await stream.reset()
            return 2
        try:
            async with await trio.open_tcp_stream("127.0.0.1", claim.port) as channel:
                await channel.send_all(claim.token)
                await channel.receive_some(1)  # the proof that the token was taken
                await stream.write(claim.choice)
                await channel.send_all(claim.sealed)
                self.claimed += 1
                with trio.move_on_after(1):  # a channel may stay open: so long we wait for answers
                    while await channel.receive_some():
                        pass
        except (OSError, trio.BrokenResourceError):
            pass
        await stream.reset()
        return claim.count

    async def _circuit(self, eve: Stranger, attacker: Attacker) -> int:
        """A connection over a circuit that we carry, by a peer of its own; then a punch, begun by us or by the host."""
        rng = attacker.rng
        inner = create_new_key_pair(rng.randbytes(32))
        source = ID.from_pubkey(inner.public_key)
        stream = await eve.stream(STOP)
        await stream.write(encode_varint_prefixed(fuzz_relay.connect(source.to_bytes()).SerializeToString()))
        answer = StopMessage()
        answer.ParseFromString(await read_varint_prefixed_bytes_limited(stream, 4096))
        if answer.status != Status.OK:
            return 1  # this connection holds no place of the host's: refused at the gate
        handlers = {DCUTR: self._answering(DCUTR, attacker), IDENTIFY: self._answering(IDENTIFY, attacker)}
        async with over_a_circuit(stream, eve.peer, inner, handlers) as behind:
            self.circuits += 1
            if rng.random() < 0.25:
                await trio.sleep(LED_S)
                return 1
            raw, count = fuzz_relay.punch(rng)
            return await self._stream(behind, DCUTR, raw, count)

    # -- answers ------------------------------------------------------------------------------------------------

    def _answering(self, protocol: str, attacker: Attacker) -> Callable[[Any], Any]:
        async def answer(stream: Any) -> None:
            try:
                if protocol == BLOB_PROTOCOL:
                    await self._give(stream, attacker.rng)
                else:
                    frames = attacker.answer(protocol)
                    await stream.write(frames.raw)
                    self.answered[protocol] += frames.count
                await stream.close()
            except (BaseLibp2pError, P2PError):
                pass  # dropped meanwhile

        return answer

    async def _give(self, stream: Any, rng: random.Random) -> None:
        """Be the donor of what the host wants, for a while."""
        await _frames(stream, 1)
        await stream.write(fuzz_bulk.here(rng))
        self.answered[BLOB_PROTOCOL] += 1
        for _ in range(3):
            for asked in await _frames(stream, 1):
                await stream.write(fuzz_bulk.piece(rng, asked))
                self.answered[BLOB_PROTOCOL] += 1


async def _frames(stream: Any, count: int) -> list[bytes]:
    """So many frames, or a few more that came with them. Raises BaseLibp2pError."""
    reader, frames = FrameReader(), list[bytes]()
    while len(frames) < count:
        piece = await stream.read(65_536)
        if not piece:
            raise BaseLibp2pError("the host ended the stream")
        frames += reader.feed(piece)
    return frames
