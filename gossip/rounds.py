"""What members of a training run tell each other about a round: headers, reports, proposals, votes; manifests, records.

Rules: core. A round is one step of a run's chain: `base` names all that was committed before it, so a statement for
one history counts in no other. Who says it stands in the envelope; a statement is named by the digest of its envelope.
Headers, reports, proposals and votes are gossip; manifests and records travel on streams. Numbers that decide anything
are integers, since every member must compute the same from them. Any bytes give a value or RemoteProtocolError.
Source: TRAINING.md 2, 3; Buchman, Kwon, Milosevic, "The latest gossip on BFT consensus" (arXiv 1807.04938).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Final

from msgspec import Meta, Struct

from crypto.canonical import Limits, convert, decode_canonical, decode_struct, encode_struct
from crypto.digest import DIGEST_BYTES, Digest, digest
from crypto.envelope import open_envelope, seal, time_ms_of
from crypto.errors import BadEncoding, Expired, WrongNetwork
from crypto.identity import PEER_ID_CHARS_MAX, Identity, PeerId
from gossip.errors import RemoteProtocolError

ROUND_DOMAIN: Final = "round"
ANY_TIME_MS: Final = 1 << 62  # a clock to which nothing is of the future
STATEMENT_LIFE_MS: Final = 30 * 86_400_000  # a certificate is shown to joiners long after; `base` is what dates it
MEMBERS_MAX: Final = 64  # contributors, and voters, of one round
VIEWS_MAX: Final = 1 << 16  # by then the time-outs are days long
ROUNDS_MAX: Final = 1 << 40
PAYLOAD_BYTES_MAX: Final = (256 << 20) + 512  # as model/update.py bounds it
TOKENS_MAX: Final = 1 << 40
STEPS_MAX: Final = 1 << 20
WEIGHT_ONE: Final = 1 << 20  # weights and clip factors are parts of it
WEIGHT_MAX: Final = 1 << 40
SCORE_MAX: Final = 1 << 40  # scores are nats a token, in parts of WEIGHT_ONE
MANIFEST_BYTES_MAX: Final = 24_576  # 64 shares and 64 reports, with room
RECORD_BYTES_MAX: Final = 65_536  # a manifest and 64 votes
_MANIFEST: Final = Limits(bytes_max=MANIFEST_BYTES_MAX, array_max=MEMBERS_MAX, items_max=2048)
_RECORD: Final = Limits(bytes_max=RECORD_BYTES_MAX, array_max=MEMBERS_MAX, bin_max=MANIFEST_BYTES_MAX, items_max=256)

Id = Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
Round = Annotated[int, Meta(ge=0, le=ROUNDS_MAX)]
View = Annotated[int, Meta(ge=0, le=VIEWS_MAX)]
Member = Annotated[str, Meta(min_length=1, max_length=PEER_ID_CHARS_MAX)]
Codec = Annotated[str, Meta(pattern=r"^[a-z0-9.]{1,16}$")]
Score = Annotated[int, Meta(ge=-SCORE_MAX, le=SCORE_MAX)]


class Contribution(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a header announces: a ModelUpdate, offered as a blob, whose digest stands for its bytes."""

    blob: Id
    payload_bytes: Annotated[int, Meta(ge=1, le=PAYLOAD_BYTES_MAX)]
    steps: Annotated[int, Meta(ge=1, le=STEPS_MAX)]
    tokens: Annotated[int, Meta(ge=0, le=TOKENS_MAX)]


class Header(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="header"):
    """A member has done its work for a round; without a contribution it is present and sits this round out.

    root: digest of the sender's weights at `base`, when the run compares them in this round. leaves: it will not be
    there in the next round.
    """

    run: Id
    round: Round
    base: Id
    contribution: Contribution | None = None
    root: Id | None = None
    leaves: bool = False


