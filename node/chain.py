"""The chain of a node's memory: how an event's hash is made, what a signed head says, and what breaks either.

Rules: core. With || for joining bytes and C for canonical msgpack (crypto/canonical.py):

    body_digest = SHA-256("openagi:commitment:" || nonce || C(body))          (crypto/digest.py, Commitment)
    hash        = SHA-256("openagi:memory:" || C([1, prev_hash, id, ts_ms, kind, body_digest]))

nonce is 32 random bytes of the event's own; the first event's prev_hash is 32 zero bytes; ids grow by one. The digest
stands in the chain, not the body, so that a body can be erased and the chain still verifies; the nonce is erased with
it, so that nobody can find out by guessing what the body was. A head is an envelope of this node over
C({id, hash}). Check is fed the rows in order of id and names the first that is wrong:
* after the last `pruned` event's through_id the rows are whole: ids without a gap, each prev_hash the hash before;
* up to it, each row's own hash, and the count and digest of all that are left, as that event says;
* a row without a body is named by a `forgotten` event;
* the row that the signed head names is there, with that hash.
Whoever holds this node's key can write another history; nobody else can. An older copy of the whole file is a true
history that ends early: only a head known elsewhere shows that.
Source: SELF.md, "Memory"; Haber and Stornetta, "How to Time-Stamp a Digital Document" (1991).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from msgspec import Struct

from crypto.canonical import convert, decode_canonical, encode, encode_struct
from crypto.digest import DIGEST_BYTES, Commitment, Digest, digest
from crypto.envelope import open_envelope, seal, time_ms_of
from crypto.errors import BadEncoding, BadSignature, CryptoError
from crypto.identity import Identity, PeerId
from node.events import Count, Forgotten, Hash, Pruned, decode_body

CHAIN_VERSION: Final = 1
FIRST_PREV: Final = bytes(DIGEST_BYTES)
HEAD_DOMAIN: Final = "memory-head"
HEAD_NETWORK: Final = "memory"  # a node's memory stays its own when it moves to another network
HEAD_LIFETIME_MS: Final = 86_400_000  # an envelope must end; a head is judged at the time it was made
_TAG: Final = b"openagi:memory:"


def chain_hash(prev: bytes, event_id: int, ts_ms: int, kind: str, body_digest: bytes) -> Digest:
    """The hash of one event; the formula stands above."""
    return digest(_TAG + encode((CHAIN_VERSION, prev, event_id, ts_ms, kind, body_digest)))


def body_digest(raw: bytes, nonce: bytes) -> Digest:
    """What stands for a body in the chain. nonce: random, of crypto.digest.NONCE_BYTES, used once."""
    return Commitment.to(raw, nonce).value


class Head(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The last event when it was signed."""

    id: Count
    hash: Hash


def sign_head(identity: Identity, head: Head, now_ms: int) -> bytes:
    """The head as a statement of this node."""
    return seal(
        identity,
        domain=HEAD_DOMAIN,
        network=HEAD_NETWORK,
        sequence=head.id,
        time_ms=now_ms,
        expires_ms=now_ms + HEAD_LIFETIME_MS,
        body=encode_struct(head),
    )


def open_head(raw: bytes, peer_id: PeerId) -> Head:
    """The head that this peer signed, however long ago. Raises CryptoError."""
    envelope = open_envelope(raw, domain=HEAD_DOMAIN, network=HEAD_NETWORK, now_ms=time_ms_of(raw))
    if envelope.sender != peer_id:
        raise BadSignature(f"a head that {envelope.sender} signed came, wanted one of {peer_id}")
    head = convert(decode_canonical(envelope.body), Head)
    if head.id != envelope.sequence:
        raise BadEncoding(f"a head of event {head.id} came under sequence {envelope.sequence}")
    return head


@dataclass(frozen=True, slots=True)
class Row:
    """An event as the file has it, in the order of store_check.COLUMNS; nothing of it is believed, types neither."""

    id: Any
    ts_ms: Any
    kind: Any
    subject: Any
    nonce: Any
    body: Any
    body_digest: Any
    prev_hash: Any
    hash: Any
    erased_by: Any


@dataclass(frozen=True, slots=True)
class Fault:
    """The first event that is wrong, and why. id 0: the file as a whole."""

    id: int
    why: str


