"""Frames of searches, blobs and direct channels, for tests/test_fuzz_host.py: right ones, then damaged.

Rules: all chance comes from `rng`. OFFERED is a blob that the victim gives, WANTED one that it asks of those who
connect. Asks are damaged as values most of the time, so that they pass the decoder.
"""

from __future__ import annotations

import random
from typing import Any

import msgpack
import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from crypto import canonical
from crypto.digest import digest
from crypto.errors import BadEncoding
from crypto.identity import PeerId
from gossip.blob_wire import (
    BLOB_PROTOCOL,
    BlobAsk,
    RangeAsk,
    Refusal,
    decode_ask,
    here_frame,
    piece_head,
    refusal_frame,
)
from gossip.errors import RemoteProtocolError
from gossip.finding import Find
from gossip.transfer import manifest_of
from node.work import to_wire
from p2p.direct_frames import Agreement, Ask, Choice, Offer, Sealer
from p2p.frame import encode_frame
from tests.fuzz.damage import damaged, odd_value

OFFERED = random.Random(1).randbytes(70_000)
WANTED = random.Random(2).randbytes(1_200_000)  # three chunks
OFFERED_ID, WANTED_ID = (digest(manifest_of(each).encode()) for each in (OFFERED, WANTED))
ASKS_MAX = 12


def find(rng: random.Random) -> list[bytes]:
    """One question."""
    model = rng.choice([None, "tale-3", "tale-7", "nobody has this", "\u03b1" * rng.randint(1, 250)])
    value = to_wire(Find(limit=rng.choice([1, 8, 32]), onward=rng.random() < 0.5)) | {"model": model}
    return [_frame(rng, value, odd=0.2)]


def asks(rng: random.Random) -> list[bytes]:
    """What an opener of a blob's stream says: which one, then ranges of it."""
    blob = rng.choice([OFFERED_ID] * 9 + [WANTED_ID, rng.randbytes(32), b"", b"\0" * 33])
    values: list[Any] = [{"blob": blob, "manifest": rng.random() < 0.5}]
    for _ in range(rng.randint(0, ASKS_MAX)):
        start = rng.randrange(len(OFFERED))
        values.append({"start": start, "length": rng.randint(1, len(OFFERED) - start)})
    if rng.random() < 0.2:
        values.append(rng.choice([{"start": len(OFFERED), "length": 1}, {"start": 2**63, "length": 0}, {}]))
    return [_frame(rng, value, odd=0.05) for value in values]


def taken(frames: list[bytes]) -> int:
    """How many of `asks` the host takes before it ends the stream."""
    for count, frame in enumerate(frames, 1):
        try:
            if count > 1:
                ask = decode_ask(frame[4:], RangeAsk)
                if ask.start + ask.length > len(OFFERED):
                    return count
            elif decode_ask(frame[4:], BlobAsk).blob != OFFERED_ID:
                return count
        except RemoteProtocolError:
            return count
    return len(frames)


def here(rng: random.Random) -> bytes:
    """A donor's first answer: the manifest of what is wanted, or a refusal, or nothing that makes sense."""
    manifest = here_frame(manifest_of(WANTED).encode())
    other = here_frame(manifest_of(OFFERED).encode())
    odd = [other, damaged(rng, manifest), refusal_frame(rng.choice(list(Refusal))), b"", b"\x03", b"\x02nothing"]
    return encode_frame(manifest if rng.random() < 0.7 else rng.choice(odd))


def piece(rng: random.Random, raw: bytes) -> bytes:
    """A donor's answer to this ask of the host's: mostly what is asked for."""
    ask = decode_ask(raw, RangeAsk)
    right = piece_head(ask.start) + WANTED[ask.start : ask.start + ask.length]
    wrong = [piece_head(2**63) + right[9:], right[:9], right[:-1], damaged(rng, right), refusal_frame(Refusal.GONE)]
    return encode_frame(right if rng.random() < 0.7 else rng.choice(wrong))


def offer(rng: random.Random) -> bytes:
    """The answer to the host's wish for a direct channel: none, a port where nobody listens, or no sense."""
    value = {"served": rng.random() < 0.8, "key": rng.randbytes(32), "port": rng.choice([0, 0, 0, 1])}
    return _frame(rng, value, odd=0.3)


def agreement(rng: random.Random) -> list[bytes]:
    """The opener's frames of a direct channel that is never claimed; then those of the blob's protocol."""
    ask = {"protocol": rng.choice([BLOB_PROTOCOL] * 6 + ["", "/x/1", "a" * 65]), "key": rng.randbytes(32)}
    if rng.random() < 0.1:
        ask["key"] = rng.choice([bytes(32), b"\1" + bytes(31), rng.randbytes(31)])  # of small order, too short
    choice = {"direct": rng.random() < 0.2}
    return [_frame(rng, ask, odd=0.1), _frame(rng, choice, odd=0.1), *asks(rng)]


class Claim:
    """An opener that claims its channel: `ask` goes out, `sealed` gives what is said on the channel."""

    def __init__(self, rng: random.Random, opener: PeerId, server: PeerId) -> None:
        self._rng, self._opener, self._server = rng, opener, server
        self._own = X25519PrivateKey.from_private_bytes(rng.randbytes(32))
        self._key = self._own.public_key().public_bytes_raw()
        self.ask = encode_frame(canonical.encode_struct(Ask(protocol=BLOB_PROTOCOL, key=self._key)))
        self.choice = encode_frame(canonical.encode_struct(Choice(direct=True)))
        self.port = 0
        self.token = b""
        self.sealed = b""
        self.count = 0

    def offered(self, raw: bytes) -> None:
        """The server's offer, as it came in its frame."""
        offer = canonical.decode_struct(raw, Offer)
        keys = Agreement(
            opener=self._opener,
            server=self._server,
            protocol=BLOB_PROTOCOL,
            opener_key=self._key,
            server_key=offer.key,
        ).keys(self._own, offer.key)
        self.port, self.token = offer.port, keys.token
        sealer, frames = Sealer(keys.opener), [raw[4:] for raw in asks(self._rng)]
        pieces = [bytes(sealer.seal(frame)) for frame in frames]
        if self._rng.random() < 0.5:
            pieces.append(bytes(sealer.seal(b"", kind=1)))
        if self._rng.random() < 0.6:
            at = self._rng.randrange(len(pieces))
            pieces[at] = damaged(self._rng, pieces[at])
        self.sealed, self.count = b"".join(pieces), len(pieces)


async def knock(rng: random.Random, port: int) -> None:
    """Say what is no token at the direct channel's port, and see the door close."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        try:
            await stream.send_all(rng.randbytes(rng.choice([0, 1, 31, 32, 33, 5000])))
            await stream.send_eof()
            while await stream.receive_some():
                pass
        except trio.BrokenResourceError:
            pass  # closed on what we had not sent yet


def _frame(rng: random.Random, value: Any, odd: float) -> bytes:
    """A value's frame on the wire; of a share the value is odd, of few the bytes are damaged."""
    if rng.random() < odd:
        value = odd_value(rng, value)
    try:
        raw = canonical.encode(value)
    except BadEncoding:
        raw = bytes(msgpack.packb(value))
    return encode_frame(raw if rng.random() < 0.98 else damaged(rng, raw)[:60_000])