class Held(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A header whose payload a member holds and finds sound. score: what it gains on its own held-out text; None: it
    has none, or could not look."""

    header: Id
    score: Score | None


class Report(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="report"):
    """What a member holds when it closes a round: contributions in `held`, headers of who sits out in `present`.

    held: in the order in which their headers came, by which a copy is told from what it copies.
    """

    run: Id
    round: Round
    base: Id
    held: Annotated[tuple[Held, ...], Meta(max_length=MEMBERS_MAX)] = ()
    present: Annotated[tuple[Id, ...], Meta(max_length=MEMBERS_MAX)] = ()


class Proposal(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="proposal"):
    """The proposer of a view names a manifest, and the reports from which anybody can compute it.

    valid_view: the view in which this manifest had a quorum of prevotes before, -1 when it is new.
    """

    run: Id
    round: Round
    base: Id
    view: View
    valid_view: Annotated[int, Meta(ge=-1, le=VIEWS_MAX)]
    manifest: Id
    reports: Annotated[tuple[Id, ...], Meta(min_length=1, max_length=MEMBERS_MAX)]


class Prevote(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="prevote"):
    """Its sender finds the view's manifest sound and may lock on it; None: not this one, not now."""

    run: Id
    round: Round
    base: Id
    view: View
    manifest: Id | None


class Precommit(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="precommit"):
    """Its sender saw a quorum of prevotes for the manifest; a quorum of these commits it."""

    run: Id
    round: Round
    base: Id
    view: View
    manifest: Id | None


Vote = Prevote | Precommit
Body = Header | Report | Proposal | Prevote | Precommit


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """A body that its sender signed. raw: the envelope, to hand on; id: its digest, by which others name it."""

    sender: PeerId
    body: Body
    raw: bytes
    id: Digest


Sign = Callable[[Body], Statement]


class Share(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One member's part in a round. weight, clip: parts of WEIGHT_ONE; weight 0: it counts not."""

    peer: Member
    header: Id
    blob: Id | None  # None: it sat the round out
    weight: Annotated[int, Meta(ge=0, le=WEIGHT_MAX)] = 0
    clip: Annotated[int, Meta(ge=0, le=WEIGHT_ONE)] = WEIGHT_ONE
    leaves: bool = False


class Manifest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is committed: shares in order of their peers, the reports that led to them, the weights' root if told."""

    run: Id
    round: Round
    base: Id
    shares: Annotated[tuple[Share, ...], Meta(max_length=MEMBERS_MAX)]
    reports: Annotated[tuple[Id, ...], Meta(min_length=1, max_length=MEMBERS_MAX)]
    root: Id | None = None

    @property
    def id(self) -> Digest:
        """Its digest, which is what is voted on."""
        return digest(encode_struct(self))

    @property
    def next_base(self) -> Digest:
        """The name of the history that ends with this manifest."""
        return digest(b"openagi:base:" + self.base + self.id)


class Record(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A committed manifest with its proof: envelopes of precommits for it of one view, by a quorum of the voters."""

    manifest: Annotated[bytes, Meta(max_length=MANIFEST_BYTES_MAX)]
    votes: Annotated[tuple[bytes, ...], Meta(min_length=1, max_length=MEMBERS_MAX)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """A record whose manifest and signatures were read; whether its voters are the right ones is not known yet."""

    manifest: Manifest
    votes: tuple[Statement, ...]

    def encode(self) -> bytes:
        """The wire form."""
        return encode_struct(
            Record(manifest=encode_struct(self.manifest), votes=tuple(vote.raw for vote in self.votes))
        )


def round_topic(network: str) -> str:
    """The topic on which a network's rounds are told."""
    return f"openagi/1/{network}/round"


def body_of(raw: bytes) -> Body:
    """The body of a round's envelope. Raises RemoteProtocolError, and nothing else, for any bytes."""
    try:
        body: Body = decode_struct(raw, Body)  # type: ignore[arg-type]  # a union of tagged structs
    except BadEncoding as exc:
        raise RemoteProtocolError(f"a statement of a round cannot be read: {exc}") from exc
    if fault := _contradiction(body):
        raise RemoteProtocolError(f"a statement of a round contradicts itself: {fault}")
    return body


def manifest_of(raw: bytes) -> Manifest:
    """A manifest, canonical. Raises RemoteProtocolError, and nothing else, for any bytes."""
    try:
        manifest = convert(decode_canonical(raw, _MANIFEST), Manifest)
    except BadEncoding as exc:
        raise RemoteProtocolError(f"a manifest cannot be read: {exc}") from exc
    if encode_struct(manifest) != raw:
        raise RemoteProtocolError("a manifest leaves fields out: it has one encoding, with all of them")
    peers = [share.peer for share in manifest.shares]
    if peers != sorted(set(peers)):
        raise RemoteProtocolError("a manifest names a peer twice, or its peers are not in order")
    for share in manifest.shares:
        if share.blob is None and share.weight:
            raise RemoteProtocolError(f"a manifest gives weight to {share.peer}, who contributed nothing")
    return manifest


def sign_statement(identity: Identity, body: Body, *, network: str, sequence: int, time_ms: int) -> Statement:
    """A body in its envelope."""
    raw = seal(
        identity,
        domain=ROUND_DOMAIN,
        network=network,
        sequence=sequence,
        time_ms=time_ms,
        expires_ms=time_ms + STATEMENT_LIFE_MS,
        body=encode_struct(body),
    )
    return Statement(sender=identity.peer_id, body=body, raw=raw, id=digest(raw))


def open_statement(raw: bytes, *, network: str, now_ms: int) -> Statement:
    """A statement that its sender signed for this network, as gossip brings it.

    Raises: RemoteProtocolError, BadSignature. Neither blames whom the bytes name, only who sent them.
    """
    try:
        envelope = open_envelope(raw, domain=ROUND_DOMAIN, network=network, now_ms=now_ms)
    except (BadEncoding, Expired, WrongNetwork) as exc:
        raise RemoteProtocolError(f"an envelope of a round cannot be opened: {exc}") from exc
    return Statement(sender=envelope.sender, body=body_of(envelope.body), raw=raw, id=digest(raw))


def record_of(raw: bytes, *, network: str, now_ms: int) -> Committed:
    """A record, every signature of it checked; its votes may be of any time but the future.

    Raises: RemoteProtocolError, BadSignature.
    """
    try:
        record = decode_struct(raw, Record, _RECORD)
    except BadEncoding as exc:
        raise RemoteProtocolError(f"a record of a round cannot be read: {exc}") from exc
    votes = tuple(statement_of(envelope, network=network, now_ms=now_ms) for envelope in record.votes)
    return Committed(manifest=manifest_of(record.manifest), votes=votes)


def statement_of(raw: bytes, *, network: str, now_ms: int) -> Statement:
    """A statement made at whatever time but the future: what dates it is the base that it names.

    Raises: RemoteProtocolError, BadSignature.
    """
    try:
        return open_statement(raw, network=network, now_ms=min(now_ms, time_ms_of(raw)))
    except BadEncoding as exc:
        raise RemoteProtocolError(f"a statement that was kept or handed on cannot be read: {exc}") from exc


def recorded_manifest(raw: bytes) -> Manifest:
    """The manifest of a record that was proven before, as our own disk has it. Raises RemoteProtocolError."""
    try:
        return manifest_of(decode_struct(raw, Record, _RECORD).manifest)
    except BadEncoding as exc:
        raise RemoteProtocolError(f"a record of a round cannot be read: {exc}") from exc


def _contradiction(body: Body) -> str:
    """What two fields say against each other; empty when nothing."""
    match body:
        case Header() | Prevote() | Precommit():
            return ""
        case Report():
            ids = [held.header for held in body.held] + list(body.present)
            return "it names a header twice" if len(set(ids)) < len(ids) else ""
        case Proposal():
            if body.valid_view >= body.view:
                return f"view {body.view} cannot follow from view {body.valid_view}"
            return "" if list(body.reports) == sorted(set(body.reports)) else "its reports are not in order, each once"
