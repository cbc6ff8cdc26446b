"""Targets: what comes sealed: statements of keys, requests, their plain text, the frames of answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from crypto.canonical import decode
from crypto.errors import BadEncoding, BadSeal, BadSignature, Expired, UnknownSealingKey, WrongNetwork
from crypto.identity import Identity
from crypto.sealing import AnswerOpener, AnswerSealer, Context, read_key, seal_request, sign_key
from crypto.sealing_keys import SealingKeys
from node.errors import BadRequest
from node.sealed import SealedCall, read_text
from node.work import from_wire, to_wire
from p2p.errors import RemoteProtocolError
from tests.fuzz.target import Target, jsoned

IDENTITY: Final = Identity(bytes(range(32)))
PRIVATE: Final = X25519PrivateKey.from_private_bytes(b"\x01" * 32)
PUBLIC: Final = PRIVATE.public_key().public_bytes_raw()
SECRET, REQUEST_ID = b"s" * 32, b"i" * 16
CONTEXT: Final = Context(network="main", peer=IDENTITY.peer_id, request_id=REQUEST_ID)
NOW_MS: Final = 1_800_000_000_000


def sealing_statement() -> Target:
    right = sign_key(IDENTITY, PUBLIC, network="main", time_ms=NOW_MS, expires_ms=NOW_MS + 1_000)

    def read(raw: bytes) -> None:
        assert read_key(raw, peer=IDENTITY.peer_id, network="main", now_ms=NOW_MS).public == PUBLIC
        assert raw == right, "nobody else can make one"

    return Target(read=read, errors=(BadEncoding, BadSignature, Expired, WrongNetwork), seeds=(right,))


def sealed_call() -> Target:
    """From the frame's body to the plain text."""
    sealed = seal_request(b"a prompt", public=PUBLIC, secret=SECRET, context=CONTEXT)
    right = to_wire(SealedCall(request_id=REQUEST_ID, key=PUBLIC, sealed=sealed))

    def read(raw: bytes) -> None:
        call = from_wire(decode(raw), SealedCall)
        keys = SealingKeys(IDENTITY, "main", 0.0, make=lambda: PRIVATE)
        opened = keys.open(call.sealed, public=call.key, request_id=call.request_id, now=0.0)
        assert (opened.secret, opened.content) == (SECRET, b"a prompt")

    errors = (BadEncoding, RemoteProtocolError, BadSeal, UnknownSealingKey)
    return Target(read=read, errors=errors, values=(right,))


def sealed_text() -> Target:
    values = ({"path": "/v1/completions", "body": {"prompt": "a"}, "private": False}, {"path": "/x", "body": [1, 2]})
    return Target(read=read_text, errors=(BadRequest,), values=values, pack=jsoned)


def sealed_frames() -> Target:
    """An answer, each frame after its length in 2 bytes."""
    sealer = AnswerSealer(SECRET, b"t" * 32, CONTEXT)
    contents = [b"head", b"body", b""]
    frames = [sealer.opening(), *(sealer.seal(one, is_last=not one) for one in contents)]
    right = b"".join(len(frame).to_bytes(2, "big") + frame for frame in frames)

    def read(raw: bytes) -> None:
        opener, at, got = AnswerOpener(SECRET, CONTEXT), 0, []
        while at < len(raw):
            size = int.from_bytes(raw[at : at + 2], "big")
            got.append(opener.open(raw[at + 2 : at + 2 + size]))
            at += 2 + size
        assert got == [b"", *contents][: len(got)], "nobody else can make one"

    return Target(read=read, errors=(BadSeal,), seeds=(right,))


TARGETS: Final[Mapping[str, Callable[[], Target]]] = {
    "sealing_statement": sealing_statement,
    "sealed_call": sealed_call,
    "sealed_text": sealed_text,
    "sealed_frames": sealed_frames,
}
