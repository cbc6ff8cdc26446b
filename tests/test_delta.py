"""Codecs: what is kept, how well, one encoding for one value, and nothing else let through."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model import bfloat16
from model.blockwise import BlockCodec
from model.codecs import CODECS, codec_named, decode, encode
from model.delta import CHUNK, MAGNITUDE_MAX, SLICE, Codec, Delta, HasEntries, Sections
from model.errors import BadInput, BadUpdate, ComputeFailed
from model.layout import SIZE_MAX
from model.sparse import SparseCodec, two_levels
from tests.vectors import KINDS, SIZES, vector

ROOT = Path(__file__).parent.parent
each_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
SPARSES = [SparseCodec(k) for k in (16, 64, 256)]
each_sparse = pytest.mark.parametrize("codec", SPARSES, ids=lambda codec: codec.name)
seeds = st.integers(0, 2**32)
PARTS = ("idx", "val", "scale")


def whole(delta: Delta) -> torch.Tensor:
    return delta.dense(0, delta.n)


def changed(sections: Sections, part: str, content: bytes) -> Sections:
    return Sections(**{name: content if name == part else getattr(sections, name) for name in PARTS})


# --- one encoding for one value ---


@each_codec
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_decoded_is_encoded_to_the_same_bytes(codec: Codec, kind: str) -> None:
    for n in SIZES:
        sections = encode(vector(kind, n, n), codec)
        delta = decode(sections, codec, n)
        assert delta.n == n
        assert delta.sparse == codec.name.startswith("ef")
        assert encode(whole(delta), codec) == sections


@each_codec
@settings(max_examples=60, deadline=None)
@example(kind="wide", n=CHUNK + 65, seed=0, part=2, at=0, bits=0x80)
@given(
    kind=st.sampled_from(KINDS), n=st.sampled_from(SIZES), seed=seeds, part=st.integers(0, 2), at=st.integers(0),
    bits=st.integers(1, 255),
)  # fmt: skip
@pytest.mark.slow
def test_a_changed_byte_is_refused_or_is_another_value(
    codec: Codec, kind: str, n: int, seed: int, part: int, at: int, bits: int
) -> None:
    """What is taken is what `encode` writes for the value read from it: no two encodings have one value."""
    sections = encode(vector(kind, n, seed), codec)
    content = bytearray(getattr(sections, PARTS[part]))
    if not content:
        return
    content[at % len(content)] ^= bits
    forged = changed(sections, PARTS[part], bytes(content))
    try:
        delta = decode(forged, codec, n)
    except BadUpdate:
        return
    assert encode(whole(delta), codec) == forged


@each_codec
@settings(max_examples=60, deadline=None)
@given(n=st.sampled_from(SIZES), seed=seeds)
@pytest.mark.slow
def test_any_bytes_of_the_right_lengths_are_refused_or_canonical(codec: Codec, n: int, seed: int) -> None:
    chance = np.random.default_rng(seed)
    forged = Sections(*(chance.bytes(size) for size in codec.sizes(n)))
    try:
        delta = decode(forged, codec, n)
    except BadUpdate:
        return
    assert encode(whole(delta), codec) == forged


@each_codec
def test_encodings_never_change(codec: Codec) -> None:
    """Runs go on across versions: these digests may never change."""
    sections = encode(torch.cat([vector(kind, CHUNK + 65, 5) for kind in KINDS]), codec)
    assert hashlib.sha256(sections.idx + sections.val + sections.scale).hexdigest()[:16] == DIGESTS[codec.name]


DIGESTS = {
    "ef64.2b": "d6a5788baebd77ef",
    "ef256.2b": "9f2218819b4d2037",
    "int8": "68d37bacc95adbd2",
    "int4": "9c5ed583840d33b4",
    "bf16": "f404899499e79197",
    "fp32": "59f37e6c83ce219e",
}


# --- slices ---


@each_codec
def test_slices_are_parts_of_the_whole(codec: Codec) -> None:
    n = 3 * CHUNK + 7
    given_N = vector("heavy", n, 1)
    delta = decode(encode(given_N, codec), codec, n)
    all_N = whole(delta)
    assert all_N.dtype is torch.float32
    for start in range(0, n, CHUNK):
        for stop in (start, start + 1, min(n, start + CHUNK), n):
            assert torch.equal(delta.dense(start, stop), all_N[start:stop])
            sent = delta.sent(start, stop)
            assert torch.equal(sent, all_N[start:stop] != 0 if delta.sparse else torch.ones(stop - start).bool())
            assert isinstance(delta, HasEntries) == delta.sparse
            if isinstance(delta, HasEntries):
                places, values = delta.entries(start, stop)
                assert torch.equal(places, sent.nonzero().flatten())
                assert torch.equal(values, all_N[start:stop][sent])
    delta.dense(0, n).fill_(9)
    assert torch.equal(whole(delta), all_N), "who reads a delta owns what was read"


@each_codec
def test_vectors_longer_than_a_slice(codec: Codec) -> None:
    n = 2 * SLICE + 4097
    given_N = vector("heavy", n, 1)
    sections = encode(given_N, codec)
    for start in range(0, n, SLICE):
        part = encode(given_N[start : start + SLICE].clone(), codec)
        assert torch.equal(
            decode(sections, codec, n).dense(start, min(n, start + SLICE)),
            whole(decode(part, codec, min(SLICE, n - start))),
        )


# --- top k ---


def reference_choice(chunk: list[float], k: int) -> set[int]:
    """By the rule's words: the largest magnitudes, of equals the lowest index, never a zero."""
    ranked = sorted(range(len(chunk)), key=lambda at: (-abs(chunk[at]), at))
    return {at for at in ranked[:k] if abs(chunk[at]) >= bfloat16.NORMAL_MIN}


