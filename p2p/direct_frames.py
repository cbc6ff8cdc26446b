"""The direct channel on the wire: keys out of one agreement, and frames sealed in order with AES-256-GCM.

Rules: core. Each direction has its own key, used by one Sealer, whose counter is the nonce and grows before it is used:
no nonce comes twice. A frame's head (kind and length) is authenticated with it. A frame that was changed, left out,
repeated, moved, or sent back to its sender does not open, and nothing opens after it. The end of a direction is a
sealed frame too, so that a cut is never taken for an end. Keys and token live in memory only, and repr shows none.

Source: RFC 7748 (X25519), RFC 5869 (HKDF), NIST SP 800-38D 8.2.1 (a counter as nonce), 8.3 (2^32 frames a key).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Final

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from msgspec import Meta

from crypto.identity import PeerId
from p2p.errors import LocalProtocolError, RemoteProtocolError
from p2p.transport import FRAME_BYTES_MAX

HEAD_BYTES: Final = 4  # kind, then the length of the content in 3 bytes, big endian
TAG_BYTES: Final = 16
NONCE_BYTES: Final = 12
KEY_BYTES: Final = 32
TOKEN_BYTES: Final = 32
FRAMES_MAX: Final = 1 << 32  # under one key; 4 PiB of full frames
KIND_CONTENT: Final = 0
KIND_END: Final = 1
KEEP_BYTES: Final = 65_536  # smaller frames are sealed into bytes of their own, larger ones into a buffer that is kept
DOMAIN: Final = b"openagi:direct:1:"

PublicKey = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]


class Ask(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The opener's first frame: which protocol the channel is for, and its ephemeral key."""

    protocol: Annotated[str, Meta(min_length=1, max_length=64)]
    key: PublicKey


class Offer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The server's answer: whether it serves the protocol, its ephemeral key, and the TCP port to claim the channel at.

    port 0: no direct channel now.
    """

    served: bool
    key: PublicKey
    port: Annotated[int, Meta(ge=0, le=65_535)]


class Choice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The opener's last word: the frames go over the direct channel, or over this very stream."""

    direct: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelKeys:
    """What both ends derive. `token` claims the TCP connection, once."""

    opener: bytes = field(repr=False)  # seals what the opener sends
    server: bytes = field(repr=False)
    token: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Who agrees on what: every part of it goes into the keys."""

    opener: PeerId
    server: PeerId
    protocol: str
    opener_key: bytes
    server_key: bytes

    def keys(self, own: X25519PrivateKey, their_key: bytes) -> ChannelKeys:
        """The channel's keys. Raises RemoteProtocolError for a key of small order."""
        try:
            shared = own.exchange(X25519PublicKey.from_public_bytes(their_key))
        except ValueError as exc:
            raise RemoteProtocolError("the peer sent an X25519 key that agrees with every other") from exc
        parts = (self.opener.encode(), self.server.encode(), self.protocol.encode(), self.opener_key, self.server_key)
        info = DOMAIN + b"".join(len(part).to_bytes(2, "big") + part for part in parts)
        out = HKDF(algorithm=SHA256(), length=2 * KEY_BYTES + TOKEN_BYTES, salt=None, info=info).derive(shared)
        return ChannelKeys(opener=out[:KEY_BYTES], server=out[KEY_BYTES : 2 * KEY_BYTES], token=out[2 * KEY_BYTES :])


class Sealer:
    """Seals one direction's frames. The only user of its key."""

    __slots__ = ("_aead", "_count", "_ended", "_room")

    def __init__(self, key: bytes) -> None:
        self._aead = AESGCM(key)
        self._count = 0
        self._ended = False
        self._room = bytearray()

    def seal(self, content: bytes, kind: int = KIND_CONTENT) -> bytes | memoryview:
        """One frame's bytes on the wire, to be used before the next is sealed. Raises LocalProtocolError.

        A frame that was sealed and not sent whole leaves a gap: the channel is over.
        """
        if len(content) > FRAME_BYTES_MAX:
            raise LocalProtocolError(f"a frame of {len(content)} bytes, at most {FRAME_BYTES_MAX} may be sent")
        if self._ended:
            raise LocalProtocolError("a frame was sent after close")
        if self._count >= FRAMES_MAX:
            raise LocalProtocolError(f"{FRAMES_MAX} frames were sealed with one key: open another channel")
        nonce = self._count.to_bytes(NONCE_BYTES, "big")
        self._count += 1
        self._ended = kind == KIND_END
        head = (kind << 24 | len(content)).to_bytes(HEAD_BYTES, "big")
        if len(content) < KEEP_BYTES or not hasattr(self._aead, "encrypt_into"):  # since cryptography 47
            return head + self._aead.encrypt(nonce, content, head)
        size = HEAD_BYTES + len(content) + TAG_BYTES
        if len(self._room) < size:
            self._room = bytearray(HEAD_BYTES + FRAME_BYTES_MAX + TAG_BYTES)
        wire = memoryview(self._room)[:size]
        wire[:HEAD_BYTES] = head
        self._aead.encrypt_into(nonce, content, head, wire[HEAD_BYTES:])
        return wire


class Opener:
    """Opens the other direction's frames, in the order in which they were sealed."""

    __slots__ = ("_aead", "_count", "_failure", "ended")

    def __init__(self, key: bytes) -> None:
        self._aead = AESGCM(key)
        self._count = 0
        self._failure: str | None = None
        self.ended = False  # the peer sealed its end

    def body_bytes(self, head: bytes | bytearray | memoryview) -> int:
        """How many bytes follow a head. Not authenticated yet, but bounded. Raises RemoteProtocolError."""
        size = int.from_bytes(head[1:], "big")
        if self._failure is None and self.ended:
            self._failure = "a frame came after the end"
        elif self._failure is None and (head[0] not in (KIND_CONTENT, KIND_END) or size > FRAME_BYTES_MAX):
            self._failure = f"a frame of kind {head[0]} and {size} bytes was announced: at most {FRAME_BYTES_MAX}"
        elif self._failure is None and self._count >= FRAMES_MAX:
            self._failure = f"more than {FRAMES_MAX} frames came under one key"
        if self._failure is not None:
            raise RemoteProtocolError(self._failure)
        return size + TAG_BYTES

    def open(self, head: bytes | bytearray | memoryview, body: bytes | bytearray | memoryview) -> bytes:
        """The content of the next frame; after an end `ended` is set. Raises RemoteProtocolError, then for ever."""
        size = self.body_bytes(head)
        assert len(body) == size, "the caller cut the frame by its head"
        nonce = self._count.to_bytes(NONCE_BYTES, "big")
        self._count += 1
        try:
            content = self._aead.decrypt(nonce, body, bytes(head))
        except InvalidTag as exc:
            self._failure = (
                f"frame {self._count - 1} of the direct channel was not sealed by the peer, or not in its turn"
            )
            raise RemoteProtocolError(self._failure) from exc
        self.ended = head[0] == KIND_END
        return content
