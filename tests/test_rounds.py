"""gossip/rounds.py: the wire form of a run's statements, manifests and records, and what it refuses."""

from __future__ import annotations

import pytest

from crypto.canonical import Limits, decode, encode, encode_struct
from crypto.digest import digest
from crypto.envelope import ENVELOPE_BYTES_MAX, seal
from crypto.errors import BadSignature
from crypto.identity import Identity, PeerId
from gossip.errors import RemoteProtocolError
from gossip.messages import ENVELOPE_BYTES
from gossip.rounds import (
    MANIFEST_BYTES_MAX,
    MEMBERS_MAX,
    PAYLOAD_BYTES_MAX,
    RECORD_BYTES_MAX,
    ROUND_DOMAIN,
    ROUNDS_MAX,
    SCORE_MAX,
    STATEMENT_LIFE_MS,
    STEPS_MAX,
    TOKENS_MAX,
    VIEWS_MAX,
    WEIGHT_MAX,
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
    Statement,
    body_of,
    manifest_of,
    open_statement,
    record_of,
    sign_statement,
)

RUN, BASE = digest(b"run"), digest(b"base")
PLACE = {"run": RUN, "round": ROUNDS_MAX, "base": BASE}
NAMES = [Identity(digest(b"%d" % number)).peer_id for number in range(MEMBERS_MAX)]
IDS = sorted(digest(b"id %d" % number) for number in range(MEMBERS_MAX))
HEADER = Header(
    **PLACE,
    contribution=Contribution(blob=BASE, payload_bytes=PAYLOAD_BYTES_MAX, steps=STEPS_MAX, tokens=TOKENS_MAX),
    root=BASE,
    leaves=True,
)
REPORT = Report(**PLACE, held=tuple(Held(header=each, score=-SCORE_MAX) for each in IDS))
PROPOSAL = Proposal(**PLACE, view=VIEWS_MAX, valid_view=VIEWS_MAX - 1, manifest=BASE, reports=tuple(IDS))
VOTES = (Prevote(**PLACE, view=1, manifest=None), Precommit(**PLACE, view=1, manifest=BASE))
BODIES: tuple[Body, ...] = (HEADER, Header(**PLACE), REPORT, PROPOSAL, *VOTES)
MANIFEST = Manifest(
    **PLACE,
    shares=tuple(Share(peer=peer, header=BASE, blob=BASE, weight=WEIGHT_MAX, leaves=True) for peer in sorted(NAMES)),
    reports=tuple(IDS),
    root=BASE,
)
NOW_MS = 1_800_000_000_000


def statement(body: Body, identity: Identity | None = None, *, time_ms: int = NOW_MS) -> Statement:
    return sign_statement(identity or Identity(bytes(32)), body, network="main", sequence=5, time_ms=time_ms)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: type(body).__name__)
def test_the_largest_of_each_kind_comes_back_and_fits_gossip(body: Body) -> None:
    raw = encode_struct(body)
    assert body_of(raw) == body
    assert len(raw) + ENVELOPE_BYTES <= ENVELOPE_BYTES_MAX
    made = statement(body)
    assert open_statement(made.raw, network="main", now_ms=NOW_MS) == made
    assert made.id == digest(made.raw)


def test_the_largest_manifest_and_record_come_back() -> None:
    raw = encode_struct(MANIFEST)
    assert manifest_of(raw) == MANIFEST
    assert len(raw) <= MANIFEST_BYTES_MAX
    votes = tuple(statement(VOTES[1], Identity(digest(b"%d" % number))) for number in range(MEMBERS_MAX))
    record = Committed(manifest=MANIFEST, votes=votes).encode()
    assert len(record) <= RECORD_BYTES_MAX
    late_ms = NOW_MS + 100 * STATEMENT_LIFE_MS
    assert record_of(record, network="main", now_ms=late_ms) == Committed(manifest=MANIFEST, votes=votes)


def test_gossip_that_is_over_is_refused_and_a_record_is_not() -> None:
    made = statement(VOTES[1])
    with pytest.raises(RemoteProtocolError, match="expired"):
        open_statement(made.raw, network="main", now_ms=NOW_MS + 2 * STATEMENT_LIFE_MS)
    future = statement(VOTES[1], time_ms=NOW_MS + 3_600_000)
    with pytest.raises(RemoteProtocolError, match="future"):
        record_of(Committed(manifest=MANIFEST, votes=(future,)).encode(), network="main", now_ms=NOW_MS)