@each_sparse
@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_of_each_chunk_are_sent_and_of_equals_the_first(codec: SparseCodec, kind: str) -> None:
    for n in (1, 63, 65, CHUNK - 1, CHUNK, 2 * CHUNK + 100):
        given_N = vector(kind, n, n)
        delta = decode(encode(given_N, codec), codec, n)
        for start in range(0, n, CHUNK):
            stop = min(n, start + CHUNK)
            sent = set(delta.sent(start, stop).nonzero().flatten().tolist())
            assert sent == reference_choice(given_N[start:stop].tolist(), codec.k)


@each_sparse
@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=seeds)
@pytest.mark.slow
def test_a_sent_value_has_its_sign_and_one_of_the_two_best_levels(codec: SparseCodec, kind: str, seed: int) -> None:
    given_N = vector(kind, CHUNK, seed)
    got_N = whole(decode(encode(given_N, codec), codec, CHUNK))
    sent_N = got_N != 0
    assert torch.equal(got_N.sign(), given_N.sign() * sent_N)
    levels = got_N[sent_N].abs().unique()
    assert len(levels) <= 2
    true = np.sort(given_N[sent_N].abs().double().numpy())
    loss = float(((got_N - given_N)[sent_N].double() ** 2).sum())
    best = min((squares(true[:cut]) + squares(true[cut:]) for cut in range(len(true))), default=0.0)
    rounding = float((true**2).sum()) * 2.0**-16  # of the levels to bf16: half a place in 2**8, squared
    assert loss <= best + rounding + 1e-300


@pytest.mark.parametrize("others", [(1.001,), (1.001, 1.0015), (1.001, -1.0)])
def test_levels_that_bf16_cannot_tell_apart_are_one(others: tuple[float, ...]) -> None:
    given_N = torch.tensor([1.0, *others])
    sections = encode(given_N, SPARSE)
    got_N = whole(decode(sections, SPARSE, len(given_N)))
    assert got_N.abs().tolist() == [1.0] * len(given_N)
    assert encode(got_N, SPARSE) == sections


def squares(numbers: np.ndarray) -> float:
    """The squared distance to the mean."""
    return float(((numbers - numbers.mean()) ** 2).sum()) if len(numbers) else 0.0


def test_two_levels_lose_less_than_the_usual_two_bits() -> None:
    """Against one level (sign and mean), and four even steps of the largest: on bell-shaped and on heavy values."""
    for power, most in ((1, 0.07), (3, 0.22)):
        values = np.random.default_rng(1).standard_normal((200, CHUNK)) ** power
        top = np.sort(np.abs(values), axis=1)[:, -64:]
        high, patterns = two_levels(top, np.full(200, 64))
        levels = bfloat16.numbers_of(patterns)
        ours = relative(np.where(high, levels[:, 1:], levels[:, :1]), top)
        one = relative(np.broadcast_to(top.mean(1, keepdims=True), top.shape), top)
        peak = top.max(1, keepdims=True)
        even = relative(np.where(top > peak * 2 / 3, peak, peak / 3), top)
        assert ours < 0.65 * min(one, even)
        assert ours < most


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


