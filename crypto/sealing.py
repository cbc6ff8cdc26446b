"""A request sealed to the peer that serves it, and its answer sealed to who asked: nobody on the way reads either.

Rules: core; only HPKE's own ephemeral key is chance that does not come in. A serving peer has a key pair for this
alone, and its identity signs the public part (an envelope of domain `sealing`). A request is HPKE, base mode, one
message; `info` names protocol, network, serving peer and request id, so that nothing sealed for one opens as another.
Inside stands a secret of the asker's; with a salt of the serving peer's it gives the key of the answer, so that no two
answers share a key, even to one request that was answered twice. The answer's frames are numbered by their nonces,
padded, and the last one says so: one that was changed, left out, repeated or moved does not open, and a cut is no end.

Source: RFC 9180 (HPKE: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-128-GCM, which browsers have too); RFC 9458
section 4.4 (answers of a one-message request, with a salt); NIST SP 800-38D 8.2.1 (a counter as nonce); arXiv
2403.09751 (tokens read off the lengths of encrypted frames).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from crypto.envelope import SKEW_MS, open_envelope, seal
from crypto.errors import BadEncoding, BadKey, BadSeal, BadSignature
from crypto.identity import Identity, PeerId

KEY_BYTES: Final = 32
SECRET_BYTES: Final = 32  # the asker's, of which the answer's key is made
SALT_BYTES: Final = 32
ENC_BYTES: Final = 32  # HPKE's encapsulated key, the first bytes of what is sealed
TAG_BYTES: Final = 16
REQUEST_ID_BYTES: Final = 16
ANSWER_KEY_BYTES: Final = 16
NONCE_BYTES: Final = 12
LENGTH_BYTES: Final = 4  # of the content of a frame, before its padding
PAD_BYTES: Final = 512  # a frame's plain text is a multiple: one token's event fits, whatever the token
CONTENT_BYTES_MAX: Final = 65_536 - LENGTH_BYTES
FRAME_BYTES_MAX: Final = 1 + 65_536 + TAG_BYTES
FRAMES_MAX: Final = 1 << 32  # of one answer, under one key
KIND_SALT: Final = 0  # a frame's first byte
KIND_MORE: Final = 1
KIND_LAST: Final = 2
SUITE_ID: Final = bytes.fromhex("002000010001")  # RFC 9180 section 7: KEM, KDF and AEAD, 2 bytes each
DOMAIN: Final = "sealing"  # of the statement that names a key
_REQUEST: Final = b"openagi:sealed:1:request"
_ANSWER: Final = b"openagi:sealed:1:answer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a sealed request belongs to. request_id: REQUEST_ID_BYTES that the asker drew."""

    network: str
    peer: PeerId  # who is to open it
    request_id: bytes

    def info(self, label: bytes) -> bytes:
        """These facts as bytes that no others have, for one use."""
        parts = (label, self.network.encode(), self.peer.encode(), self.request_id)
        return b"".join(len(part).to_bytes(2, "big") + part for part in parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class SealingKey:
    """A peer's present key for what is sealed to it, as its identity has signed it."""

    peer: PeerId
    public: bytes
    expires_ms: int  # Unix milliseconds by the peer's clock


@dataclass(frozen=True, slots=True)
class Opened:
    """A request that opened: what it says, and the secret for its answer."""

    secret: bytes = field(repr=False)
    content: bytes = field(repr=False)


def _suite() -> Suite:
    return Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_128_GCM)


# --- the key ---


def sign_key(identity: Identity, public: bytes, *, network: str, time_ms: int, expires_ms: int) -> bytes:
    """The statement that this key is the identity's, for anybody to hand on. Raises BadEncoding: bad times."""
    body = SUITE_ID + public
    return seal(
        identity,
        domain=DOMAIN,
        network=network,
        sequence=time_ms,
        time_ms=time_ms,
        expires_ms=expires_ms,
        body=body,
    )


def read_key(raw: bytes, *, peer: str, network: str, now_ms: int, skew_ms: int = SKEW_MS) -> SealingKey:
    """The key, when this very peer has signed it and its time is now.

    Raises: BadEncoding, WrongNetwork, Expired, BadSignature (also: another peer's).
    """
    envelope = open_envelope(raw, domain=DOMAIN, network=network, now_ms=now_ms, skew_ms=skew_ms)
    if envelope.sender != peer:
        raise BadSignature(f"the key of {envelope.sender} came, wanted that of {peer}")
    suite, public = envelope.body[: len(SUITE_ID)], envelope.body[len(SUITE_ID) :]
    if suite != SUITE_ID or len(public) != KEY_BYTES:
        raise BadEncoding(
            f"a key of {len(public)} bytes for suite {suite.hex()} came, wanted {KEY_BYTES} bytes for {SUITE_ID.hex()}"
        )
    return SealingKey(peer=envelope.sender, public=public, expires_ms=envelope.expires_ms)


# --- the request ---