def test_a_vote_in_a_record_must_be_signed_by_whom_it_names() -> None:
    good = statement(VOTES[1])
    fields = decode(good.raw)
    fields[3] = Identity(digest(b"other")).public_key
    bad = Statement(sender=good.sender, body=good.body, raw=encode(fields), id=good.id)
    with pytest.raises(BadSignature):
        record_of(Committed(manifest=MANIFEST, votes=(bad,)).encode(), network="main", now_ms=NOW_MS)


def test_a_statement_of_another_purpose_or_network_is_none_of_a_round() -> None:
    raw = encode_struct(VOTES[0])
    for domain, network in (("advert", "main"), (ROUND_DOMAIN, "other")):
        sealed = seal(
            Identity(bytes(32)),
            domain=domain,
            network=network,
            sequence=1,
            time_ms=NOW_MS,
            expires_ms=NOW_MS + 1000,
            body=raw,
        )
        with pytest.raises((RemoteProtocolError, BadSignature)):
            open_statement(sealed, network="main", now_ms=NOW_MS)


def wrong_bodies() -> list[tuple[str, dict[str, object]]]:
    header, report, proposal, vote = (decode(encode_struct(each)) for each in (HEADER, REPORT, PROPOSAL, VOTES[1]))
    contribution = header["contribution"]
    held = report["held"]
    return [
        ("unknown field", header | {"more": 1}),
        ("another kind", header | {"type": "coup"}),
        ("short run", header | {"run": RUN[:31]}),
        ("a text for bytes", header | {"base": "b" * 32}),
        ("negative round", header | {"round": -1}),
        ("round too high", header | {"round": ROUNDS_MAX + 1}),
        ("float round", header | {"round": 1.0}),
        ("no bytes", header | {"contribution": contribution | {"payload_bytes": 0}}),
        ("too many bytes", header | {"contribution": contribution | {"payload_bytes": PAYLOAD_BYTES_MAX + 1}}),
        ("no steps", header | {"contribution": contribution | {"steps": 0}}),
        ("claimed tokens", header | {"contribution": contribution | {"tokens": TOKENS_MAX + 1}}),
        ("one header twice", report | {"held": [held[0], held[0]]}),
        ("held and present", report | {"held": [held[0]], "present": [held[0]["header"]]}),
        ("too many held", report | {"held": [*held, {"header": BASE, "score": 0}]}),
        ("score too high", report | {"held": [held[0] | {"score": SCORE_MAX + 1}]}),
        ("no reports", proposal | {"reports": []}),
        ("unsorted reports", proposal | {"reports": [IDS[1], IDS[0]]}),
        ("one report twice", proposal | {"reports": [IDS[0], IDS[0]]}),
        ("from its own view", proposal | {"valid_view": VIEWS_MAX}),
        ("view too high", vote | {"view": VIEWS_MAX + 1}),
        ("short manifest", vote | {"manifest": b""}),
    ]


@pytest.mark.parametrize(("fields"), [fields for _, fields in wrong_bodies()], ids=[name for name, _ in wrong_bodies()])
def test_a_body_out_of_bounds_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(RemoteProtocolError):
        body_of(encode(fields))


def wrong_manifests() -> list[tuple[str, dict[str, object]]]:
    good = decode(encode_struct(MANIFEST), Limits(items_max=4096))
    shares = good["shares"]
    return [
        ("out of order", good | {"shares": [shares[1], shares[0]]}),
        ("twice", good | {"shares": [shares[0], shares[0]]}),
        ("weight for nothing", good | {"shares": [shares[0] | {"blob": None}]}),
        ("weight too high", good | {"shares": [shares[0] | {"weight": WEIGHT_MAX + 1}]}),
        ("clip above one", good | {"shares": [shares[0] | {"clip": (1 << 20) + 1}]}),
        ("no reports", good | {"reports": []}),
        ("a nameless peer", good | {"shares": [shares[0] | {"peer": ""}]}),
    ]


@pytest.mark.parametrize(
    "fields", [fields for _, fields in wrong_manifests()], ids=[name for name, _ in wrong_manifests()]
)
def test_a_manifest_out_of_bounds_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(RemoteProtocolError):
        manifest_of(encode(fields))


def test_a_manifest_has_one_encoding_and_one_digest() -> None:
    raw = encode_struct(MANIFEST)
    with pytest.raises(RemoteProtocolError):
        manifest_of(raw.replace(b"\xa4base", b"\xd9\x04base"))
    without_root = {name: value for name, value in decode(raw, Limits(items_max=4096)).items() if name != "root"}
    with pytest.raises(RemoteProtocolError, match="leaves fields out"):
        manifest_of(encode(without_root))
    assert MANIFEST.id == digest(raw)
    assert MANIFEST.next_base != MANIFEST.id
    assert PeerId(MANIFEST.shares[0].peer) in NAMES