# --- how well dense codecs keep values ---


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_integer_is_within_half_a_step_of_its_element(name: str, kind: str) -> None:
    codec = codec_named(name)
    assert isinstance(codec, BlockCodec)
    n = 3 * CHUNK + 7
    given_N = vector(kind, n, 3)
    got_N = whole(decode(encode(given_N, codec), codec, n))
    for start in range(0, n, codec.block):
        given_b, got_b = given_N[start : start + codec.block].double(), got_N[start : start + codec.block].double()
        peak = float(given_b.abs().max())
        step = peak / codec.largest * (1 + 2.0**-8) if peak / codec.largest >= bfloat16.NORMAL_MIN else 2 * peak
        assert float((given_b - got_b).abs().max()) <= step / 2 * (1 + 1e-6)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_largest_of_a_block_takes_the_largest_integer(name: str) -> None:
    """Whatever bf16 makes of its scale: at the middle between two of them, and around it."""
    codec = codec_named(name)
    assert isinstance(codec, BlockCodec)
    middles = np.float32(1.0) + (2 * np.arange(128, dtype=np.float32) + 1) * np.float32(2.0**-8)
    for scales in (middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(9))):
        peaks = torch.from_numpy(scales * np.float32(codec.largest)).repeat_interleave(codec.block)
        for sign in (1, -1):
            decode(encode(sign * peaks, codec), codec, len(peaks))


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_is_exact_and_bf16_nearly(kind: str) -> None:
    given_N = vector(kind, 3 * CHUNK + 7, 3)
    given_N[given_N.abs() < bfloat16.NORMAL_MIN] = 0.0
    assert torch.equal(whole(decode(encode(given_N, CODECS["fp32"]), CODECS["fp32"], len(given_N))), given_N)
    got_N = whole(decode(encode(given_N, CODECS["bf16"]), CODECS["bf16"], len(given_N)))
    assert torch.equal(got_N, given_N.bfloat16().float()), "the nearest bf16, ties to even, as torch rounds"


def test_subnormal_numbers_and_negative_zero_are_written_as_zero() -> None:
    tiny = torch.tensor([1e-40, -1e-40, -0.0, bfloat16.NORMAL_MIN, -bfloat16.NORMAL_MIN])
    for name in ("fp32", "bf16", "ef64.2b"):
        got = whole(decode(encode(tiny, CODECS[name]), CODECS[name], 5))
        assert got.tolist() == [0, 0, 0, bfloat16.NORMAL_MIN, -bfloat16.NORMAL_MIN]
        assert not torch.signbit(got[:3]).any()


@each_codec
def test_numbers_at_the_bound_are_taken_and_over_it_refused(codec: Codec) -> None:
    edge = torch.tensor([MAGNITUDE_MAX, -MAGNITUDE_MAX, 1.0])
    assert whole(decode(encode(edge, codec), codec, 3)).abs().max() <= MAGNITUDE_MAX
    for bad in (math.nan, math.inf, -math.inf, 2 * MAGNITUDE_MAX, -2 * MAGNITUDE_MAX):
        with pytest.raises(ComputeFailed, match="diverged"):
            encode(torch.tensor([1.0, bad, 0.0]), codec)


# --- what is not believed ---


@each_codec
def test_lengths_follow_from_codec_and_size_alone(codec: Codec) -> None:
    for n in SIZES:
        sections = encode(vector("heavy", n), codec)
        assert tuple(len(getattr(sections, part)) for part in PARTS) == codec.sizes(n)
        assert sections.size_bytes == sum(codec.sizes(n))
        for part in PARTS:
            content = getattr(sections, part)
            for wrong in (content[:-1] if content else b"\0", content + b"\0", content * 2 or b"\0\0"):
                with pytest.raises(BadUpdate, match="bytes, wanted"):
                    decode(changed(sections, part, wrong), codec, n)


