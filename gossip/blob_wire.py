"""What /openagi/blob/1 says: which blob, which range of it, and the three answers there are.

Rules: core. The opener names a blob and then asks for ranges of it, each of at most CHUNK_BYTES_MAX; the server answers
in the order of the asks. A blob is named by its digest and by nothing else. Any bytes decode to a value or to
RemoteProtocolError.
Source: BEP 3 (request and piece); RFC 9110 section 14 (ranges).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final, TypeVar

from msgspec import Meta, Struct

from crypto.canonical import Limits, decode_struct, encode_struct
from crypto.digest import DIGEST_BYTES
from crypto.errors import BadEncoding
from gossip.errors import RemoteProtocolError
from gossip.transfer import BLOB_BYTES_MAX, CHUNK_BYTES_MAX, Manifest

BLOB_PROTOCOL: Final = "/openagi/blob/1"
KIND_MANIFEST: Final = 0
KIND_PIECE: Final = 1
KIND_REFUSAL: Final = 2
HEAD_BYTES: Final = 9  # of a piece: its kind, then where it begins in the blob in 8 bytes, big endian
_LIMITS: Final = Limits(bytes_max=256, items_max=8, array_max=0, depth_max=1)  # of an ask
_Message = TypeVar("_Message", bound=Struct)


class BlobAsk(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The opener's first frame: which blob. manifest: whether it has to be sent; else the answer says only "here"."""

    blob: Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
    manifest: bool


class RangeAsk(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Every other frame of the opener: `length` bytes of the blob from `start`."""

    start: Annotated[int, Meta(ge=0, le=BLOB_BYTES_MAX)]
    length: Annotated[int, Meta(ge=1, le=CHUNK_BYTES_MAX)]


class Refusal(StrEnum):
    """Why the server ends the stream. After BUSY the opener may come again."""

    UNKNOWN = "unknown"  # it does not offer that blob
    BUSY = "busy"  # it serves as many as it will, to this peer or in all
    GONE = "gone"  # the file is not any more what was offered


@dataclass(frozen=True, slots=True)
class Here:
    """The server has the blob; `manifest` is empty when it was not asked for. Not compared yet."""

    manifest: bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of the blob from `start`. Not compared yet."""

    start: int
    content: memoryview


def within(ask: RangeAsk, manifest: Manifest) -> bool:
    """Whether the blob has such a range."""
    return ask.start + ask.length <= manifest.blob_bytes


def piece_head(start: int) -> bytes:
    """What stands before the bytes of a piece."""
    return bytes([KIND_PIECE]) + start.to_bytes(HEAD_BYTES - 1, "big")


def here_frame(manifest: bytes) -> bytes:
    """The answer to a BlobAsk."""
    return bytes([KIND_MANIFEST]) + manifest


def refusal_frame(refusal: Refusal) -> bytes:
    """The last frame of a server that goes no further."""
    return bytes([KIND_REFUSAL]) + refusal.encode()


def ask_frame(ask: BlobAsk | RangeAsk) -> bytes:
    """An opener's frame."""
    return encode_struct(ask)


def decode_ask(raw: bytes, kind: type[_Message]) -> _Message:
    """An opener's frame. Raises RemoteProtocolError."""
    try:
        return decode_struct(raw, kind, _LIMITS)
    except BadEncoding as exc:
        raise RemoteProtocolError(f"not an ask of {BLOB_PROTOCOL}: {exc}") from exc


def decode_answer(raw: bytes) -> Here | Piece | Refusal:
    """A server's frame. Raises RemoteProtocolError."""
    kind = raw[0] if raw else -1
    if kind == KIND_MANIFEST:
        return Here(raw[1:])
    if kind == KIND_PIECE and len(raw) >= HEAD_BYTES:
        return Piece(int.from_bytes(raw[1:HEAD_BYTES], "big"), memoryview(raw)[HEAD_BYTES:])
    if kind == KIND_REFUSAL:
        for refusal in Refusal:
            if raw[1:] == refusal.encode():
                return refusal
    raise RemoteProtocolError(f"{len(raw)} bytes that begin with {bytes(raw[:16])!r} are no answer of {BLOB_PROTOCOL}")