class Check:
    """One walk over a chain. Feed it every row in order of id, then ask `finish`; the first Fault is the answer."""

    def __init__(self, *, pruned: Pruned | None, forgotten: Mapping[int, Forgotten], head: Head | None) -> None:
        """pruned: the body of the last such event; forgotten: bodies by id. Both are checked on the way."""
        self._through_id = pruned.through_id if pruned else 0
        self._pruned, self._forgotten, self._head = pruned, forgotten, head
        self._kept, self._kept_hashes = 0, hashlib.sha256()
        self._checkpoint_passed = pruned is None
        self._prev = pruned.through_hash if pruned else FIRST_PREV
        self._last_id = self._through_id
        self._head_seen = head is None
        self.rows = 0

    def feed(self, row: Row) -> Fault | None:
        """The next row; None: nothing is wrong so far."""
        self.rows += 1
        match row:
            case Row(
                id=int(event_id), ts_ms=int(ts_ms), kind=str(kind), body_digest=bytes(content),
                prev_hash=bytes(prev), hash=bytes(found),
            ):  # fmt: skip
                pass
            case _:
                return Fault(row.id if isinstance(row.id, int) else 0, "a column does not have its type")
        fault = self._place(event_id, prev, found)
        if fault:
            return fault
        try:
            wanted = chain_hash(prev, event_id, ts_ms, kind, content)
        except BadEncoding as exc:
            return Fault(event_id, f"its fields have no canonical bytes: {exc}")
        if found != wanted:
            return Fault(event_id, f"its hash is {found.hex()[:16]}..., its fields make {wanted.hex()[:16]}...")
        why = self._body(row, event_id, kind, content)
        if why:
            return Fault(event_id, why)
        if self._head is not None and event_id == self._head.id:
            if found != self._head.hash:
                return Fault(event_id, "it is not the event that the signed head names: the history was rewritten")
            self._head_seen = True
        return None

    def _place(self, event_id: int, prev: bytes, found: bytes) -> Fault | None:
        """Whether it stands where it must."""
        if event_id <= self._through_id:
            if event_id < 1:
                return Fault(event_id, "ids begin at 1")
            self._kept += 1
            self._kept_hashes.update(found)
            return None
        fault = self._checkpoint()
        if fault:
            return fault
        if event_id != self._last_id + 1:
            return Fault(self._last_id + 1, f"it is missing: event {event_id} comes after {self._last_id}")
        if prev != self._prev:
            return Fault(event_id, "its prev_hash is not the hash of the event before it")
        self._prev, self._last_id = found, event_id
        return None

    def _checkpoint(self) -> Fault | None:
        """Once, when the rows up to through_id have all come."""
        if self._checkpoint_passed or self._pruned is None:
            return None
        self._checkpoint_passed = True
        if self._kept != self._pruned.kept_count or self._kept_hashes.digest() != self._pruned.kept_digest:
            return Fault(
                self._through_id,
                f"{self._kept} events are left up to here; they are not the {self._pruned.kept_count} that the "
                "checkpoint names: one was removed, added or rewritten",
            )
        return None

    def _body(self, row: Row, event_id: int, kind: str, content: bytes) -> str:
        """What is wrong with its body; empty when nothing is."""
        if row.body is None:
            by = self._forgotten.get(row.erased_by) if isinstance(row.erased_by, int) else None
            if by is None or not any(first <= event_id <= last for first, last in by.ranges):
                return "its body is gone and no forgotten event names it"
            if (row.nonce, row.subject) != (None, None):
                return "it was forgotten, and its nonce or subject is still there"
            return ""
        if row.erased_by is not None:
            return "it has a body and says that it was forgotten"
        if not isinstance(row.body, bytes) or not isinstance(row.nonce, bytes):
            return "its body or nonce does not have its type"
        if not Commitment(Digest(content)).opens_to(row.body, row.nonce):
            return "its body or nonce is not what was written: they do not make its body_digest"
        try:
            body = decode_body(kind, row.body)
        except BadEncoding as exc:
            return f"its body is no {kind}: {exc}"
        if (row.subject or "") != body.subject:
            return "its subject is not its body's"
        return ""

    def finish(self) -> Fault | None:
        """After the last row."""
        fault = self._checkpoint()
        if fault:
            return fault
        if not self._head_seen and self._head is not None:
            return Fault(
                self._last_id + 1,
                f"the signed head names event {self._head.id} and the last one here is {self._last_id}: "
                "the end was cut off",
            )
        return None


def head_or_none(raw: bytes, peer_id: PeerId) -> Head | None:
    """The head when these bytes are one of this peer's, else None: what a damaged file may still tell."""
    try:
        return open_head(raw, peer_id)
    except CryptoError:
        return None
