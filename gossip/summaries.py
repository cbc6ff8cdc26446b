"""What a node says of its own state to its peers: the signed summary, its bounds, and when it is said.

Rules: core. A summary is the body of a signed envelope of its own domain, on a topic of its own; canonical msgpack,
strictly decoded, the whole at most SUMMARY_BYTES_MAX. All members are figures with bounds, but for the model's
revision, which is one word; none names another peer, and what was not measured is left out. To others it is a claim
(gossip/claims.py). It is said when it changed in a way that says more, at most one each SUMMARY_EVERY_S, and each
SUMMARY_REFRESH_S in any case; in a crowd both are stretched as those of adverts are (gossip/flow.py). The head of the
memory is a commitment: whoever kept it sees when that memory is later given another past.
Source: SELF.md "Peers' states are claims"; NETWORK.md "Protocols".
"""

from __future__ import annotations

import random
from typing import Annotated

from msgspec import Meta, Struct

from crypto.canonical import Limits, convert, decode_canonical, encode_struct
from crypto.envelope import Envelope, seal
from crypto.errors import BadEncoding
from crypto.identity import Identity
from gossip.errors import LocalProtocolError, RemoteProtocolError
from gossip.flow import STRETCH_MAX

SUMMARY_DOMAIN = "self"
SUMMARY_BYTES_MAX = 768  # with its envelope: under 1 KiB, and the largest summary within its bounds has 639
SUMMARY_EVERY_S = 40.0  # others take one in 30 s of a peer (gossip/claims_hearing.py): room for what comes late
SUMMARY_REFRESH_S = 90.0
SUMMARY_JITTER = 0.1  # nodes that started together must not speak together for ever
SUMMARY_LIFE_MS = 270_000  # three refreshes
SUMMARY_LIFE_MS_MAX = round(SUMMARY_LIFE_MS * STRETCH_MAX)
HEAD_BYTES = 32  # SHA-256, as node/chain.py chains events
NATS_MAX = 1_000.0  # of one token
SKILL_MIN = -100.0  # worse than that says nothing more
SECONDS_MAX = float(1 << 33)  # some 270 years
SHARE_STEP = 0.2  # a change of a share, or of a skill, that is worth telling before the refresh
FIGURE_STEP = 0.3  # of a figure without a top, and then at least its own least step:
LAG_STEP_MS, FIRST_TOKEN_STEP_S, NATS_STEP = 50.0, 0.1, 0.1
_LIMITS = Limits(
    bytes_max=SUMMARY_BYTES_MAX, depth_max=1, array_max=0, map_max=32, str_max=96, key_max=32, bin_max=HEAD_BYTES,
    items_max=64,
)  # fmt: skip

Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Skill = Annotated[float, Meta(ge=SKILL_MIN, le=1.0)]
Seconds = Annotated[float, Meta(ge=0.0, le=SECONDS_MAX)]
Nats = Annotated[float, Meta(ge=0.0, le=NATS_MAX)]
Number = Annotated[int, Meta(ge=0, le=(1 << 53) - 1)]
Revision = Annotated[str, Meta(pattern=r"\A[!-~]{1,96}\Z")]  # one word, as an advert's models have it
Head = Annotated[bytes, Meta(min_length=HEAD_BYTES, max_length=HEAD_BYTES)]


