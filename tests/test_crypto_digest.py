"""Digests and commitments."""

from __future__ import annotations

from pathlib import Path

import pytest

from crypto.digest import DIGEST_BYTES, NONCE_BYTES, Commitment, digest, digest_file, digest_of_text, text_of
from crypto.errors import BadEncoding

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4, "abc"


def test_golden() -> None:
    assert digest(b"abc").hex() == ABC
    assert len(digest(b"")) == DIGEST_BYTES
    assert digest(memoryview(b"xabcx")[1:4]) == digest(bytearray(b"abc")) == digest(b"abc")
    assert text_of(digest(b"abc")) == "sha256:" + ABC
    assert digest_of_text("sha256:" + ABC) == digest(b"abc")


@pytest.mark.parametrize(
    "text",
    [
        "",
        ABC,
        "sha256:",
        "sha256:" + ABC[:-1],
        "sha256:" + ABC + "0",
        "sha256:" + ABC.upper(),
        "md5:" + ABC,
        "sha256:" + ABC[:-1] + "g",
        "sha256:" + ABC[:-1] + " ",
        "sha256:" + ABC[:30] + "é" + ABC[31:],
        ABC + "sha256:",
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(BadEncoding):
        digest_of_text(text)


def test_files(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5_000
    (tmp_path / "file").write_bytes(content)
    assert digest_file(tmp_path / "file") == digest(content)
    with pytest.raises(FileNotFoundError):
        digest_file(tmp_path / "none")


def test_commitments_bind_and_open() -> None:
    nonce = bytes(NONCE_BYTES)
    promise = Commitment.to(b"content", nonce)
    assert promise.opens_to(b"content", nonce)
    assert not promise.opens_to(b"other", nonce)
    assert not promise.opens_to(b"content", b"\x01" * NONCE_BYTES)
    assert not promise.opens_to(b"ontent", nonce + b"c")  # the border between nonce and content is fixed
    assert promise.value != digest(nonce + b"content")
    with pytest.raises(AssertionError):
        Commitment.to(b"content", b"short")
