"""A signed statement: who says what, to which network, for which purpose, in which order and for how long.

Rules: core. The signature is over b"openagi:" + domain + b":" + the canonical bytes of all fields, so that no
statement made for one purpose or network can be shown as another. The wire form is canonical, so one statement has
one encoding. Sizes are checked first, the signature last (it costs the most): an error here says nothing about the
peer the bytes NAME, only about the peer that SENT them. Replay is the receiver's to refuse, by `sequence`.

Source: SECURITY.md P9, P10; NETWORK.md "Our rules".
"""

from __future__ import annotations

from typing import Annotated, Final, TypedDict, Unpack

from msgspec import Meta, Struct

from crypto.canonical import Limits, convert, decode_canonical, encode
from crypto.errors import BadEncoding, BadSignature, Expired, WrongNetwork
from crypto.identity import KEY_BYTES, SIGNATURE_BYTES, Identity, PeerId, peer_id_of, verify_key

VERSION: Final = 1
ENVELOPE_BYTES_MAX: Final = 4_096  # the most that gossip carries
LIFETIME_MS_MAX: Final = 30 * 86_400_000  # a statement that never ends could never be taken back
SKEW_MS: Final = 60_000  # how far honest clocks may differ (SECURITY.md P10)

_LIMITS: Final = Limits(bytes_max=ENVELOPE_BYTES_MAX, depth_max=1, array_max=9, map_max=0, items_max=9)

_Label = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"\A[a-z0-9][a-z0-9._-]*\Z")]
_U63 = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class Envelope(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An opened envelope: its sender did sign this. Times are Unix milliseconds by the sender's clock."""

    v: int
    domain: str
    network: str
    sender: PeerId
    sequence: int  # 0..2^63-1, grows with every statement of this sender in this domain
    time_ms: int
    expires_ms: int
    body: bytes


class _Wire(Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """The wire form: an array in this order."""

    v: Annotated[int, Meta(ge=0, lt=1 << 16)]
    domain: _Label
    network: _Label
    sender: Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]  # the raw public key
    sequence: _U63
    time_ms: _U63
    expires_ms: _U63
    body: bytes
    signature: Annotated[bytes, Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]


class Statement(TypedDict):
    """What `seal` signs; the fields mean what they mean in Envelope."""

    domain: str
    network: str
    sequence: int
    time_ms: int
    expires_ms: int
    body: bytes


def seal(identity: Identity, **statement: Unpack[Statement]) -> bytes:
    """The signed bytes of a statement. Raises BadEncoding when a field, or the whole, is out of bounds."""
    fields = (
        VERSION,
        statement["domain"],
        statement["network"],
        identity.public_key,
        statement["sequence"],
        statement["time_ms"],
        statement["expires_ms"],
        statement["body"],
    )
    raw = encode((*fields, identity.sign(_signed_bytes(statement["domain"], fields))))
    _parse(raw)
    return raw


def open_envelope(raw: bytes, *, domain: str, network: str, now_ms: int, skew_ms: int = SKEW_MS) -> Envelope:
    """The statement, when its sender signed it for this domain and network and its time is now.

    Raises: BadEncoding, WrongNetwork, Expired (over, or from the future), BadSignature (also: another domain).
    """
    wire = _parse(raw)
    if wire.network != network:
        raise WrongNetwork(f"a statement for network {wire.network!r} came, this is {network!r}")
    if wire.domain != domain:
        raise BadSignature(f"a statement for {wire.domain!r} came where one for {domain!r} was wanted")
    if wire.time_ms > now_ms + skew_ms:
        ahead_s = (wire.time_ms - now_ms) // 1000
        raise Expired(f"made {ahead_s} s in the future; its sender's clock or ours is wrong")
    if wire.expires_ms < now_ms - skew_ms:
        raise Expired(f"expired {(now_ms - wire.expires_ms) // 1000} s ago")
    fields = (wire.v, wire.domain, wire.network, wire.sender, wire.sequence, wire.time_ms, wire.expires_ms, wire.body)
    verify_key(wire.sender, _signed_bytes(domain, fields), wire.signature)
    return Envelope(
        v=wire.v,
        domain=wire.domain,
        network=wire.network,
        sender=peer_id_of(wire.sender),
        sequence=wire.sequence,
        time_ms=wire.time_ms,
        expires_ms=wire.expires_ms,
        body=wire.body,
    )


def time_ms_of(raw: bytes) -> int:
    """When these bytes say that they were made, before anything of them is believed. Raises BadEncoding."""
    return _parse(raw).time_ms


def _signed_bytes(domain: str, fields: tuple[object, ...]) -> bytes:
    return b"openagi:" + domain.encode() + b":" + encode(fields)


def _parse(raw: bytes) -> _Wire:
    wire = convert(decode_canonical(raw, _LIMITS), _Wire)
    if wire.v != VERSION:
        raise BadEncoding(f"an envelope of version {wire.v} came, this node reads {VERSION}")
    if not wire.time_ms < wire.expires_ms <= wire.time_ms + LIFETIME_MS_MAX:
        raise BadEncoding(f"a lifetime of {wire.expires_ms - wire.time_ms} ms came, wanted 1 to {LIFETIME_MS_MAX}")
    return wire
