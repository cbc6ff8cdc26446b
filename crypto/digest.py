"""Content ids of bytes (SHA-256), and commitments to bytes that are shown later.

Rules: a Digest is 32 raw bytes; its text form is "sha256:" and 64 lower-case hex digits.

Source: FIPS 180-4.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NewType

from crypto.errors import BadEncoding

Digest = NewType("Digest", bytes)

DIGEST_BYTES: Final = 32
NONCE_BYTES: Final = 32  # as long as the digest, so that guessing the nonce is no easier than inverting it
_TEXT_PREFIX: Final = "sha256:"
_COMMITMENT_TAG: Final = b"openagi:commitment:"  # keeps a commitment from being any other digest of ours


def digest(content: bytes | bytearray | memoryview) -> Digest:
    """The SHA-256 of these bytes."""
    return Digest(hashlib.sha256(content).digest())


def digest_file(path: Path) -> Digest:
    """The SHA-256 of a file's content, read in blocks. Blocks the thread. Raises OSError."""
    with path.open("rb") as file:
        return Digest(hashlib.file_digest(file, "sha256").digest())


def text_of(content_id: Digest) -> str:
    """ "sha256:<hex>"."""
    return _TEXT_PREFIX + content_id.hex()


def digest_of_text(text: str) -> Digest:
    """The digest that `text_of` wrote. Raises BadEncoding on any other text."""
    digits = text.removeprefix(_TEXT_PREFIX)
    if len(text) != len(_TEXT_PREFIX) + 2 * DIGEST_BYTES or digits.strip("0123456789abcdef"):
        raise BadEncoding(f"{text[:80]!a} came, wanted sha256: and {2 * DIGEST_BYTES} lower-case hex digits")
    return Digest(bytes.fromhex(digits))


@dataclass(frozen=True, slots=True)
class Commitment:
    """A promise to show certain bytes later: binds the maker, hides the bytes until the nonce is shown."""

    value: Digest

    @classmethod
    def to(cls, content: bytes, nonce: bytes) -> Commitment:
        """Commit to `content` under a secret random nonce of NONCE_BYTES."""
        assert len(nonce) == NONCE_BYTES, "the nonce is ours to choose"
        return cls(_committed(content, nonce))

    def opens_to(self, content: bytes, nonce: bytes) -> bool:
        """Whether these are the bytes and the nonce that were committed to."""
        return len(nonce) == NONCE_BYTES and hmac.compare_digest(self.value, _committed(content, nonce))


def _committed(content: bytes, nonce: bytes) -> Digest:
    return digest(_COMMITMENT_TAG + nonce + content)
