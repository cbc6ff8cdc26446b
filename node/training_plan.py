"""What a run is: everything that its members must have alike, in one signed-by-name struct; its digest is the run's id.

Rules: core. Whoever joins gets the plan from a peer and knows by its digest that it is that run's, to the last bit.
Numbers that enter the arithmetic are integers in parts, so that there is one encoding of each.
Source: TRAINING.md 1 and 3 (5): base[0] names the hyper-parameters, and every base after it stands on the first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

from crypto.canonical import Limits, decode_struct, encode_struct
from crypto.digest import Digest, digest
from crypto.errors import BadEncoding, BadKey
from crypto.identity import PeerId, public_key_of
from gossip.electors import Electors, Terms
from gossip.errors import RemoteProtocolError
from gossip.round_state import Chain
from gossip.rounds import MEMBERS_MAX, Id, Member
from model.codecs import CODECS, codec_named
from model.rules import BY_ORDER, Rule

PARTS: Final = 1 << 20  # of one, in rates
PLAN_BYTES_MAX: Final = 32_768
ALLOWED_MAX: Final = 256
NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9._-]{0,31}$"
DENSE_ELEMENTS_MAX: Final = 6_000_000  # up to here every member gets everything in int4, and every robust rule works
STEPS_DEFAULT: Final = 20
NAMED_EVERY_MAX: Final = 8
NAMED_BYTES: Final = 8 << 20  # of weights, for which writing and hashing is nothing beside a round
ID_DIGITS_MIN: Final = 8  # of a run's id, where its name is asked for
_LIMITS: Final = Limits(bytes_max=PLAN_BYTES_MAX, array_max=ALLOWED_MAX, items_max=2 * ALLOWED_MAX)

Parts = Annotated[int, Meta(ge=0, le=16 * PARTS)]
Count = Annotated[int, Meta(ge=1, le=1 << 20)]


class Adapters(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """LoRA matrices beside the model's own: see model/adapters.py."""

    rank: Annotated[int, Meta(ge=1, le=256)]
    alpha: Annotated[int, Meta(ge=1, le=1 << 16)]
    targets: Annotated[tuple[Annotated[str, Meta(min_length=1, max_length=64)], ...], Meta(max_length=32)] = ()


