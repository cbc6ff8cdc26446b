"""Words of circuit relay v2 and of hole punching, for tests/test_fuzz_host.py: right ones, then damaged.

Rules: all chance comes from `rng`. Addresses that a punch names are public by their numbers only: the victim's sockets
cannot be bound where it would dial from (tests/fuzz_victim.py), so no packet leaves the machine.
"""

from __future__ import annotations

import random
import time

from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Reservation, Status, StopMessage
from libp2p.relay.circuit_v2.pb.circuit_pb2 import PeerId as WirePeer
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from libp2p.utils.varint import encode_varint_prefixed
from multiaddr import Multiaddr

from tests.fuzz.damage import damaged

ODD_PEERS = (b"", b"\0", b"\0\x24\x08\x01\x12\x20" + bytes(32), b"\x12\x20" + b"\7" * 32, b"\xff" * 300)
RIGHT = 0.8  # of the words are not damaged


def hop(rng: random.Random, others: list[bytes]) -> bytes:
    """What a peer asks of a relay: a place, or a circuit to one of `others` (peer ids)."""
    kind = rng.random()
    if kind < 0.4:
        return word(rng, HopMessage(type=HopMessage.RESERVE))
    if kind < 0.5:
        return word(rng, HopMessage(type=HopMessage.STATUS, status=rng.choice(Status.values())))
    peer = rng.choice([*others, *others, *ODD_PEERS])
    return word(rng, HopMessage(type=HopMessage.CONNECT, peer=WirePeer(id=peer))) + rng.randbytes(rng.choice([0, 400]))


def place(rng: random.Random) -> bytes:
    """A relay's answer to a wish for a place."""
    status = rng.choice([Status.OK] * 20 + Status.values())
    answer = HopMessage(type=rng.choice([HopMessage.STATUS] * 20 + [HopMessage.CONNECT]), status=status)
    expire = int(time.time()) + rng.choice([1800, 1800, 0, -(10**6)])
    answer.reservation.CopyFrom(Reservation(expire=rng.choice([expire, expire, 0, 2**64 - 1]), addrs=[b"\4", b""]))
    return word(rng, answer)


def stop(rng: random.Random, source: bytes) -> bytes:
    """What a relay says to the peer that somebody wants, and no handshake after it."""
    if rng.random() < 0.1:
        return word(rng, StopMessage(type=StopMessage.STATUS, status=rng.choice(Status.values())))
    return word(rng, connect(rng.choice([source, source, *ODD_PEERS]))) + rng.randbytes(rng.choice([0, 2, 400]))


def connect(source: bytes) -> StopMessage:
    """A relay has a circuit from this peer."""
    return StopMessage(type=StopMessage.CONNECT, peer=WirePeer(id=source))


def taken(rng: random.Random) -> bytes:
    """The answer of a peer that somebody wants, then bytes on the circuit."""
    status = rng.choice([Status.OK] * 20 + Status.values())
    answer = word(rng, StopMessage(type=StopMessage.STATUS, status=status))
    return answer + rng.randbytes(rng.choice([0, 100, 70_000]))


def punch(rng: random.Random) -> tuple[bytes, int]:
    """What a peer says of where it can be reached, and when to dial; and how many messages that is.

    Few have a public address, for one that has keeps the victim dialling.
    """
    near = ("/ip4/127.0.0.1/tcp/22", "/ip4/192.168.1.1/tcp/80", "/ip6/::1/tcp/22", "/ip4/11.0.3.1/udp/4001/quic-v1")
    texts = rng.choices(near, k=rng.randint(0, 9)) + (["/ip4/11.0.3.1/tcp/4001"] if rng.random() < 0.5 else [])
    named = [Multiaddr(text).to_bytes() for text in texts] + [rng.randbytes(9)] * rng.randint(0, 1)
    first = word(rng, HolePunch(type=rng.choice([HolePunch.CONNECT] * 9 + [HolePunch.SYNC]), ObsAddrs=named))
    second = word(rng, HolePunch(type=rng.choice([HolePunch.SYNC] * 9 + [HolePunch.CONNECT])))
    return first + second, 2


def word(rng: random.Random, message: HopMessage | StopMessage | HolePunch) -> bytes:
    """One message on the wire; of a share the bytes or the length are damaged."""
    raw = message.SerializeToString()
    if rng.random() < RIGHT:
        return bytes(encode_varint_prefixed(raw))
    if rng.random() < 0.5:
        return bytes(encode_varint_prefixed(damaged(rng, raw)))
    return damaged(rng, encode_varint_prefixed(raw))
