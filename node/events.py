"""What can happen to a node: the kinds of event of its memory, their bounds, bytes and searchable text.

Rules: core. An event is a time and a body; the body's type is its kind. Bodies are frozen and decoded strictly: an
unknown field, a name out of bounds or bytes that are not canonical are refused, since the bytes are what the chain
hashes (node/chain.py). Text of people stands in `text` alone, and is absent unless the operator opted in. `subject` is
what can be forgotten by name: a conversation, an account, a peer. Figures are numbers with a name, so that a kind
can be condensed to hours without knowing its fields.
Source: SELF.md, "Memory"; crypto/canonical.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Final

from msgspec import Meta, Struct, to_builtins

from crypto.canonical import Limits, convert, decode_canonical, encode_struct
from crypto.digest import DIGEST_BYTES
from crypto.errors import BadEncoding

BODY_BYTES_MAX: Final = 65_536  # of one event; a text of TEXT_CHARS_MAX fits whatever its script
TEXT_CHARS_MAX: Final = 12_000  # of a note or an opted-in text: some 3,000 tokens, what a recall can show
FIGURES_MAX: Final = 64  # of one event; the state vector has about 30
WORDS_MAX: Final = 64
FORGET_ROWS_MAX: Final = 1_000  # ids that one `forgotten` vouches for; more are more events
HOUR_MS: Final = 3_600_000
LIMITS: Final = Limits(bytes_max=BODY_BYTES_MAX, depth_max=4)

Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"\A[a-z0-9][a-z0-9_.-]*\Z")]
Word = Annotated[str, Meta(max_length=256)]
Subject = Annotated[str, Meta(max_length=128)]
Text = Annotated[str, Meta(max_length=TEXT_CHARS_MAX)]
Count = Annotated[int, Meta(ge=0, le=(1 << 53) - 1)]  # exact in every language's numbers
Hash = Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
Figures = Annotated[dict[Name, float], Meta(max_length=FIGURES_MAX)]
Words = Annotated[dict[Name, Word], Meta(max_length=WORDS_MAX)]
Counts = Annotated[dict[Name, Count], Meta(max_length=WORDS_MAX)]


class Body(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every kind has. subject: what it can be forgotten by; empty when there is nothing to forget it by."""

    subject: Subject = ""


class State(Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The node's own state at a time: numbers with their unit in the name, and words (revision, last stop)."""

    figures: Figures
    words: Words = {}  # msgspec copies an empty default


class Prediction(Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the node expects of its next period, before that period."""

    from_ms: Count
    to_ms: Count
    figures: Figures


class Outcome(Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What came of a prediction. prediction: its id; figures: what was measured; errors: measured - predicted."""

    prediction: Count
    figures: Figures
    errors: Figures


class Inference(Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One request: metadata only. text: the operator opted in, else None. served_by: a peer id; empty: this node."""

    model: Word
    revision: Word
    prompt_tokens: Count
    answer_tokens: Count
    duration_ms: Count
    outcome: Name  # "ok", or the code of a RequestError
    served_by: Word = ""
    text: Text | None = None


class Merge(Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a round did to the model. Losses are nats a token, held out; None: not measured."""

    run: Word
    round: Count
    loss_before: float | None
    loss_after: float | None
    accepted: Count
    rejected: Counts  # why -> how many


class Peer(Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was seen of a peer, here. happened: joined, left, failed, banned, ..."""

    peer: Word
    happened: Name
    rtt_ms: float | None = None
    text: Text = ""


class Note(Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the operator, or a tool that they allowed, wants remembered."""

    text: Text


class Start(Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The node began. last_stop: how the run before ended, see node.memory_events.last_stop_of."""

    boot: Count
    version: Word
    model: Word
    last_stop: Name


class Stop(Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The node ended in order."""

    reason: Word
    uptime_s: float


class Lost(Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What this chain does not have: events that could not be written, or a whole file that was moved aside."""

    reason: Word
    since_ms: Count
    counts: Counts  # kind -> how many were not written
    file: Word = ""  # the old file's name now
    head_id: Count | None = None  # what the old file's last signed head says; None: it could not be read
    head_hash: Hash | None = None


class Summary(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One figure over an hour."""

    count: Count
    mean: float
    least: float
    most: float


class Hour(Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is left of the events of one kind and hour once they are pruned. An hour may have several parts."""

    kind: Name
    from_ms: Count
    count: Count
    figures: Annotated[dict[Name, Summary], Meta(max_length=FIGURES_MAX)]
    codes: Counts  # outcome or happening -> how many


class Forgotten(Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Vouches that these events' bodies were erased by the operator. It does not say by which subject."""

    ranges: Annotated[list[tuple[Count, Count]], Meta(max_length=FORGET_ROWS_MAX)]  # first id, last id


class Pruned(Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A checkpoint: up to `through_id` only some events are left, and these are they."""

    through_id: Count
    through_hash: Hash  # the chain hash of that event: what the next one's prev_hash must be
    kept_count: Count
    kept_digest: Hash  # SHA-256 of the hashes of the events left up to there, in order
    removed: Counts  # kind -> how many went this time


KINDS: Final[dict[str, type[Body]]] = {
    kind.__name__.lower(): kind
    for kind in (State, Prediction, Outcome, Inference, Merge, Peer, Note, Start, Stop, Lost, Hour, Forgotten, Pruned)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened, and when (Unix milliseconds by this node's clock)."""

    ts_ms: int
    body: Body

    @property
    def kind(self) -> str:
        """The word for its type."""
        return type(self.body).__name__.lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """An event as it stands in memory. body is None once it was forgotten."""

    id: int
    ts_ms: int
    kind: str
    body: Body | None
    hash: bytes


def encode_body(body: Body) -> bytes:
    """Its canonical bytes. Raises BadEncoding when it is out of bounds: a bug of whoever made it."""
    raw = encode_struct(body)
    decode_body(type(body).__name__.lower(), raw)
    return raw


def decode_body(kind: str, raw: bytes) -> Body:
    """The body that these bytes stand for. Raises BadEncoding, and nothing else, for any kind and bytes."""
    if kind not in KINDS:
        raise BadEncoding(f"an event of kind {kind[:64]!a} came, known are {', '.join(KINDS)}")
    return convert(decode_canonical(raw, LIMITS), KINDS[kind])


def searchable(body: Body) -> str:
    """All that is text in it, as the index has it. Changing this changes store_file.INDEX_FORM."""
    return "\n".join(_texts(to_builtins(body, builtin_types=(bytes,))))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)


def figures_of(body: Body) -> dict[str, float]:
    """The numbers that an hour is made of."""
    match body:
        case State(figures=figures) | Prediction(figures=figures):
            return figures
        case Outcome(figures=figures, errors=errors):
            both = {**figures, **{f"error_{name}"[:64]: value for name, value in errors.items()}}
            return dict(list(both.items())[:FIGURES_MAX])
        case Inference():
            return {
                "prompt_tokens": float(body.prompt_tokens),
                "answer_tokens": float(body.answer_tokens),
                "duration_ms": float(body.duration_ms),
            }
        case Peer(rtt_ms=float(rtt_ms)):
            return {"rtt_ms": rtt_ms}
    return {}


def code_of(body: Body) -> str:
    """The word that an hour counts it by; empty when its kind has none."""
    match body:
        case Inference(outcome=code) | Peer(happened=code):
            return code
    return ""
