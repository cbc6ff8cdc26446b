"""Envelopes: golden bytes, and no field that can be changed, moved or reused (SECURITY.md P8, P9, P10)."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crypto.canonical import encode
from crypto.envelope import ENVELOPE_BYTES_MAX, LIFETIME_MS_MAX, SKEW_MS, Envelope, open_envelope, seal
from crypto.errors import BadEncoding, BadSignature, CryptoError, Expired, WrongNetwork
from crypto.identity import Identity

KEY = Identity(bytes(range(32)))
NOW_MS = 1_800_000_000_000
PLAIN: dict[str, Any] = {
    "domain": "advert",
    "network": "main",
    "sequence": 7,
    "time_ms": NOW_MS,
    "expires_ms": NOW_MS + 30_000,
    "body": b"hello",
}
# Another implementation must make exactly these bytes from the seed 00 01 .. 1f and PLAIN (docs/PROTOCOLS.md).
GOLDEN_FIELDS = (
    "01a6616476657274a46d61696e"
    "c42003a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8"
    "07cf000001a3185c5000cf000001a3185cc530c40568656c6c6f"
)
GOLDEN_SIGNATURE = (
    "2472ad97c0e648bc312a84a22f394053a44cce938b027d38c3e8196bf621acd5"
    "610a5ef81888e195ce934ba95439583602f53f0357734efd8a11e72cbc8b8a00"
)
GOLDEN = "99" + GOLDEN_FIELDS + "c440" + GOLDEN_SIGNATURE


def opened(raw: bytes, **changes: Any) -> Envelope:
    return open_envelope(raw, **({"domain": "advert", "network": "main", "now_ms": NOW_MS} | changes))


def wire_of(**changes: Any) -> list[Any]:
    """The fields of a good envelope, some changed, signed again by KEY as a lying encoder could."""
    fields = {"v": 1, "domain": "advert", "network": "main", "sender": KEY.public_key} | PLAIN | changes
    order = ("v", "domain", "network", "sender", "sequence", "time_ms", "expires_ms", "body")
    values = [fields[name] for name in order]
    signature = KEY.sign(b"openagi:" + str(fields["domain"]).encode() + b":" + msgpack.packb(values))
    return [*values, changes.get("signature", signature)]


def test_golden_envelope() -> None:
    raw = seal(KEY, **PLAIN)
    assert raw.hex() == GOLDEN
    signed = b"openagi:advert:" + bytes.fromhex("98" + GOLDEN_FIELDS)
    assert KEY.sign(signed).hex() == GOLDEN_SIGNATURE
    envelope = opened(bytes.fromhex(GOLDEN))
    assert envelope == Envelope(v=1, sender=KEY.peer_id, **PLAIN)
    assert msgpack.packb(wire_of()) == raw


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"domain": "round"}, BadSignature),
        ({"network": "test"}, WrongNetwork),
        ({"now_ms": NOW_MS + 30_000 + SKEW_MS + 1}, Expired),
        ({"now_ms": NOW_MS - SKEW_MS - 1}, Expired),
        ({"now_ms": NOW_MS + 30_001, "skew_ms": 0}, Expired),
        ({"now_ms": NOW_MS - 1, "skew_ms": 0}, Expired),
        ({"now_ms": NOW_MS + 864_000_000}, Expired),
        ({"now_ms": NOW_MS - 864_000_000}, Expired),
    ],
)
def test_another_purpose_network_or_time_is_refused(changes: dict[str, Any], error: type[CryptoError]) -> None:
    with pytest.raises(error):
        opened(seal(KEY, **PLAIN), **changes)


@pytest.mark.parametrize("now_ms", [NOW_MS - SKEW_MS, NOW_MS, NOW_MS + 30_000 + SKEW_MS])
def test_honest_clocks_may_differ_by_the_skew(now_ms: int) -> None:
    assert opened(seal(KEY, **PLAIN), now_ms=now_ms).body == b"hello"


@pytest.mark.parametrize(
    "changes",
    [
        {"domain": "round"},
        {"network": "test"},
        {"sequence": 8},
        {"time_ms": NOW_MS + 1},
        {"expires_ms": NOW_MS + 30_001},
        {"body": b"hellp"},
        {"sender": Identity(bytes(32)).public_key},
        {"sender": bytes(32)},  # a key of small order, under which forgeries are easy
        {"signature": bytes(64)},
        {"signature": KEY.sign(b"another message")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_changed_field_breaks_the_signature(changes: dict[str, Any]) -> None:
    fields = wire_of()
    order = ("v", "domain", "network", "sender", "sequence", "time_ms", "expires_ms", "body", "signature")
    for name, value in changes.items():
        fields[order.index(name)] = value
    wanted = {name: changes[name] for name in ("domain", "network") if name in changes}
    with pytest.raises(BadSignature):
        opened(encode(fields), **wanted)


def test_the_domain_is_signed_outside_the_fields_too() -> None:
    values = wire_of()[:-1]
    with pytest.raises(BadSignature):
        opened(encode([*values, KEY.sign(encode(values))]))


def test_both_domains_must_agree() -> None:
    """A signer that puts one domain in the fields and another before them gets neither."""
    values = wire_of(domain="round")[:-1]
    raw = encode([*values, KEY.sign(b"openagi:advert:" + encode(values))])
    for domain in ("advert", "round"):
        with pytest.raises(BadSignature):
            opened(raw, domain=domain)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, len(GOLDEN) // 2 - 1), st.integers(1, 255))
def test_no_byte_can_be_changed(place: int, flip: int) -> None:
    raw = bytearray.fromhex(GOLDEN)
    raw[place] ^= flip
    with pytest.raises(CryptoError):
        opened(bytes(raw))


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=300))
def test_any_bytes_are_refused_with_our_errors(raw: bytes) -> None:
    with pytest.raises(CryptoError):
        opened(raw)


EXTREMES: list[Any] = [
    -1,
    1 << 63,
    (1 << 64) - 1,
    -(1 << 63),
    0.5,
    7.0,
    float("nan"),
    float("inf"),
    1e308,
    None,
    True,
    "",
    "x" * 65,
    "Advert",
    "a b",
    "advert\n",
    "é",
    [],
    {},
    b"x" * 31,
    b"x" * 65,
]
FIELDS = ("v", "domain", "network", "sender", "sequence", "time_ms", "expires_ms", "body", "signature")
CASES = [(field, extreme) for field in FIELDS for extreme in EXTREMES if (field, type(extreme)) != ("body", bytes)]


@pytest.mark.parametrize(("field", "extreme"), CASES, ids=lambda value: repr(value)[:20])
def test_extremes_of_every_field_are_bad_encoding_though_signed(field: str, extreme: Any) -> None:
    with pytest.raises(BadEncoding):
        opened(msgpack.packb(wire_of(**{field: extreme})))


@pytest.mark.parametrize("version", [0, 2, 65_535])
def test_another_version_says_which(version: int) -> None:
    with pytest.raises(BadEncoding, match=f"version {version}"):
        opened(msgpack.packb(wire_of(v=version)))


@pytest.mark.parametrize("raw", [b"", b"\xc0", encode(wire_of()[:-1]), encode([*wire_of(), 1]), encode({"v": 1})])
def test_other_shapes_are_refused(raw: bytes) -> None:
    with pytest.raises(BadEncoding):
        opened(raw)


def test_one_statement_has_one_encoding() -> None:
    raw = bytes.fromhex(GOLDEN)
    longer_header = b"\xdc\x00\x09" + raw[1:]
    with pytest.raises(BadEncoding, match="canonical"):
        opened(longer_header)


@pytest.mark.parametrize("lifetime_ms", [0, -1, LIFETIME_MS_MAX + 1])
def test_lifetimes_are_bounded(lifetime_ms: int) -> None:
    with pytest.raises(BadEncoding, match="lifetime"):
        seal(KEY, **(PLAIN | {"expires_ms": NOW_MS + lifetime_ms}))
    with pytest.raises(BadEncoding, match="lifetime"):
        opened(msgpack.packb(wire_of(expires_ms=NOW_MS + lifetime_ms)))


def test_size_is_bounded_on_both_sides() -> None:
    overhead = len(seal(KEY, **(PLAIN | {"body": b"x" * 300}))) - 300
    largest = seal(KEY, **(PLAIN | {"body": b"x" * (ENVELOPE_BYTES_MAX - overhead)}))
    assert len(largest) == ENVELOPE_BYTES_MAX
    assert opened(largest)
    with pytest.raises(BadEncoding, match=str(ENVELOPE_BYTES_MAX)):
        seal(KEY, **(PLAIN | {"body": b"x" * (ENVELOPE_BYTES_MAX - overhead + 1)}))
    with pytest.raises(BadEncoding, match=str(ENVELOPE_BYTES_MAX)):
        opened(msgpack.packb(wire_of(body=b"x" * (ENVELOPE_BYTES_MAX - overhead + 1))))


@pytest.mark.parametrize(
    "changes", [{"domain": ""}, {"domain": "A"}, {"network": "a/b"}, {"sequence": -1}, {"sequence": 1 << 63}]
)
def test_seal_refuses_what_nobody_would_open(changes: dict[str, Any]) -> None:
    with pytest.raises(BadEncoding):
        seal(KEY, **(PLAIN | changes))


@pytest.mark.parametrize("sequence", [0, (1 << 63) - 1])
def test_sequences_reach_from_0_to_the_bound(sequence: int) -> None:
    assert opened(seal(KEY, **(PLAIN | {"sequence": sequence}))).sequence == sequence