class Plan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run.

    model, revision: what it starts from; start: the name of all its weights, fp32, as a state's. adapters: these alone
    are trained. layout, elements: of what is trained. codec, rule: how updates are sent and merged; outer_rate,
    momentum: of the outer step, parts of PARTS. steps: of the optimiser in a round, each of `accumulation`
    micro-batches of `rows` rows of `context` tokens; rate: of the optimiser, billionths. founders: who votes first.
    members: who may take part; none: anybody. probation, absent_max, voters_max: see gossip.electors.Terms.
    created_ms: unix time, so that two runs of one name differ.
    """

    v: Literal[1] = 1
    name: Annotated[str, Meta(pattern=NAME_PATTERN)]
    network: Annotated[str, Meta(pattern=NAME_PATTERN)]
    model: Annotated[str, Meta(min_length=1, max_length=200)]
    revision: Annotated[str, Meta(min_length=1, max_length=200)]
    layout: Id
    elements: Annotated[int, Meta(ge=1, le=1 << 32)]
    start: Id
    adapters: Adapters | None = None
    codec: Annotated[str, Meta(max_length=16)]
    rule: Annotated[str, Meta(max_length=32)]
    outer_rate: Parts
    momentum: Annotated[int, Meta(ge=0, lt=PARTS)] = 0
    steps: Count
    rows: Count
    context: Count
    accumulation: Count
    rate: Annotated[int, Meta(ge=1, lt=1_000_000_000)]
    warmup_steps: Annotated[int, Meta(ge=0, le=1 << 20)]
    founders: Annotated[tuple[Member, ...], Meta(min_length=1, max_length=MEMBERS_MAX)]
    members: Annotated[tuple[Member, ...], Meta(max_length=ALLOWED_MAX)] = ()
    probation: Annotated[int, Meta(ge=1, le=1000)]
    absent_max: Annotated[int, Meta(ge=1, le=1000)]
    voters_max: Annotated[int, Meta(ge=1, le=MEMBERS_MAX)] = MEMBERS_MAX
    created_ms: Annotated[int, Meta(ge=0, le=1 << 53)]

    @property
    def raw(self) -> bytes:
        """The canonical bytes, as peers get them."""
        return encode_struct(self)

    @property
    def id(self) -> Digest:
        """The run's id."""
        return digest(b"openagi:run:" + self.raw)

    @property
    def genesis(self) -> Chain:
        """The history before the first round."""
        terms = Terms(probation=self.probation, absent_max=self.absent_max, voters_max=self.voters_max)
        electors = Electors.of_founders(map(PeerId, self.founders), terms)
        return Chain(run=self.id, round=0, base=digest(b"openagi:genesis:" + self.id), electors=electors)

    @property
    def named_every(self) -> int:
        """In how many rounds the weights are written down and named once. What is between is made again by its payloads
        where it is wanted, so it is more than one only where weights are much, and much more than payloads."""
        state_bytes = 4 * self.elements * (2 if self.momentum else 1)
        payload_bytes = sum(codec_named(self.codec).sizes(self.elements))
        return max(1, min(NAMED_EVERY_MAX, state_bytes // NAMED_BYTES, state_bytes // (8 * payload_bytes)))

    def is_called(self, run: str) -> bool:
        """Whether this is its name, or the first ID_DIGITS_MIN or more digits of its id."""
        return run == self.name or (len(run) >= ID_DIGITS_MIN and self.id.hex().startswith(run))

    def revision_at(self, number: int, base: bytes) -> str:
        """What the weights before a round are called: equal names, equal histories, equal weights."""
        return f"{self.name}-r{number}-{base.hex()[:12]}"


def plan_of(raw: bytes) -> Plan:
    """The plan of these bytes. Raises RemoteProtocolError that says what is wrong, for any bytes."""
    try:
        plan = decode_struct(raw, Plan, _LIMITS)
    except BadEncoding as exc:
        raise RemoteProtocolError(f"a plan of a run cannot be read: {exc}") from exc
    if plan.raw != raw:
        raise RemoteProtocolError("a plan of a run has another encoding than the canonical one")
    if fault := fault_of(plan):
        raise RemoteProtocolError(f"the plan of run {plan.name!r} contradicts itself: {fault}")
    return plan


def fault_of(plan: Plan) -> str:
    """What two fields say against each other, or what this node does not know; empty when nothing."""
    if plan.codec not in CODECS:
        return f"codec {plan.codec!r} is none of {', '.join(CODECS)}"
    if plan.rule not in set(Rule):
        return f"rule {plan.rule!r} is none of {', '.join(Rule)}"
    if plan.codec.startswith("ef") and Rule(plan.rule) in BY_ORDER:
        return f"{plan.rule} means nothing on {plan.codec}, where most members send nothing for most coordinates"
    if plan.outer_rate < 1:
        return "an outer rate of 0 learns nothing"
    for what, peers in (("founders", plan.founders), ("members", plan.members)):
        if list(peers) != sorted(set(peers)):
            return f"its {what} are not in order, each once"
        for peer in peers:
            try:
                public_key_of(peer)
            except BadKey as exc:
                return f"one of its {what} is no peer: {exc}"
    if plan.members and not set(plan.founders) <= set(plan.members):
        return "a founder is no member"
    if len(plan.founders) > plan.voters_max:
        return f"{len(plan.founders)} founders and voters_max {plan.voters_max}"
    return ""


def default_codec(elements: int) -> str:
    """Dense while it is cheap, as every robust rule works on it; then sparse (TRAINING.md 1)."""
    return "int4" if elements <= DENSE_ELEMENTS_MAX else "ef64.2b"


def default_outer_rate(codec: str) -> int:
    """In parts of PARTS: tuned together with how much is sent (TRAINING.md 1)."""
    return PARTS // 2 if codec == "ef256.2b" else PARTS


def in_order(peers: Iterable[str]) -> tuple[str, ...]:
    """As a plan lists them."""
    return tuple(sorted(set(peers)))
