"""Canonical msgpack: golden bytes, round trips, and any bytes at all (SECURITY.md F5, F6, P8)."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Annotated, Any

import msgpack
import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from crypto.canonical import (
    ENCODE_DEPTH_MAX,
    Limits,
    decode,
    decode_canonical,
    decode_struct,
    encode,
    encode_struct,
)
from crypto.errors import BadEncoding

GOLDEN: list[tuple[Any, str]] = [
    (None, "c0"),
    (True, "c3"),
    (False, "c2"),
    (0, "00"),
    (127, "7f"),
    (128, "cc80"),
    (255, "ccff"),
    (256, "cd0100"),
    (65_536, "ce00010000"),
    (1 << 32, "cf0000000100000000"),
    ((1 << 64) - 1, "cfffffffffffffffff"),
    (-1, "ff"),
    (-32, "e0"),
    (-33, "d0df"),
    (-129, "d1ff7f"),
    (-32_769, "d2ffff7fff"),
    (-(1 << 63), "d38000000000000000"),
    (1.5, "cb3ff8000000000000"),
    (-0.0, "cb8000000000000000"),
    ("", "a0"),
    ("é", "a2c3a9"),
    ("x" * 32, "d920" + "78" * 32),
    (b"", "c400"),
    (b"\x01\x02", "c4020102"),
    ([], "90"),
    ([1, [2]], "92019102"),
    ({}, "80"),
    ({"b": 1, "a": 2}, "82a16102a16201"),
    ({"aa": 0, "b": 0, "a": 0, "": 0}, "84a000a16100a2616100a16200"),
]

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.binary(max_size=20)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=5),
    max_leaves=20,
)


@st.composite
def hostile(draw: st.DrawFn) -> bytes:
    """Bytes near the format: real encodings, cut, spliced, flipped and joined with headers of every kind."""
    pieces = st.one_of(
        values.map(encode),
        st.floats(width=32).map(lambda number: msgpack.packb(number, use_single_float=True)),
        st.binary(max_size=8),
        st.integers(0x80, 0xDF).map(lambda tag: bytes([tag])),
        st.sampled_from(
            [bytes.fromhex(text) for text in ("dc0001", "dd00000001", "de0001", "d9016b", "81a16b", "c403")]
        ),
    )
    raw = bytearray(b"".join(draw(st.lists(pieces, max_size=4))))
    for _ in range(draw(st.integers(0, 3))):
        if raw:
            raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return bytes(raw[: draw(st.integers(0, len(raw)))]) if draw(st.booleans()) else bytes(raw)


@pytest.mark.parametrize(("value", "hexed"), GOLDEN, ids=[hexed[:20] for _, hexed in GOLDEN])
def test_golden_bytes(value: Any, hexed: str) -> None:
    assert encode(value).hex() == hexed
    again = decode_canonical(bytes.fromhex(hexed))
    assert again == value
    assert type(again) is type(value)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values)
def test_what_is_written_is_read_back(value: Any) -> None:
    raw = encode(value)
    assert encode(decode(raw, Limits(depth_max=64))) == raw
    assert decode(raw, Limits(depth_max=64)) == value
    assert decode_canonical(raw, Limits(depth_max=64)) == value


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.text(), st.integers(0, 9)), st.randoms(use_true_random=False))
def test_the_order_of_making_does_not_show(fields: dict[str, int], rng: Any) -> None:
    pairs = list(fields.items())
    rng.shuffle(pairs)
    assert encode(dict(pairs)) == encode(fields)


def test_tuples_are_arrays() -> None:
    assert encode((1, (2, 3))) == encode([1, [2, 3]])


@pytest.mark.slow
@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=200) | hostile())
@example(b"")
@example(b"\xc1")
@example(b"\xa1\xff")  # not UTF-8
@example(b"\xa3\xed\xa0\x80")  # a surrogate in UTF-8
@example(b"\x82\xa1a\x01\xa1a\x01")  # one key twice
@example(b"\x82\xa1a\x01\xd9\x01a\x01")  # one key twice, written in two ways
def test_any_bytes_give_a_value_or_bad_encoding(raw: bytes) -> None:
    try:
        value = decode(raw)
    except BadEncoding:
        with pytest.raises(BadEncoding):
            decode_canonical(raw)
        return
    again = encode(value)  # whatever was decoded can be encoded
    assert encode(decode(again)) == again
    if again == raw:
        decode_canonical(raw)
    else:  # only the canonical form re-encodes to itself
        with pytest.raises(BadEncoding):
            decode_canonical(raw)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values, st.data())
def test_a_cut_or_longer_encoding_is_refused(value: Any, data: st.DataObject) -> None:
    raw = encode(value)
    with pytest.raises(BadEncoding):
        decode(raw[: data.draw(st.integers(0, len(raw) - 1))])
    with pytest.raises(BadEncoding):
        decode(raw + data.draw(st.binary(min_size=1, max_size=9)))


@pytest.mark.parametrize(
    ("hexed", "says"),
    [
        ("", "1 elements are missing"),
        ("9201", "1 elements are missing"),
        ("81a161", "1 elements are missing"),
        ("dc01", "inside a header"),
        ("c6000000", "inside a header"),
        ("cb7ff0000000", "inside a float"),
        ("ca", "inside a float"),
        ("a26b", "1 bytes are missing"),
        ("cd01", "1 bytes are missing"),
        ("c4020a", "1 bytes are missing"),
        ("0101", "1 bytes after the end"),
        ("9001c0", "2 bytes after the end"),
        ("a1ff", "not UTF-8"),
        ("cb7ff0000000000000", "not finite"),
        ("82a16101a16101", "same key twice"),
        ("8101", "not a str"),
        ("d40500", "type 0xd4 at byte 0"),
        ("91c1", "type 0xc1 at byte 1"),
    ],
)
def test_what_is_wrong_is_found_by_the_scan_and_said(hexed: str, says: str) -> None:
    with pytest.raises(BadEncoding, match=says):
        decode(bytes.fromhex(hexed))


@pytest.mark.parametrize(
    ("raw", "limits", "says"),
    [
        (encode("x" * 20), Limits(bytes_max=20), "22 bytes|21 bytes"),
        (encode([[[]]]), Limits(depth_max=2), "deep"),
        (encode({"a": {"a": {}}}), Limits(depth_max=2), "deep"),
        (encode([0] * 11), Limits(array_max=10), "elements"),
        (encode({str(i): 0 for i in range(11)}), Limits(map_max=10), "elements"),
        (encode("x" * 11), Limits(str_max=10), "at most 10"),
        (encode({"x" * 11: 0}), Limits(str_max=10), "at most 10"),
        (encode(b"x" * 11), Limits(bin_max=10), "at most 10"),
        (encode([[0] * 5, [0] * 4]), Limits(items_max=10), "in all"),
        (encode({"a": {"b": 0, "c": 0}}), Limits(items_max=5), "in all"),
        (encode([{}, [{}], {}]), Limits(maps_max=2), "2 maps in all"),
    ],
)
def test_each_limit_holds_and_says_so(raw: bytes, limits: Limits, says: str) -> None:
    with pytest.raises(BadEncoding, match=says):
        decode(raw, limits)


@pytest.mark.parametrize(
    ("raw", "limits"),
    [
        (encode("x" * 19), Limits(bytes_max=20)),
        (encode([[]]), Limits(depth_max=2)),
        (encode([0] * 10), Limits(array_max=10)),
        (encode({str(i): 0 for i in range(10)}), Limits(map_max=10)),
        (encode("x" * 10), Limits(str_max=10)),
        (encode(b"x" * 10), Limits(bin_max=10)),
        (encode([[0] * 4, [0] * 4]), Limits(items_max=10)),
        (encode([{}, [{}]]), Limits(maps_max=2)),
    ],
)
def test_each_limit_is_reached_from_below(raw: bytes, limits: Limits) -> None:
    assert encode(decode(raw, limits)) == raw


def test_limits_deeper_than_encode_are_a_bug() -> None:
    with pytest.raises(AssertionError):
        Limits(depth_max=ENCODE_DEPTH_MAX + 1)


def loop() -> list[Any]:
    inside: list[Any] = []
    inside.append(inside)
    return inside


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        [1.0, math.nan],
        1 << 64,
        -(1 << 63) - 1,
        [0, 1 << 64],
        [-(1 << 63) - 1, 0],
        {1: 2},
        {b"k": 2},
        {None: 2},
        {"a": 1, 2: 3},
        {"a": {3, 4}},
        object(),
        bytearray(b"x"),
        "\ud800",
        {"\ud800": 1},
        msgpack.ExtType(1, b"x"),
        msgpack.Timestamp(1, 2),
        1j,
        OrderedDict(a=1),  # plain containers only: a subclass may carry what the bytes would lose
        loop(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_canonical_bytes_is_refused(value: Any) -> None:
    with pytest.raises(BadEncoding):
        encode(value)


def test_other_encoders_maps_are_read_but_are_not_canonical() -> None:
    raw = msgpack.packb({"b": 1, "a": 2})
    assert decode(raw) == {"a": 2, "b": 1}
    with pytest.raises(BadEncoding, match="not canonical"):
        decode_canonical(raw)
    with pytest.raises(BadEncoding, match="not canonical"):
        decode_canonical(b"\xcd\x00\x01")  # 1 in three bytes


LONGER = [
    "c50001aa", "c600000001aa", "cc7f", "cd00ff", "ce0000ffff", "cf00000000ffffffff", "d0e0", "d001", "d1ff80",
    "d10001", "d2ffff8000", "d200000001", "d3ffffffff80000000", "d30000000000000001", "ca3fc00000", "ca00000000",
    "d9016b", "da00016b", "db000000016b", "dc0001c0", "dd00000001c0", "de0001a16bc0", "df00000001a16bc0", "81d9016bc0",
    "82a16201a16102", "82a26161c0a161c0", "82a16bc0a0c0", "9182a16201a16102", "82a16281a161c0a161c0",
]  # fmt: skip


@pytest.mark.parametrize("hexed", LONGER)
def test_there_is_one_form_for_one_value(hexed: str) -> None:
    raw = bytes.fromhex(hexed)
    assert encode(decode(raw)) != raw
    with pytest.raises(BadEncoding, match="not canonical"):
        decode_canonical(raw)


def test_an_inner_maps_keys_stand_for_themselves() -> None:
    value = {"a": {"z": 0}, "b": [{"a": 0}, {"a": 0}], "c": {}}
    assert decode_canonical(encode(value)) == value


@pytest.mark.parametrize("size", [31, 32, 255, 256, 65_535, 65_536])
def test_the_form_changes_just_where_it_must(size: int) -> None:
    for value in ("x" * size, b"x" * size, {"k": "x" * size}, {"x" * size: 0}, [0] * size, size, -size, -size - 1):
        if isinstance(value, list) and size > 4_096:
            continue
        raw = encode(value)
        wide = Limits(bytes_max=1 << 20, str_max=1 << 20, bin_max=1 << 20)
        assert decode_canonical(raw, wide) == value


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(raw=hostile())
@pytest.mark.slow
def test_canonical_means_what_encode_writes(raw: bytes) -> None:
    """The headers alone show it: the same verdict as writing the value again and comparing."""
    try:
        same = encode(decode(raw)) == raw
    except BadEncoding:
        same = False
    try:
        decode_canonical(raw)
    except BadEncoding:
        assert not same
    else:
        assert same


class Numbers(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every kind of bounded field our messages use."""

    count: Annotated[int, msgspec.Meta(ge=0, le=1 << 53)] = 0
    large: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)] = 0
    share: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0
    speed: float = 0.0
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=9)] = "x"
    ids: Annotated[tuple[Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)], ...], msgspec.Meta(max_length=3)] = ()
    blob: bytes = b""
    flag: bool = False
    maybe: str | None = None


