"""The address book as bytes for the disk.

Rules: pure; times are unix seconds there. What cannot be read whole is refused whole.
"""

from __future__ import annotations

import msgspec

from crypto.identity import PeerId
from p2p.address import Address, parse_address
from p2p.errors import BadAddress, BadFile

BOOK_BYTES_MAX = 16 << 20  # a full book: 4096 peers x 16 addresses x 250 bytes


class SavedAddress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One address, how it was learned, since when it is known and when it worked last."""

    addr: str
    source: str
    added: float
    succeeded: float | None


class _Saved(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    anchors: list[PeerId]
    addresses: list[SavedAddress]


def encode_book(anchors: list[PeerId], addresses: list[SavedAddress]) -> bytes:
    """The file's content."""
    return msgspec.json.encode(_Saved(version=1, anchors=anchors, addresses=addresses))


def decode_book(raw: bytes, sources: frozenset[str]) -> tuple[list[PeerId], list[tuple[Address, SavedAddress]]]:
    """Anchors and addresses; `sources`: the words that may stand there. Raises BadFile."""
    if len(raw) > BOOK_BYTES_MAX:
        raise BadFile(f"an address book of {len(raw)} bytes; at most {BOOK_BYTES_MAX}")
    try:
        saved = msgspec.json.decode(raw, type=_Saved)
        if saved.version != 1:
            raise BadFile(f"an address book of version {saved.version}; this node reads version 1")
        if unknown := {row.source for row in saved.addresses} - sources:
            raise BadFile(f"not an address book: {sorted(unknown)[0]!r} is no source of addresses")
        return saved.anchors, [(parse_address(row.addr), row) for row in saved.addresses]
    except (msgspec.DecodeError, BadAddress, UnicodeDecodeError) as exc:
        raise BadFile(f"not an address book: {exc}") from exc