class SelfSummary(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A node's figures of itself; None: not measured. What each means stands in node/consciousness_fields.py.

    busy: of its slots; queued: of the room for requests that wait. first_token_s: mean, of requests that it answered.
    success_mean, success_least: of its own requests at its peers. head_id, head_hash: the last event of its memory.
    """

    revision: Revision | None = None
    uptime_s: Seconds | None = None
    boot_count: Number | None = None
    loop_lag_ms: Annotated[float, Meta(ge=0.0, le=SECONDS_MAX)] | None = None
    busy: Share | None = None
    queued: Share | None = None
    first_token_s: Seconds | None = None
    entropy_nats: Nats | None = None
    margin: Share | None = None
    calibration_error: Share | None = None
    latency_skill: Skill | None = None
    load_skill: Skill | None = None
    success_mean: Share | None = None
    success_least: Share | None = None
    head_id: Number | None = None
    head_hash: Head | None = None


def summary_topic(network: str) -> str:
    """The topic on which a network's nodes tell of themselves."""
    return f"openagi/1/{network}/self"


def checked_summary(summary: SelfSummary) -> SelfSummary:
    """The same summary, if peers would accept it. Raises: LocalProtocolError that names the field."""
    try:
        _read(encode_struct(summary))
    except BadEncoding as exc:
        raise LocalProtocolError(f"this node's summary cannot be told: {exc}") from exc
    return summary


def seal_summary(
    identity: Identity,
    summary: SelfSummary,
    *,
    network: str,
    sequence: int,
    time_ms: int,
    life_ms: int = SUMMARY_LIFE_MS,
) -> bytes:
    """The summary's signed wire form. Raises: LocalProtocolError (a field is out of its bounds)."""
    assert 0 < life_ms <= SUMMARY_LIFE_MS_MAX
    try:
        raw = seal(
            identity,
            domain=SUMMARY_DOMAIN,
            network=network,
            sequence=sequence,
            time_ms=time_ms,
            expires_ms=time_ms + life_ms,
            body=encode_struct(checked_summary(summary)),
        )
    except BadEncoding as exc:
        raise LocalProtocolError(f"the summary cannot be signed: {exc}") from exc
    assert len(raw) <= SUMMARY_BYTES_MAX, "its fields' bounds keep it below that"
    return raw


def summary_of(envelope: Envelope) -> SelfSummary:
    """The summary inside an opened envelope. Raises: RemoteProtocolError, and nothing else, for any body."""
    try:
        return _read(envelope.body)
    except BadEncoding as exc:
        raise RemoteProtocolError(f"{envelope.sender} sent a summary that cannot be read: {exc}") from exc


def _read(body: bytes) -> SelfSummary:
    """Raises BadEncoding."""
    summary = convert(decode_canonical(body, _LIMITS), SelfSummary)
    if (summary.head_id is None) != (summary.head_hash is None):
        raise BadEncoding("a head of the memory without its id, or the other way round, wanted are both or none")
    return summary


# --- when it is said ---

_SHARES = ("busy", "queued", "margin", "calibration_error", "latency_skill", "load_skill", "success_mean")
_FIGURES = (("loop_lag_ms", LAG_STEP_MS), ("first_token_s", FIRST_TOKEN_STEP_S), ("entropy_nats", NATS_STEP))


def says_more(before: SelfSummary, after: SelfSummary) -> bool:
    """Whether peers would think otherwise of the node. Its uptime and its memory always grow: they say nothing."""
    if (before.revision, before.boot_count) != (after.revision, after.boot_count):
        return True
    steps = [(name, 0.0, SHARE_STEP) for name in _SHARES] + [(name, FIGURE_STEP, least) for name, least in _FIGURES]
    for name, share, least in steps:
        was, now = getattr(before, name), getattr(after, name)
        if (was is None) != (now is None):
            return True
        if was is not None and abs(now - was) >= max(share * max(was, now), least):
            return True
    return False


class OwnSummary:
    """What this node says of itself, and when. Times are monotonic seconds."""

    def __init__(self, rng: random.Random, sequence: int) -> None:
        """sequence: none up to it is used."""
        self.sequence = sequence  # the last one used
        self.stretch = 1.0
        self.said = 0  # how often, so far
        self._rng = rng
        self._summary: SelfSummary | None = None
        self._told: SelfSummary | None = None
        self._last_s = float("-inf")
        self._wanted_s = float("inf")
        self._is_withdrawn = False

    @property
    def life_ms(self) -> int:
        """How long a summary said now is to be believed."""
        return min(SUMMARY_LIFE_MS_MAX, round(SUMMARY_LIFE_MS * self.stretch))

    def offer(self, summary: SelfSummary, now: float) -> None:
        """What to say from now on. The first is said within SUMMARY_EVERY_S: of many that start together, not all at
        once."""
        if self._is_withdrawn:
            return
        if self._summary is None:
            self._wanted_s = now + SUMMARY_EVERY_S * self._rng.random()
        elif self._told is not None and says_more(self._told, summary):
            self._wanted_s = min(self._wanted_s, now)
        self._summary = summary

    def withdraw(self) -> None:
        """Nothing more is said."""
        self._is_withdrawn = True
        self._wanted_s = float("inf")

    def deadline(self) -> float:
        """When the next one is due; infinite before the first `offer`."""
        return max(self._wanted_s, self._last_s + SUMMARY_EVERY_S * self.stretch)

    def say(self, now: float, now_ms: int) -> tuple[SelfSummary, int]:
        """The summary to tell now, and under which sequence."""
        assert self._summary is not None, "nothing is due before the first offer"
        self._last_s = now
        self._wanted_s = now + SUMMARY_REFRESH_S * self.stretch * (1.0 - SUMMARY_JITTER * self._rng.random())
        self.sequence = max(self.sequence + 1, now_ms)
        self._told = self._summary
        self.said += 1
        return self._summary, self.sequence
