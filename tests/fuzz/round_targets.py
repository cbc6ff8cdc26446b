"""Targets: what members of a training run tell each other. Statements of a round, manifests, records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from crypto import canonical
from crypto.canonical import Limits
from crypto.digest import digest
from crypto.errors import BadSignature
from crypto.identity import Identity
from gossip.errors import RemoteProtocolError
from gossip.rounds import (
    Body,
    Committed,
    Contribution,
    Header,
    Held,
    Manifest,
    Precommit,
    Prevote,
    Proposal,
    Report,
    Share,
    body_of,
    manifest_of,
    record_of,
    sign_statement,
)
from tests.fuzz.target import Target

IDENTITY: Final = Identity(bytes(range(32)))
NOW_MS: Final = 1_800_000_000_000
ONE, TWO = sorted((digest(b"one"), digest(b"two")))
BODIES: Final[tuple[Body, ...]] = (
    Header(
        run=ONE, round=3, base=TWO, contribution=Contribution(blob=ONE, payload_bytes=522_000, steps=5, tokens=10_000)
    ),
    Report(run=ONE, round=3, base=TWO, held=(Held(header=ONE, score=-7),), present=(TWO,)),
    Proposal(run=ONE, round=3, base=TWO, view=2, valid_view=1, manifest=ONE, reports=(ONE, TWO)),
    Prevote(run=ONE, round=3, base=TWO, view=2, manifest=None),
    Precommit(run=ONE, round=3, base=TWO, view=2, manifest=ONE),
)
MANIFEST: Final = Manifest(
    run=ONE,
    round=3,
    base=TWO,
    shares=(Share(peer=IDENTITY.peer_id, header=ONE, blob=TWO, weight=1 << 20),),
    reports=(ONE, TWO),
    root=TWO,
)


def statement() -> Target:
    def read(raw: bytes) -> None:
        body = body_of(raw)
        assert body_of(canonical.encode_struct(body)) == body

    values = tuple(canonical.decode(canonical.encode_struct(body)) for body in BODIES)
    return Target(read=read, errors=(RemoteProtocolError,), values=values)


def manifest() -> Target:
    def read(raw: bytes) -> None:
        found = manifest_of(raw)
        assert canonical.encode_struct(found) == raw
        assert found.id == digest(raw)

    return Target(
        read=read,
        errors=(RemoteProtocolError,),
        values=(canonical.decode(canonical.encode_struct(MANIFEST)),),
    )


def record() -> Target:
    vote = sign_statement(IDENTITY, BODIES[-1], network="main", sequence=1, time_ms=NOW_MS)

    def read(raw: bytes) -> None:
        found = record_of(raw, network="main", now_ms=NOW_MS)
        assert {each.sender for each in found.votes} == {IDENTITY.peer_id}, "somebody else signs"

    right = Committed(manifest=MANIFEST, votes=(vote,)).encode()
    return Target(
        read=read,
        errors=(RemoteProtocolError, BadSignature),
        seeds=(right,),
        values=(canonical.decode(right, Limits(bin_max=1 << 16)),),
    )


TARGETS: Final[Mapping[str, Callable[[], Target]]] = {
    "round_statement": statement,
    "round_manifest": manifest,
    "round_record": record,
}