def seal_request(content: bytes, *, public: bytes, secret: bytes, context: Context) -> bytes:
    """The encapsulated key and the ciphertext. secret: SECRET_BYTES that were drawn for this request alone.

    Raises BadKey: nothing can be sealed to such a key.
    """
    assert len(secret) == SECRET_BYTES, "the asker draws SECRET_BYTES"
    assert len(context.request_id) == REQUEST_ID_BYTES, "the asker draws REQUEST_ID_BYTES"
    try:
        return _suite().encrypt(secret + content, X25519PublicKey.from_public_bytes(public), context.info(_REQUEST))
    except ValueError as exc:
        raise BadKey(f"nothing can be sealed to the key {public.hex()[:64]}: {exc}") from exc


def open_request(sealed: bytes, private: X25519PrivateKey, context: Context) -> Opened:
    """What was sealed to this key in this context. Raises BadSeal, and nothing else, for any bytes."""
    least = ENC_BYTES + SECRET_BYTES + TAG_BYTES
    if len(sealed) < least:
        raise BadSeal(f"{len(sealed)} bytes came, a sealed request has {least} or more")
    try:
        plain = _suite().decrypt(sealed, private, context.info(_REQUEST))
    except (InvalidTag, ValueError) as exc:
        raise BadSeal("it was changed, or sealed to another key, or for another peer, network or request id") from exc
    return Opened(secret=plain[:SECRET_BYTES], content=plain[SECRET_BYTES:])


# --- the answer ---


class AnswerSealer:
    """Seals the frames of one answer. The only user of its key."""

    __slots__ = ("_aead", "_count", "_salt", "is_ended")

    def __init__(self, secret: bytes, salt: bytes, context: Context) -> None:
        """salt: SALT_BYTES that were drawn for this answer alone."""
        self._aead = _answer_aead(secret, salt, context)
        self._salt = salt
        self._count = 0
        self.is_ended = False

    def opening(self) -> bytes:
        """The first frame: the salt, in clear."""
        return bytes((KIND_SALT,)) + self._salt

    def seal(self, content: bytes, *, is_last: bool) -> bytes:
        """The next frame, of at most CONTENT_BYTES_MAX."""
        assert len(content) <= CONTENT_BYTES_MAX, "the caller cuts it"
        assert not self.is_ended, "nothing follows the last frame"
        assert self._count < FRAMES_MAX, "no answer is so long"
        head = bytes((KIND_LAST if is_last else KIND_MORE,))
        plain = len(content).to_bytes(LENGTH_BYTES, "big") + content
        plain += bytes(-len(plain) % PAD_BYTES)
        nonce = self._count.to_bytes(NONCE_BYTES, "big")
        self._count += 1
        self.is_ended = is_last
        return head + self._aead.encrypt(nonce, plain, head)


class AnswerOpener:
    """Opens the frames of one answer, in the order in which they were sealed."""

    __slots__ = ("_aead", "_context", "_count", "_failure", "_secret", "is_ended")

    def __init__(self, secret: bytes, context: Context) -> None:
        self._secret, self._context = secret, context
        self._aead: AESGCM | None = None
        self._count = 0
        self._failure: str | None = None
        self.is_ended = False  # the last frame came

    def open(self, frame: bytes) -> bytes:
        """The content of the next frame, nothing for the salt. Raises BadSeal, and then for ever."""
        if self._failure is None:
            self._failure = self._fault(frame)
        if self._failure is not None:
            raise BadSeal(self._failure)
        if self._aead is None:
            self._aead = _answer_aead(self._secret, frame[1:], self._context)
            return b""
        nonce = self._count.to_bytes(NONCE_BYTES, "big")
        self._count += 1
        try:
            plain = self._aead.decrypt(nonce, frame[1:], frame[:1])
        except InvalidTag as exc:
            self._failure = f"frame {self._count - 1} of the answer was not sealed by the peer, or not in its turn"
            raise BadSeal(self._failure) from exc
        size = int.from_bytes(plain[:LENGTH_BYTES], "big")
        if size > len(plain) - LENGTH_BYTES:
            self._failure = f"frame {self._count - 1} says that it has {size} bytes, {len(plain)} came"
            raise BadSeal(self._failure)
        self.is_ended = frame[0] == KIND_LAST
        return plain[LENGTH_BYTES : LENGTH_BYTES + size]

    def _fault(self, frame: bytes) -> str | None:
        """What is wrong with a frame that can be seen before it is opened."""
        if self.is_ended:
            return "a frame came after the last one"
        kinds = (KIND_SALT,) if self._aead is None else (KIND_MORE, KIND_LAST)
        if not frame or frame[0] not in kinds or len(frame) > FRAME_BYTES_MAX:
            kind = frame[0] if frame else "none"
            return f"a frame of kind {kind} and {len(frame)} bytes came, wanted kind {' or '.join(map(str, kinds))}"
        if self._aead is None and len(frame) != 1 + SALT_BYTES:
            return f"a salt of {len(frame) - 1} bytes came, wanted {SALT_BYTES}"
        if self._aead is not None and len(frame) < 1 + LENGTH_BYTES + TAG_BYTES:
            return f"a frame of {len(frame)} bytes came, none is so short"
        return None


def _answer_aead(secret: bytes, salt: bytes, context: Context) -> AESGCM:
    info = context.info(_ANSWER)
    return AESGCM(HKDF(algorithm=SHA256(), length=ANSWER_KEY_BYTES, salt=salt, info=info).derive(secret))
