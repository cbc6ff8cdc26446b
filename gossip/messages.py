"""Every gossip message, its wire form and its bounds.

Rules: core. A message is the body of a signed envelope (crypto/envelope.py), whose domain is the message's kind;
who says it, its sequence and its time stand in the envelope and nowhere else. Bodies are canonical msgpack, strictly
decoded: unknown fields refused, every number finite and bounded, the whole at most GOSSIP_BYTES_MAX. A goodbye is an
advert that accepts nothing and offers no model.
Source: NETWORK.md rule 4 and "Protocols"; petals `ServerInfo` for the fields of an advert.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct
from msgspec.structs import replace

from crypto.canonical import decode_struct, encode_struct
from crypto.envelope import Envelope, seal
from crypto.errors import BadEncoding
from crypto.identity import Identity
from gossip.errors import LocalProtocolError, RemoteProtocolError
from p2p.transport import GOSSIP_BYTES_MAX

ADVERT_DOMAIN = "advert"
ADVERT_LIFE_MS = 30_000  # three refreshes: two lost adverts in a row do not make a peer vanish
ADVERT_LIFE_MS_MAX = 180_000  # in a crowd, where everybody speaks less often (gossip/flow.py)
ENVELOPE_BYTES = 256  # what an envelope adds to its body at most: key, signature, times, two labels
CAPACITY_BYTES_MAX = GOSSIP_BYTES_MAX - ENVELOPE_BYTES - 384  # the rest of an advert without any address is under 300
MODELS_MAX = 16  # a node's engines, with room; sixteen full entries still fit GOSSIP_BYTES_MAX
ADDRESSES_MAX = 8  # interfaces of one machine, v4 and v6
ADDRESS_CHARS_MAX = 256
NAME_CHARS_MAX = 200
SLOTS_MAX = 65_536  # above any single machine's batch
QUEUE_MAX = 1 << 20
TOKENS_MAX = 1 << 40
RATE_TOK_S_MAX = 1e9
BYTES_MAX = 1 << 53  # exact in every client's double
TIME_MS_MAX = 1 << 53

Name = Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)]
Word = Annotated[str, Meta(min_length=1, max_length=64)]
Slots = Annotated[int, Meta(ge=0, le=SLOTS_MAX)]
Tokens = Annotated[int, Meta(ge=0, le=TOKENS_MAX)]
Rate = Annotated[float, Meta(ge=0.0, le=RATE_TOK_S_MAX)]
InstanceId = Annotated[str, Meta(pattern="^[0-9a-f]{8,64}$")]
Address = Annotated[str, Meta(min_length=1, max_length=ADDRESS_CHARS_MAX)]


class ModelKind(StrEnum):
    """What a model is for: continuing text, or embedding it."""

    CAUSAL = "causal"
    ENCODER = "encoder"


class ModelOffer(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model that a peer serves. context_tokens: prompt and answer together. embeds: a causal one can embed too."""

    name: Name
    revision: Name
    kind: ModelKind
    context_tokens: Tokens
    dtype: Word
    embeds: bool = False

    def can(self, kind: str) -> bool:
        """Whether work of this ModelKind can be asked of the model."""
        return self.kind == kind or (self.embeds and kind == ModelKind.ENCODER)


class Capacity(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a node can do now, as it says itself. Rates are measured tokens a second, 0 = not measured yet.

    trains: the training run that it takes part in. accepting: whether it takes new requests from peers.
    """

    models: Annotated[tuple[ModelOffer, ...], Meta(max_length=MODELS_MAX)] = ()
    slots_total: Slots = 0
    slots_free: Slots = 0
    queue_length: Annotated[int, Meta(ge=0, le=QUEUE_MAX)] = 0
    kv_tokens_free: Tokens = 0
    decode_tok_s: Rate = 0.0
    prefill_tok_s: Rate = 0.0
    device: Word = "none"
    device_free_bytes: Annotated[int, Meta(ge=0, le=BYTES_MAX)] = 0
    accepting: bool = False
    trains: Name | None = None


GOODBYE = Capacity()  # what a node says when it leaves


class Advert(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A peer's statement about itself. instance: random for each process start, tells copies of one identity apart."""

    instance: InstanceId
    started_ms: Annotated[int, Meta(ge=0, le=TIME_MS_MAX)]  # unix milliseconds
    agent: Word
    addresses: Annotated[tuple[Address, ...], Meta(max_length=ADDRESSES_MAX)] = ()
    capacity: Capacity = GOODBYE

    @property
    def is_goodbye(self) -> bool:
        """Whether the peer says that it leaves."""
        return not self.capacity.accepting and not self.capacity.models


def advert_topic(network: str) -> str:
    """The topic on which a network's adverts travel."""
    return f"openagi/1/{network}/advert"


def checked_capacity(capacity: Capacity) -> Capacity:
    """The same capacity, if peers would accept it: an advert of it can then be sealed whatever else it says.

    Raises: LocalProtocolError (a field is out of its bounds, and which; or the models are too many to be told).
    """
    try:
        body = encode_struct(capacity)
        fault = _contradiction(decode_struct(body, Capacity))
    except BadEncoding as exc:
        raise LocalProtocolError(f"this node's capacity cannot be advertised: {exc}") from exc
    if not fault and len(body) > CAPACITY_BYTES_MAX:
        fault = (
            f"{len(capacity.models)} models take {len(body)} bytes and at most {CAPACITY_BYTES_MAX} fit: "
            "serve fewer models or give them shorter names"
        )
    if fault:
        raise LocalProtocolError(f"this node's capacity cannot be advertised: {fault}")
    return capacity


def seal_advert(
    identity: Identity, advert: Advert, *, network: str, sequence: int, time_ms: int, life_ms: int = ADVERT_LIFE_MS
) -> bytes:
    """The advert's signed wire form, at most GOSSIP_BYTES_MAX; addresses are left out from the end until it fits.

    Raises: LocalProtocolError (too large without any address, or a field out of its bounds).
    """
    for kept in range(len(advert.addresses), -1, -1):
        body = encode_struct(replace(advert, addresses=advert.addresses[:kept]))
        if len(body) <= GOSSIP_BYTES_MAX - ENVELOPE_BYTES:
            break
    else:
        raise LocalProtocolError(
            f"the advert of {len(advert.capacity.models)} models is over {GOSSIP_BYTES_MAX} bytes even without "
            "addresses: serve fewer models or give them shorter names"
        )
    assert life_ms <= ADVERT_LIFE_MS_MAX
    expires_ms = time_ms + life_ms
    try:
        return seal(
            identity,
            domain=ADVERT_DOMAIN,
            network=network,
            sequence=sequence,
            time_ms=time_ms,
            expires_ms=expires_ms,
            body=body,
        )
    except BadEncoding as exc:
        raise LocalProtocolError(f"the advert cannot be signed: {exc}") from exc


def advert_of(envelope: Envelope) -> Advert:
    """The advert inside an opened envelope. Raises: RemoteProtocolError, and nothing else, for any body."""
    try:
        advert = decode_struct(envelope.body, Advert)
    except BadEncoding as exc:
        raise RemoteProtocolError(f"{envelope.sender} sent an advert that cannot be read: {exc}") from exc
    if fault := _contradiction(advert.capacity):
        raise RemoteProtocolError(f"{envelope.sender} sent an advert that contradicts itself: {fault}")
    return advert


def _contradiction(capacity: Capacity) -> str:
    """What two fields say against each other; empty when nothing."""
    if capacity.slots_free > capacity.slots_total:
        return f"{capacity.slots_free} free slots of {capacity.slots_total}"
    return ""
