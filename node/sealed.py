"""Sealed requests as they travel between nodes, and what stands inside of one.

Rules: core. crypto/sealing.py seals and opens; here are the call that carries a request, the frames that carry its
answer, and the plain text of both. The plain text of a request is JSON of SealedText, white space after it being
padding: a path of this node's HTTP door and its body. That of an answer is a sealed HTTP answer: SealedHead as JSON in
the first frame, its body in those that follow. An empty frame is a sign of life. Whoever relays sees peer, key, request
id, sizes and times.
"""

from __future__ import annotations

import binascii
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from crypto.sealing import (
    ENC_BYTES,
    FRAME_BYTES_MAX,
    KEY_BYTES,
    KIND_LAST,
    KIND_MORE,
    KIND_SALT,
    REQUEST_ID_BYTES,
    SALT_BYTES,
    SECRET_BYTES,
    TAG_BYTES,
)
from node.errors import BadRequest
from node.work import REMAINING_MS_MAX
from p2p.errors import RemoteProtocolError

SEALED_BYTES_MAX: Final = (
    780_000  # as base64 within the HTTP door's bound on a body, and within a frame of the protocol
)
SEALED_BYTES_MIN: Final = ENC_BYTES + SECRET_BYTES + TAG_BYTES
STATEMENT_BYTES_MAX: Final = 1_024  # a sealing key's statement has about 230
KEEP_ALIVE_S: Final = 10.0  # between signs of life of a serving peer
SILENT_S_MAX: Final = 3 * KEEP_ALIVE_S  # of a serving peer that shows none
KIND_RELAY: Final = 3  # over HTTP only: the relaying node's own error, in clear, as the last frame
BAD_SEAL: Final = "bad_seal"
REPLAYED: Final = "replayed"

RequestId = Annotated[bytes, Meta(min_length=REQUEST_ID_BYTES, max_length=REQUEST_ID_BYTES)]
PublicKey = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Sealed = Annotated[bytes, Meta(min_length=SEALED_BYTES_MIN, max_length=SEALED_BYTES_MAX)]


class SealedCall(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="sealed"):
    """A request that only its peer can read. key: the public one that it is sealed to. sealed: HPKE's encapsulated key
    and ciphertext. remaining_ms: time left to the deadline."""

    request_id: RequestId
    key: PublicKey
    sealed: Sealed
    remaining_ms: Annotated[int, Meta(ge=1, le=REMAINING_MS_MAX)] = 120_000


class KeyStatement(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of a call for a sealing key, and of a sealed call whose key is not the peer's: its present key."""

    statement: Annotated[bytes, Meta(min_length=1, max_length=STATEMENT_BYTES_MAX)]


class SealedText(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request's plain text. private: nothing of it is shared with others, neither KV nor an answer; so by default,
    for it is the relaying node that could find out by asking the same and measuring."""

    path: Annotated[str, Meta(min_length=1, max_length=200)]
    body: msgspec.Raw
    private: bool = True


class SealedHead(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an answer opens with."""

    status: int
    headers: dict[str, str]


def read_text(content: bytes) -> SealedText:
    """What the asker wants. Raises BadRequest; nothing of the text is in its message."""
    try:
        return msgspec.json.decode(content, type=SealedText)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError, UnicodeDecodeError) as exc:
        what = type(exc).__name__
        raise BadRequest(
            f"the sealed text is no JSON object with path, body and, if wanted, private ({what})", param="sealed"
        ) from exc


def check_frame(frame: object) -> bytes:
    """One of a serving peer's frames, as far as it can be judged unopened. Raises RemoteProtocolError."""
    if not isinstance(frame, bytes):
        raise RemoteProtocolError(f"a sealed frame came as {type(frame).__name__}, wanted bytes")
    if not frame:
        return frame
    if frame[0] not in (KIND_SALT, KIND_MORE, KIND_LAST) or len(frame) > FRAME_BYTES_MAX:
        raise RemoteProtocolError(f"a sealed frame of kind {frame[0]} and {len(frame)} bytes came")
    if frame[0] == KIND_SALT and len(frame) != 1 + SALT_BYTES:
        raise RemoteProtocolError(f"a salt of {len(frame) - 1} bytes came, wanted {SALT_BYTES}")
    return frame


def base64_of(text: str, param: str, *, least: int, most: int) -> bytes:
    """The bytes that a client wrote as base64. Raises BadRequest."""
    try:
        raw = binascii.a2b_base64(text.encode("ascii"), strict_mode=True)
    except ValueError as exc:  # binascii.Error and UnicodeEncodeError are such
        raise BadRequest(f"{param} is no base64 (RFC 4648, with padding)", param=param) from exc
    if not least <= len(raw) <= most:
        wanted = str(least) if least == most else f"{least} to {most}"
        raise BadRequest(f"{param} has {len(raw)} bytes, wanted {wanted}", param=param)
    return raw
