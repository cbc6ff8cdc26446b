"""gossip/messages.py: bounds hold in both directions, and no bytes get past the decoder as anything but a message."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import to_builtins
from msgspec.structs import replace

from crypto.canonical import encode
from crypto.envelope import Envelope, open_envelope
from crypto.identity import Identity
from gossip.errors import LocalProtocolError, RemoteProtocolError
from gossip.messages import (
    ADDRESS_CHARS_MAX,
    ADDRESSES_MAX,
    ADVERT_DOMAIN,
    MODELS_MAX,
    NAME_CHARS_MAX,
    Advert,
    Capacity,
    ModelKind,
    ModelOffer,
    advert_of,
    advert_topic,
    checked_capacity,
    seal_advert,
)
from p2p.transport import GOSSIP_BYTES_MAX

IDENTITY = Identity.make()
NOW_MS = 1_800_000_000_000
MODEL = ModelOffer(name="tale", revision="sha256-0123456789ab", kind=ModelKind.CAUSAL, context_tokens=512, dtype="bf16")
CAPACITY = Capacity(
    models=(MODEL,),
    slots_total=4,
    slots_free=3,
    queue_length=0,
    kv_tokens_free=2048,
    decode_tok_s=120.5,
    prefill_tok_s=900.0,
    device="cpu",
    device_free_bytes=1 << 33,
    accepting=True,
    trains="tales-1",
)
ADVERT = Advert(
    instance="00ff00ff00ff00ff",
    started_ms=NOW_MS - 5,
    agent="openagi-node/0.1.0",
    addresses=("/ip4/192.168.1.5/tcp/4001",),
    capacity=CAPACITY,
)


def envelope_of(body: bytes) -> Envelope:
    return Envelope(
        v=1,
        domain=ADVERT_DOMAIN,
        network="main",
        sender=IDENTITY.peer_id,
        sequence=1,
        time_ms=NOW_MS,
        expires_ms=NOW_MS + 1,
        body=body,
    )


def sealed(advert: Advert) -> bytes:
    return seal_advert(IDENTITY, advert, network="main", sequence=7, time_ms=NOW_MS)


def test_an_advert_survives_the_wire() -> None:
    raw = sealed(ADVERT)
    envelope = open_envelope(raw, domain=ADVERT_DOMAIN, network="main", now_ms=NOW_MS)
    assert advert_of(envelope) == ADVERT
    assert (envelope.sender, envelope.sequence) == (IDENTITY.peer_id, 7)
    assert len(raw) < 700  # small enough to be sent each second


def test_the_topic_carries_the_network() -> None:
    assert advert_topic("main") == "openagi/1/main/advert"


def test_a_goodbye_offers_nothing() -> None:
    assert replace(ADVERT, capacity=Capacity()).is_goodbye
    assert not ADVERT.is_goodbye
    assert not replace(ADVERT, capacity=replace(CAPACITY, accepting=False)).is_goodbye  # full or loading, not gone


def test_a_causal_model_that_embeds_can_do_an_encoders_work() -> None:
    assert not MODEL.can(ModelKind.ENCODER)
    assert replace(MODEL, embeds=True).can(ModelKind.ENCODER)
    assert not replace(MODEL, kind=ModelKind.ENCODER).can(ModelKind.CAUSAL)


def test_addresses_give_way_to_the_size_limit() -> None:
    models = tuple(replace(MODEL, name=f"{n:02}" + "m" * 150) for n in range(10))
    long = tuple(f"/dns/{'x' * (ADDRESS_CHARS_MAX - 6)}{n}" for n in range(ADDRESSES_MAX))
    raw = sealed(replace(ADVERT, addresses=long, capacity=replace(CAPACITY, models=models)))
    assert len(raw) <= GOSSIP_BYTES_MAX
    advert = advert_of(open_envelope(raw, domain=ADVERT_DOMAIN, network="main", now_ms=NOW_MS))
    assert 0 < len(advert.addresses) < ADDRESSES_MAX
    assert advert.addresses == long[: len(advert.addresses)]
    assert advert.capacity.models == models


@pytest.mark.parametrize("length", range(150, 260, 7))
def test_every_size_near_the_limit_is_sealed(length: int) -> None:
    """The room kept for the envelope is enough whatever is left out, with the longest network name."""
    long = tuple("/dns/" + "x" * length for _ in range(ADDRESSES_MAX))
    models = tuple(replace(MODEL, name=f"{n:02}" + "m" * 150) for n in range(9))
    advert = replace(ADVERT, addresses=long, capacity=replace(CAPACITY, models=models))
    last = 2**63 - 1
    raw = seal_advert(IDENTITY, advert, network="n" * 64, sequence=last, time_ms=NOW_MS)
    assert GOSSIP_BYTES_MAX - 600 < len(raw) <= GOSSIP_BYTES_MAX


def test_what_cannot_fit_is_our_error() -> None:
    names = "n" * NAME_CHARS_MAX
    models = tuple(replace(MODEL, name=names, revision=names) for _ in range(MODELS_MAX))
    with pytest.raises(LocalProtocolError, match="serve fewer models"):
        sealed(replace(ADVERT, capacity=replace(CAPACITY, models=models)))


@pytest.mark.parametrize(
    "bad",
    [{"slots_total": -1}, {"decode_tok_s": math.nan}, {"decode_tok_s": math.inf}, {"device": ""}, {"slots_free": 5}],
)
def test_a_capacity_that_peers_would_refuse_is_refused_here(bad: dict[str, Any]) -> None:
    with pytest.raises(LocalProtocolError, match="cannot be advertised"):
        checked_capacity(replace(CAPACITY, **bad))


@pytest.mark.parametrize("count", range(1, MODELS_MAX + 1))
def test_a_capacity_that_was_accepted_can_always_be_sealed(count: int) -> None:
    """Over the whole range of sizes, with everything else as long as it may be."""
    for length in range(1, NAME_CHARS_MAX, 9):
        models = tuple(replace(MODEL, name="m" * length, context_tokens=1 << 40) for _ in range(count))
        try:
            capacity = checked_capacity(replace(CAPACITY, models=models, trains="t" * NAME_CHARS_MAX))
        except LocalProtocolError as exc:
            assert "serve fewer models" in str(exc)  # noqa: PT017  # either outcome is right
            continue
        longest = Advert(instance="f" * 64, started_ms=1 << 53, agent="a" * 64, addresses=("/x",), capacity=capacity)
        raw = seal_advert(IDENTITY, longest, network="n" * 64, sequence=2**63 - 1, time_ms=NOW_MS)
        assert len(raw) <= GOSSIP_BYTES_MAX


def test_a_good_capacity_passes() -> None:
    assert checked_capacity(CAPACITY) is CAPACITY


EXTREMES = (0, -1, 2**31, 2**63, 2**64 - 1, -(2**63), 1e308, -1e308, 0.5, "", "x" * 5000, b"", None, True, [], {})
FIELDS = (*Advert.__struct_fields__, "unknown")
CAPACITY_FIELDS = (*Capacity.__struct_fields__, "unknown")
MODEL_FIELDS = (*ModelOffer.__struct_fields__, "unknown")


@settings(deadline=None)
@given(
    level=st.sampled_from(("advert", "capacity", "model")),
    field=st.integers(0, 30),
    value=st.sampled_from(EXTREMES),
)
def test_any_field_may_be_extreme(level: str, field: int, value: object) -> None:
    fields = to_builtins(ADVERT)
    match level:
        case "advert":
            fields[FIELDS[field % len(FIELDS)]] = value
        case "capacity":
            fields["capacity"][CAPACITY_FIELDS[field % len(CAPACITY_FIELDS)]] = value
        case _:
            fields["capacity"]["models"] = [dict(fields["capacity"]["models"][0])]
            fields["capacity"]["models"][0][MODEL_FIELDS[field % len(MODEL_FIELDS)]] = value
    try:
        advert = advert_of(envelope_of(encode(fields)))
    except RemoteProtocolError:
        return
    checked_capacity(advert.capacity)  # whatever passes is within bounds: we could say it ourselves
    assert all(math.isfinite(rate) for rate in (advert.capacity.decode_tok_s, advert.capacity.prefill_tok_s))


@settings(deadline=None)
@given(st.binary(max_size=600))
def test_any_bytes_give_a_message_or_the_peers_error(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        advert_of(envelope_of(body))


@settings(deadline=None)
@given(position=st.integers(0, 10_000), flip=st.integers(1, 255))
def test_a_changed_byte_gives_a_message_or_the_peers_error(position: int, flip: int) -> None:
    body = bytearray(encode(to_builtins(ADVERT)))
    body[position % len(body)] ^= flip
    try:
        checked_capacity(advert_of(envelope_of(bytes(body))).capacity)
    except RemoteProtocolError:
        pass


def test_more_free_slots_than_slots_is_a_lie() -> None:
    fields = to_builtins(ADVERT)
    fields["capacity"]["slots_free"] = 5
    with pytest.raises(RemoteProtocolError, match="5 free slots of 4"):
        advert_of(envelope_of(encode(fields)))
