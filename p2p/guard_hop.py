"""The words of circuit relay v2 and of hole punching: one bounded message at a time, within AGREE_S.

Rules: a message that is too long or does not decode is the peer's fault. No bytes beyond the message are taken.
Source: libp2p specs, relay/circuit-v2.md (wire format).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import trio
from google.protobuf.message import DecodeError
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Status, StopMessage
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from libp2p.utils.varint import encode_varint_prefixed

from crypto.errors import BadKey
from crypto.identity import PeerId, public_key_of
from p2p.errors import RemoteProtocolError, StreamClosed, Unreachable
from p2p.guard_circuit import ByteStream
from p2p.guard_noise import HANDSHAKE

MESSAGE_BYTES_MAX = 4096  # ours have under 1,000
AGREE_S = 5.0  # for the few words before a circuit is open, on each of the two streams
_SENTENCES: dict[str, str] = {
    "PERMISSION_DENIED": "it does not relay for us",
    "RESERVATION_REFUSED": "it has no place left",
    "RESOURCE_LIMIT_EXCEEDED": "it carries as much as it will",
    "NO_RESERVATION": "that peer holds no place there now",
    "CONNECTION_FAILED": "it could not reach that peer",
}
_Message = TypeVar("_Message", HopMessage, StopMessage, HolePunch)


@asynccontextmanager
async def ended(stream: ByteStream) -> AsyncIterator[ByteStream]:
    """A stream that is reset when the block is left, and closed in order before."""
    try:
        yield stream
        await stream.close()
    finally:
        await stream.reset()


@contextmanager
def mapped(what: str) -> Iterator[None]:
    """libp2p's errors, a broken handshake or stream, and a peer that says nothing, as Unreachable."""
    try:
        yield
    except trio.TooSlowError as exc:
        raise Unreachable(f"{what}: it said nothing for {AGREE_S:g} s") from exc
    except (BaseLibp2pError, StreamClosed, RemoteProtocolError, *HANDSHAKE) as exc:
        raise Unreachable(f"{what}: {str(exc) or type(exc).__name__}") from exc


async def write(stream: ByteStream, message: HopMessage | StopMessage | HolePunch) -> None:
    """Raises Unreachable, TooSlowError."""
    with trio.fail_after(AGREE_S):
        await stream.write(encode_varint_prefixed(message.SerializeToString()))


async def read(stream: ByteStream, kind: type[_Message]) -> _Message:
    """One message. Raises Unreachable, StreamClosed, RemoteProtocolError, TooSlowError."""
    with trio.fail_after(AGREE_S):
        size = shift = 0
        while True:
            byte = (await stream.read(1))[0]
            size |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                break
            if shift > 14:
                raise RemoteProtocolError("a relay message whose length has over two bytes")
        if size > MESSAGE_BYTES_MAX:
            raise RemoteProtocolError(f"a relay message of {size} bytes; at most {MESSAGE_BYTES_MAX}")
        message = kind()
        try:
            message.ParseFromString(await stream.read(size) if size else b"")
        except DecodeError as exc:
            raise RemoteProtocolError("a relay message that does not decode") from exc
        return message


def status_answer(status: Any) -> HopMessage:
    return HopMessage(type=HopMessage.STATUS, status=status)


def sentence(status: Any) -> str:
    name = Status.Name(status) if status in Status.values() else f"status {status}"
    return _SENTENCES.get(name, name)


def wire_id(peer: PeerId) -> bytes:
    return bytes(ID.from_base58(peer).to_bytes())


def peer_of(raw: bytes) -> PeerId | None:
    """The peer whose id these bytes are; None when they are not an Ed25519 peer's."""
    peer = PeerId(ID(raw).to_base58())
    try:
        public_key_of(peer)
    except BadKey:
        return None
    return peer