@each_codec
def test_a_false_length_takes_no_memory(codec: Codec) -> None:
    sections = encode(vector("heavy", 10), codec)
    tracemalloc.start()
    with pytest.raises(BadUpdate, match="wanted"):
        decode(sections, codec, SIZE_MAX)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_the_payload_of_a_25_million_model_is_half_a_megabyte() -> None:
    assert sum(CODECS["ef64.2b"].sizes(25_500_000)) == 522_984


def test_names() -> None:
    assert codec_named("ef64.2b").k == 64
    assert codec_named("int4").k == CHUNK
    with pytest.raises(BadInput, match="wanted one of"):
        codec_named("zstd")


SPARSE: Codec = CODECS["ef64.2b"]
RIGHT = encode(vector("heavy", CHUNK + 65, 9), SPARSE)
ONE = encode(torch.tensor([0.5, 0.0, 0.0]), SPARSE)  # one value: slot 0 of coordinate 0
NONE = encode(torch.zeros(3), SPARSE)
BF16_ONE = 0x3F80


def with_bits(content: bytes, *bits: int) -> bytes:
    """These bits turned over; bit 0 is the least significant of the first byte."""
    number = int.from_bytes(content, "little")
    for bit in bits:
        number ^= 1 << bit
    return number.to_bytes(len(content), "little")


def levels(*patterns: int) -> bytes:
    return b"".join(pattern.to_bytes(2, "little") for pattern in patterns)


UNARY = 48 * 8  # the first bit of a chunk's bitmap


@pytest.mark.parametrize(
    ("sections", "n", "reason"),
    [
        (changed(RIGHT, "idx", RIGHT.idx[:48] + b"\xff" * 16 + RIGHT.idx[64:]), CHUNK + 65, "128 coordinates"),
        (changed(ONE, "idx", with_bits(ONE.idx, UNARY, UNARY + 64)), 3, "outside its chunk"),
        (changed(ONE, "idx", with_bits(ONE.idx, UNARY, UNARY + 127)), 3, "outside its chunk"),
        (changed(ONE, "idx", with_bits(ONE.idx, 0, 1)), 3, "after the end"),
        (changed(ONE, "idx", with_bits(ONE.idx, UNARY + 1)), 3, "do not increase"),
        (changed(ONE, "idx", with_bits(ONE.idx, 6)), 3, "slot without a coordinate"),
        (changed(ONE, "val", with_bits(ONE.val, 1)), 3, "slot without a coordinate"),
        (changed(ONE, "val", with_bits(ONE.val, 65)), 3, "one is not used"),
        (changed(ONE, "val", with_bits(ONE.val, 64)), 3, "one is not used"),
        (changed(ONE, "scale", levels(BF16_ONE, BF16_ONE + 1)), 3, "one is not used"),
        (changed(ONE, "scale", levels(0, 0)), 3, "a level is not a number"),
        (changed(ONE, "scale", levels(0x7F, 0x7F)), 3, "a level is not a number"),
        (changed(ONE, "scale", levels(0x5F81, 0x5F81)), 3, "a level is not a number"),
        (changed(ONE, "scale", levels(0x7F80, 0x7F80)), 3, "a level is not a number"),
        (changed(ONE, "scale", levels(0x7FC0, 0x7FC0)), 3, "a level is not a number"),
        (changed(ONE, "scale", levels(0xBF80, 0xBF80)), 3, "a level is not a number"),
        (changed(NONE, "scale", levels(BF16_ONE, BF16_ONE)), 3, "sends nothing"),
        (changed(NONE, "scale", levels(0x8000, 0x8000)), 3, "sends nothing"),
        (changed(RIGHT, "scale", RIGHT.scale[2:4] + RIGHT.scale[:2] + RIGHT.scale[4:]), CHUNK + 65, "is the larger"),
        (changed(RIGHT, "val", RIGHT.val[:8] + bytes(8) + RIGHT.val[16:]), CHUNK + 65, "one is not used"),
        (changed(RIGHT, "val", RIGHT.val[:8] + b"\xff" * 8 + RIGHT.val[16:]), CHUNK + 65, "one is not used"),
    ],
)
def test_forged_sparse_sections(sections: Sections, n: int, reason: str) -> None:
    with pytest.raises(BadUpdate, match=reason):
        decode(sections, SPARSE, n)


