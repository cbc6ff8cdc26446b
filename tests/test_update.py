"""Updates: what was written is read, and nothing else is."""

from __future__ import annotations

import dataclasses
import hashlib
import tracemalloc
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crypto import canonical
from crypto.digest import Digest
from model.codecs import CODECS, encode
from model.delta import CHUNK, Codec
from model.errors import BadInput, BadUpdate
from model.layout import SIZE_MAX
from model.update import (
    HEAD_BYTES_MAX,
    PAYLOAD_BYTES_MAX,
    ROUND_MAX,
    STEPS_MAX,
    TOKENS_MAX,
    Expected,
    ModelUpdate,
    read_update,
    write_update,
)
from tests.vectors import KINDS, SIZES, vector

each_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
N = CHUNK + 65


def expected(codec: str = "ef64.2b", n: int = N) -> Expected:
    return Expected(
        run=Digest(b"r" * 32),
        round=7,
        base=Digest(b"b" * 32),
        peer="12D3KooW" + "a" * 44,
        layout=Digest(b"l" * 32),
        n=n,
        codec=CODECS[codec],
    )


def written(codec: str = "ef64.2b", n: int = N, seed: int = 0, steps: int = 5, tokens: int = 600) -> bytes:
    sections = encode(vector("heavy", n, seed), CODECS[codec])
    return write_update(expected(codec, n), sections, steps=steps, tokens=tokens)


def with_fields(raw: bytes, **fields: Any) -> bytes:
    """The same update with some fields otherwise; canonical, where the value has a canonical form."""
    value = {**canonical.decode(raw), **fields}
    return bytes(msgpack.packb(dict(sorted(value.items()))))


# --- there and back ---


@each_codec
def test_what_was_written_is_read(codec: Codec) -> None:
    for n in SIZES:
        given_N = vector("heavy", n, n)
        sections = encode(given_N, codec)
        raw = write_update(expected(codec.name, n), sections, steps=3, tokens=TOKENS_MAX)
        update, delta = read_update(raw, expected(codec.name, n))
        assert (update.steps, update.tokens, update.k, update.n) == (3, TOKENS_MAX, codec.k, n)
        assert (update.idx, update.val, update.scale) == (sections.idx, sections.val, sections.scale)
        assert torch.equal(delta.dense(0, n), codec.decode(sections, n).dense(0, n))


def test_an_update_is_plain_msgpack_in_the_order_of_its_keys() -> None:
    """Whoever writes a peer in another language reads this; the digest may never change."""
    raw = written()
    fields = msgpack.unpackb(raw)
    assert list(fields) == sorted(ModelUpdate.__struct_fields__)
    assert hashlib.sha256(raw).hexdigest() == "54ff7ddc9637e0604be90763da90f28c8ef55a357dd4737009902f45bc51bf09"


def test_bounds_of_what_we_write() -> None:
    for steps, tokens in ((1, 1), (STEPS_MAX, TOKENS_MAX)):
        update, _ = read_update(written(steps=steps, tokens=tokens), expected())
        assert (update.steps, update.tokens) == (steps, tokens)
    for steps, tokens in ((0, 1), (1, 0), (STEPS_MAX + 1, 1), (1, TOKENS_MAX + 1)):
        with pytest.raises(AssertionError):
            written(steps=steps, tokens=tokens)


def test_a_head_has_room_for_the_largest_numbers() -> None:
    largest = dataclasses.replace(expected("ef256.2b"), round=ROUND_MAX, peer="p" * 64)
    raw = write_update(largest, encode(vector("heavy", N), largest.codec), steps=STEPS_MAX, tokens=TOKENS_MAX)
    assert read_update(raw, largest)[0].round == ROUND_MAX
    assert len(raw) - largest.sections_bytes < HEAD_BYTES_MAX - 100


# --- what is refused ---


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run", b"x" * 32),
        ("round", 8),
        ("base", b"x" * 32),
        ("peer", "12D3KooW" + "b" * 44),
        ("codec", "ef256.2b"),
        ("n", N + 1),
        ("k", 65),
        ("layout", b"x" * 32),
    ],
)
def test_an_update_of_another_round_names_the_field(field: str, value: object) -> None:
    with pytest.raises(BadUpdate, match=f"the update says {field} "):
        read_update(with_fields(written(), **{field: value}), expected())


WRONG_INTS = (-1, 2**63, 2**64 - 1, -(2**63), 1.0, True, False, None, "1", b"1", [], {})
WRONG_BYTES = (b"", b"x" * 31, b"x" * 33, "x" * 32, 0, None, [], {})
WRONG_TEXTS = ("", "x" * 65, b"x", 0, None, [], {})