EXTREMES: list[Any] = [
    0,
    -1,
    1 << 31,
    1 << 53,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
    -(1 << 63),
    0.0,
    -0.0,
    5e-324,
    1e308,
    -1e308,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "x" * 10,
    b"",
    None,
    True,
    [],
    [-1],
    [1 << 31],
    [0, 0, 0, 0],
    {},
]


@pytest.mark.parametrize("field", Numbers.__struct_fields__)
@pytest.mark.parametrize("extreme", EXTREMES, ids=lambda value: repr(value)[:24])
def test_numeric_extremes_never_pass_the_decoder(field: str, extreme: Any) -> None:
    """P8: every field times every extreme is a struct within bounds or BadEncoding, nothing else."""
    raw = msgpack.packb({field: extreme})
    try:
        numbers = decode_struct(raw, Numbers)
    except BadEncoding:
        return
    assert 0 <= numbers.count <= 1 << 53
    assert 0 <= numbers.large < 1 << 63
    assert 0.0 <= numbers.share <= 1.0
    assert math.isfinite(numbers.speed)
    assert 1 <= len(numbers.name) <= 9
    assert len(numbers.ids) <= 3
    assert all(0 <= number < 1 << 31 for number in numbers.ids)
    assert type(numbers.flag) is bool
    assert field != "blob" or type(extreme) is bytes  # a text is no blob (msgspec would read base64)
    assert decode_struct(encode_struct(numbers), Numbers) == numbers


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(Numbers.__struct_fields__) | st.text(max_size=3), values, max_size=4))
def test_any_map_is_a_struct_or_bad_encoding(fields: dict[str, Any]) -> None:
    try:
        decode_struct(encode(fields), Numbers)
    except BadEncoding:
        pass


@pytest.mark.parametrize(
    "raw",
    [encode({"unknown": 1}), encode([]), encode(5), encode({"count": "1"}), encode({"blob": "aGk="}), b"\xc1", b""],
)
def test_unknown_fields_and_other_shapes_are_refused(raw: bytes) -> None:
    with pytest.raises(BadEncoding):
        decode_struct(raw, Numbers)


def test_structs_are_written_sorted_with_bytes_as_bytes() -> None:
    numbers = Numbers(blob=b"\x00\xff", ids=(1, 2), name="é")
    raw = encode_struct(numbers)
    assert decode_canonical(raw)["blob"] == b"\x00\xff"
    assert list(decode(raw)) == sorted(Numbers.__struct_fields__)
    with pytest.raises(BadEncoding):
        encode_struct(Numbers(speed=math.nan))
