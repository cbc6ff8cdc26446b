"""Frames: whole or absent, however the bytes are cut; bounded before they are kept (SECURITY.md P2)."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2p.errors import LocalProtocolError, RemoteProtocolError
from p2p.frame import LENGTH_BYTES, FrameReader, encode_frame
from p2p.transport import FRAME_BYTES_MAX


def cut(raw: bytes, places: list[int]) -> list[bytes]:
    ends = sorted(place % (len(raw) + 1) for place in places)
    return [raw[start:end] for start, end in zip([0, *ends], [*ends, len(raw)], strict=True)]


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.binary(max_size=50), max_size=8), st.lists(st.integers(0, 1000), max_size=12))
def test_frames_come_out_whole_however_they_are_cut(frames: list[bytes], places: list[int]) -> None:
    reader = FrameReader()
    raw = b"".join(map(encode_frame, frames))
    got = [frame for chunk in cut(raw, places) for frame in reader.feed(chunk)]
    assert got == frames
    assert reader.bytes_pending == 0


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.binary(max_size=20), min_size=1, max_size=4), st.integers(1, 200))
def test_a_cut_frame_never_comes_out(frames: list[bytes], missing: int) -> None:
    raw = b"".join(map(encode_frame, frames))
    reader = FrameReader()
    sent = raw[: max(0, len(raw) - missing)]
    got = reader.feed(sent)
    assert got == frames[: len(got)]
    assert len(got) < len(frames)
    assert reader.bytes_pending == len(sent) - sum(LENGTH_BYTES + len(frame) for frame in got)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.binary(max_size=30), max_size=10), st.integers(1, 40))
def test_any_bytes_give_frames_or_a_remote_error_and_little_is_kept(chunks: list[bytes], bytes_max: int) -> None:
    reader = FrameReader(bytes_max)
    for chunk in chunks:
        try:
            frames = reader.feed(chunk)
        except RemoteProtocolError:
            assert reader.bytes_pending == 0
            continue
        assert all(len(frame) <= bytes_max for frame in frames)
        assert reader.bytes_pending < LENGTH_BYTES + bytes_max


def test_one_byte_at_a_time() -> None:
    reader = FrameReader()
    raw = encode_frame(b"ab") + encode_frame(b"")
    assert [reader.feed(raw[i : i + 1]) for i in range(len(raw))] == [[]] * 5 + [[b"ab"]] + [[]] * 3 + [[b""]]


def test_the_largest_frame_passes_and_one_more_byte_does_not() -> None:
    largest = b"x" * FRAME_BYTES_MAX
    assert FrameReader().feed(encode_frame(largest)) == [largest]
    with pytest.raises(LocalProtocolError, match=str(FRAME_BYTES_MAX)):
        encode_frame(largest + b"x")


@pytest.mark.parametrize("size", [FRAME_BYTES_MAX + 1, 1 << 31, (1 << 32) - 1])
def test_an_oversize_length_is_refused_at_once_and_for_good(size: int) -> None:
    reader = FrameReader()
    head = size.to_bytes(LENGTH_BYTES, "big")
    assert reader.feed(head[:3]) == []
    with pytest.raises(RemoteProtocolError, match=str(size)):
        reader.feed(head[3:])
    assert reader.bytes_pending == 0
    with pytest.raises(RemoteProtocolError):
        reader.feed(encode_frame(b"as if nothing had happened"))


def test_a_tighter_bound_holds() -> None:
    with pytest.raises(RemoteProtocolError, match="at most 10"):
        FrameReader(10).feed(encode_frame(b"x" * 11))
    assert FrameReader(10).feed(encode_frame(b"x" * 10)) == [b"x" * 10]


def test_memoryviews_and_bytearrays_are_copied() -> None:
    chunk = bytearray(encode_frame(b"abc"))
    (frame,) = FrameReader().feed(memoryview(chunk))
    chunk[:] = b"z" * len(chunk)
    assert frame == b"abc"