BYTE = encode(torch.tensor([0.5, -0.25, 0.1]), CODECS["int8"])
HALF = encode(torch.tensor([0.5, -0.25, 0.1]), CODECS["int4"])


@pytest.mark.parametrize(
    ("name", "sections", "reason"),
    [
        ("int8", changed(BYTE, "val", b"\x80\x7f\x00"), "largest integer"),
        ("int8", changed(BYTE, "val", b"\x7e\x00\x00"), "largest integer"),
        ("int8", changed(BYTE, "scale", b"\0\0"), "largest integer"),
        ("int8", changed(BYTE, "val", bytes(3)), "largest integer"),
        ("int8", changed(BYTE, "scale", b"\x7f\x00"), "neither zero nor"),
        ("int8", changed(BYTE, "scale", b"\x80\x7f"), "neither zero nor"),
        ("int8", changed(BYTE, "scale", b"\x02\x5c"), "neither zero nor"),
        ("int8", changed(BYTE, "scale", b"\x00\x80"), "neither zero nor"),
        ("int4", changed(HALF, "val", b"\x78\x00"), "largest integer"),
        ("int4", changed(HALF, "val", b"\x06\x00"), "largest integer"),
        ("int4", changed(HALF, "val", HALF.val[:1] + bytes([HALF.val[1] | 0x10])), "half byte"),
        ("int4", changed(HALF, "scale", b"\x80\xff"), "neither zero nor"),
        ("fp32", Sections(b"", np.array([0, np.nan, 0], "<f4").tobytes(), b""), "not a number of at most"),
        ("fp32", Sections(b"", np.array([0, -np.inf, 0], "<f4").tobytes(), b""), "not a number of at most"),
        ("fp32", Sections(b"", np.array([0, -(2.0**65), 0], "<f4").tobytes(), b""), "not a number of at most"),
        ("fp32", Sections(b"", np.array([0, -0.0, 0], "<f4").tobytes(), b""), "negative zero"),
        ("fp32", Sections(b"", np.array([0, 1e-40, 0], "<f4").tobytes(), b""), "subnormal"),
        ("bf16", Sections(b"", levels(0, 0xFFC0, 0), b""), "not a number of at most"),
        ("bf16", Sections(b"", levels(0, 0x7F80, 0), b""), "not a number of at most"),
        ("bf16", Sections(b"", levels(0, 0x8000, 0), b""), "negative zero"),
        ("bf16", Sections(b"", levels(0, 0x007F, 0), b""), "subnormal"),
    ],
)
def test_forged_dense_sections(name: str, sections: Sections, reason: str) -> None:
    with pytest.raises(BadUpdate, match=reason):
        decode(sections, CODECS[name], 3)


# --- the same bits everywhere ---

LEVELS = ("DEFAULT", "AVX2", "AVX512")
HERE = torch.backends.cpu.get_cpu_capability()


def bits(level: str) -> dict[str, Any]:
    """What a process makes that has these of the processor's instructions; DEFAULT keeps numpy to its least, too."""
    least = {"NPY_DISABLE_CPU_FEATURES": " ".join(found_by_numpy())} if level == "DEFAULT" else {}
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": level.lower(), **least}
    command = [sys.executable, "-W", "ignore", "-m", "tests.codec_bits"]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=ROOT)
    return dict(json.loads(made.stdout))


def found_by_numpy() -> list[str]:
    """What this processor has of the instructions that numpy chooses among when it is imported."""
    simd = np.show_config(mode="dicts")["SIMD Extensions"]
    return list(simd.get("found", []))


@pytest.mark.slow
def test_every_machine_makes_the_same_bits() -> None:
    """With the instructions of old and of new processors, and with one thread and two."""
    levels = LEVELS[: LEVELS.index(HERE) + 1] if HERE in LEVELS else (HERE,)
    made = [bits(level) for level in levels]
    if HERE in LEVELS:
        assert [each["torch"] for each in made] == list(levels), "a setting had no effect"
    if found_by_numpy():
        assert made[0]["numpy"] != made[-1]["numpy"] or len(made) == 1, "a setting had no effect"
    digests = [each["digests"] for each in made]
    assert all(each == digests[0] for each in digests)
    for codec in CODECS:
        assert digests[0][f"{codec}, 1 threads"] == digests[0][f"{codec}, 2 threads"]
