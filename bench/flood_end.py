"""`python -m bench.flood_end gossip | idle | claims ADDRESS SECONDS ...`: an attacker, a process of its own.

Rules: prints one line when it is ready, begins when a line comes on its standard input, ends after SECONDS or at the
next line, and prints what befell it as JSON. It attacks only the address it is given. gossip NETWORK RATE: valid signed
adverts of one identity. idle SOCKETS PREFIX HOSTS: sockets that say nothing, from HOSTS addresses such as PREFIX.1,
opened again when closed. claims CONNECTIONS: they claim a gibibyte before their handshake.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.keys import KeyPair
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.pubsub.pb import rpc_pb2
from libp2p.utils import encode_varint_prefixed
from multiaddr import Multiaddr

from crypto.identity import Identity
from gossip.messages import Advert, Capacity, advert_topic, seal_advert

Begin = Callable[[], Awaitable[None]]
MESHSUB = TProtocol("/meshsub/1.1.0")
MESSAGES_PER_FRAME = 100  # of some 500 bytes: nearly the largest frame that is taken
PREPARED = 6_000  # messages signed before the attack, more than are read before the cut; their copies follow
CLAIMED_BYTES = 1 << 30
CLAIM_CHUNK = b"x" * 16_384


def published(identity: Identity, network: str, number: int, pair: KeyPair | None = None) -> rpc_pb2.Message:
    """A valid advert in a valid gossip message. pair: the identity's, made once."""
    advert = Advert(instance="ab" * 16, started_ms=1, agent="flood", capacity=Capacity(accepting=True))
    raw = seal_advert(
        identity,
        advert,
        network=network,
        sequence=time.time_ns() // 1_000_000 + number,
        time_ms=int(time.time() * 1000),
    )
    key = pair or create_new_key_pair(identity.seed)
    message = rpc_pb2.Message(
        data=raw,
        topicIDs=[advert_topic(network)],
        from_id=ID.from_pubkey(key.public_key).to_bytes(),
        seqno=(time.time_ns() + number).to_bytes(8, "big"),
    )
    message.signature = key.private_key.sign(b"libp2p-pubsub:" + message.SerializeToString())
    return message


async def gossip(told: dict[str, Any], begin: Begin, address: str, network: str, rate: str) -> None:
    """RATE messages a second; after each cut it connects again.

    Tells who it is, what was sent, how long after the first message the first cut came, and how much was out by then.
    """
    identity = Identity.make()
    pair = create_new_key_pair(identity.seed)
    frames = [
        encode_varint_prefixed(
            rpc_pb2.RPC(
                publish=[published(identity, network, first + n, pair) for n in range(MESSAGES_PER_FRAME)]
            ).SerializeToString()
        )
        for first in range(0, PREPARED, MESSAGES_PER_FRAME)
    ]
    await begin()
    began, first_sent_s = time.monotonic(), 0.0
    told |= {"peer": identity.peer_id, "sent": 0, "cuts": 0, "first_cut_s": None, "sent_first": None}
    host = new_host(key_pair=pair, muxer_preference="YAMUX")
    async with host.run([]):
        while True:
            try:
                await host.connect(info_from_p2p_addr(Multiaddr(address)))
                stream = await host.new_stream(ID.from_base58(address.rpartition("/")[2]), [MESHSUB])
                first_sent_s = first_sent_s or time.monotonic()
                while True:
                    await stream.write(frames[told["sent"] // MESSAGES_PER_FRAME % len(frames)])
                    told["sent"] += MESSAGES_PER_FRAME
                    await trio.sleep(max(0.0, told["sent"] / float(rate) - (time.monotonic() - began)))
            except (BaseLibp2pError, OSError, trio.BrokenResourceError):
                told["cuts"] += 1
                if told["first_cut_s"] is None and first_sent_s:
                    told |= {"first_cut_s": time.monotonic() - first_sent_s, "sent_first": told["sent"]}
                await trio.sleep(0.2)


async def idle(told: dict[str, Any], begin: Begin, address: str, sockets: str, prefix: str, hosts: str) -> None:
    """Sockets that say nothing. Tells how many were opened in all."""
    told["opened"] = 0
    _, _, ip, _, port, *_ = address.split("/")

    async def sit(source: str) -> None:
        while True:
            try:
                async with await trio.open_tcp_stream(ip, int(port), local_address=source) as stream:
                    told["opened"] += 1
                    while await stream.receive_some():
                        pass
            except (OSError, trio.BrokenResourceError):
                pass  # refused or cut, as it should be
            await trio.sleep(0.5)

    await begin()
    async with trio.open_nursery() as nursery:
        for number in range(int(sockets)):
            nursery.start_soon(sit, f"{prefix}.{number % int(hosts) + 1}")
            await trio.sleep(0.001)


async def claims(told: dict[str, Any], begin: Begin, address: str, connections: str) -> None:
    """Connections that announce CLAIMED_BYTES where a protocol's name is due, and send as much as is taken."""
    told["taken_bytes"] = 0
    _, _, ip, _, port, *_ = address.split("/")
    length = b"".join(bytes([CLAIMED_BYTES >> shift & 0x7F | (0x80 if shift < 28 else 0)]) for shift in range(0, 35, 7))

    async def claim() -> None:
        while True:
            try:
                async with await trio.open_tcp_stream(ip, int(port)) as stream:
                    await stream.send_all(length)
                    while True:
                        await stream.send_all(CLAIM_CHUNK)
                        told["taken_bytes"] += len(CLAIM_CHUNK)
            except (OSError, trio.BrokenResourceError):
                await trio.sleep(0.1)

    await begin()
    async with trio.open_nursery() as nursery:
        for _ in range(int(connections)):
            nursery.start_soon(claim)


class Word:
    """The two lines of whoever started us: begin, and end."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.scope = trio.CancelScope()  # of the attack

    async def to_begin(self, nursery: trio.Nursery) -> None:
        """Say that we are ready, wait for the first line; the attack ends with the second, or after its seconds."""
        print("ready", flush=True)
        await trio.to_thread.run_sync(sys.stdin.readline)
        self.scope.deadline = trio.current_time() + self._seconds
        nursery.start_soon(self._to_end)

    async def _to_end(self) -> None:
        await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)
        self.scope.cancel()


async def main() -> None:
    """Attack, and tell."""
    kind, address, seconds, *rest = sys.argv[1:]
    attack: Any = {"gossip": gossip, "idle": idle, "claims": claims}[kind]
    told: dict[str, Any] = {}
    word = Word(float(seconds))
    async with trio.open_nursery() as nursery:
        with word.scope:
            await attack(told, partial(word.to_begin, nursery), address, *rest)
        nursery.cancel_scope.cancel()
    print(json.dumps(told), flush=True)
    os._exit(0)  # a thread may wait for the second line still


if __name__ == "__main__":
    trio.run(main)