@pytest.mark.parametrize("field", ModelUpdate.__struct_fields__)
def test_fields_of_another_type_or_range(field: str) -> None:
    if field in ("idx", "val", "scale", "run", "base", "layout"):
        wrongs: tuple[object, ...] = WRONG_BYTES
    elif field in ("peer", "codec"):
        wrongs = WRONG_TEXTS
    else:
        bounds = {"steps": (0, STEPS_MAX + 1), "tokens": (0, TOKENS_MAX + 1), "v": (0, 2), "round": (ROUND_MAX + 1,)}
        wrongs = (*WRONG_INTS, *bounds.get(field, ()))
    raw = written()
    for wrong in wrongs:
        with pytest.raises(BadUpdate):
            read_update(with_fields(raw, **{field: wrong}), expected())
    left_out = canonical.decode(raw)
    del left_out[field]
    with pytest.raises(BadUpdate):
        read_update(canonical.encode(left_out), expected())


def test_a_field_more_is_refused() -> None:
    with pytest.raises(BadUpdate, match="array or map of 15"):
        read_update(with_fields(written(), extra=1), expected())
    renamed = canonical.decode(written())
    renamed["tokens2"] = renamed.pop("tokens")
    with pytest.raises(BadUpdate, match="tokens2"):
        read_update(canonical.encode(renamed), expected())


def test_another_form_of_the_same_value_is_refused() -> None:
    """One value, one digest: keys in another order, headers longer than needed."""
    raw = written()
    value = canonical.decode(raw)
    for forms in (
        msgpack.packb(dict(reversed(value.items()))),
        b"\xde\x00\x0e" + raw[1:],
        raw.replace(b"\xa5steps\x05", b"\xa5steps\xcc\x05"),
        raw.replace(b"\xa3run\xc4\x20", b"\xa3run\xc5\x00\x20"),
        raw.replace(b"\xa1v\x01", b"\xd9\x01v\x01"),
    ):
        assert canonical.decode(forms, expected().limits) == value
        with pytest.raises(BadUpdate, match="canonical"):
            read_update(forms, expected())


def test_sections_of_another_length_are_refused() -> None:
    raw = written()
    value = canonical.decode(raw)
    moved = {"idx": value["idx"][:-1], "val": value["val"] + b"\0"}  # of the same length together
    with pytest.raises(BadUpdate, match="bytes, wanted"):
        read_update(with_fields(raw, **moved), expected())


@each_codec
def test_cut_or_lengthened_bytes_are_refused(codec: Codec) -> None:
    raw = written(codec.name, 65)
    for size in range(len(raw)):
        with pytest.raises(BadUpdate):
            read_update(raw[:size], expected(codec.name, 65))
    for more in (b"\0", raw, b"\xc0" * 600):
        with pytest.raises(BadUpdate):
            read_update(raw + more, expected(codec.name, 65))


@each_codec
@settings(max_examples=80, deadline=None)
@given(kind=st.sampled_from(KINDS), n=st.sampled_from(SIZES), at=st.integers(0), bits=st.integers(1, 255))
@pytest.mark.slow
def test_a_changed_byte_is_refused_or_is_another_update(codec: Codec, kind: str, n: int, at: int, bits: int) -> None:
    """What is still taken says something else, in the one way in which that is said."""
    wanted = expected(codec.name, n)
    raw = bytearray(write_update(wanted, encode(vector(kind, n, at % 97), codec), steps=5, tokens=600))
    raw[at % len(raw)] ^= bits
    try:
        update, delta = read_update(bytes(raw), wanted)
    except BadUpdate:
        return
    again = write_update(wanted, encode(delta.dense(0, n), codec), steps=update.steps, tokens=update.tokens)
    assert again == raw


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=700))
def test_any_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(BadUpdate):
        read_update(raw, expected(n=3))


# --- memory ---


def peak_bytes(raw: bytes, wanted: Expected) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(BadUpdate):
            read_update(raw, wanted)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_false_length_takes_no_memory() -> None:
    large = expected("ef64.2b", SIZE_MAX)
    assert peak_bytes(written(), large) < 100_000
    assert peak_bytes(bytes(1 << 20), expected()) < 100_000
    claims = written().replace(b"\xa3idx\xc4\x80", b"\xa3idx\xc6\xff\xff\xff\xff")
    assert len(claims) > len(written())
    assert peak_bytes(claims, expected()) < 100_000
    assert peak_bytes(written().replace(b"\xa3val\xc4", b"\xa3val\xdd"), expected()) < 100_000


def test_a_payload_is_copied_once() -> None:
    n = 1_000_000
    raw, wanted = written("fp32", n), expected("fp32", n)
    tracemalloc.start()
    read_update(raw, wanted)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    slices_bytes = 8 << 20  # the check of the numbers, a slice at a time
    assert peak < len(raw) + slices_bytes


def test_a_payload_over_the_bound_is_refused_before_it_is_made() -> None:
    for codec in ("fp32", "bf16", "int4"):
        with pytest.raises(BadInput, match="choose ef64"):
            expected(codec, 1_000_000_000)
    assert expected("ef64.2b", 1_000_000_000).sections_bytes < 21_000_000
    assert expected("ef64.2b", SIZE_MAX).sections_bytes < PAYLOAD_BYTES_MAX
    assert expected("fp32", PAYLOAD_BYTES_MAX // 4).sections_bytes == PAYLOAD_BYTES_MAX
