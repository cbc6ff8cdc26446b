"""Who a peer is: an Ed25519 key pair, the peer id that is its public key, and the file that keeps it.

Rules: a PeerId is libp2p's own id for the same key, so that the transport's authentication is ours too. The key
file is written once, never overwritten, for its owner alone; it is whole or absent (or refused, see `load`). The
seed leaves this object only by `.seed` and `.save`, and no repr or error shows it.

Source: libp2p specs, peer-ids/peer-ids.md (identity multihash of the protobuf key); RFC 8032; SECURITY.md K1.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import sys
from pathlib import Path
from typing import Final, NewType

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from crypto.disk import write_whole
from crypto.errors import BadKey, BadSignature, UnsafePermissions

PeerId = NewType("PeerId", str)

KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
KEY_FILE_BYTES_MAX: Final = 512  # ours has 137; whatever is larger is some other file
PEER_ID_CHARS_MAX: Final = 64  # ours are 52; checked before the quadratic base58 arithmetic
_MAGIC: Final = "openagi identity 1"
# identity multihash (0x00, 36 bytes) of the protobuf PublicKey {type: Ed25519 (1), data: 32 bytes}
_PREFIX: Final = bytes((0x00, 0x24, 0x08, 0x01, 0x12, 0x20))
_BASE58: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_POSIX: Final = sys.platform != "win32"


def peer_id_of(public_key: bytes) -> PeerId:
    """The peer id of a raw 32-byte Ed25519 public key. Raises BadKey on another length."""
    if len(public_key) != KEY_BYTES:
        raise BadKey(f"a public key of {len(public_key)} bytes came, Ed25519 has {KEY_BYTES}")
    number, text = int.from_bytes(_PREFIX + public_key, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        text = _BASE58[digit] + text
    return PeerId("1" + text)  # base58 writes a leading zero byte, here the one of the prefix, as "1"


def public_key_of(peer_id: str) -> bytes:
    """The raw 32-byte public key inside an Ed25519 peer id. Raises BadKey when it is not such an id."""
    wanted = "wanted an Ed25519 id like 12D3KooW..."
    if not 0 < len(peer_id) <= PEER_ID_CHARS_MAX:
        raise BadKey(f"a peer id of {len(peer_id)} characters came, {wanted}")
    number = 0
    for char in peer_id:
        digit = _BASE58.find(char)
        if digit < 0:
            raise BadKey(f"the peer id {peer_id!a} has characters outside base58btc, {wanted}")
        number = number * 58 + digit
    size = len(_PREFIX) + KEY_BYTES
    if number.bit_length() > 8 * size:
        raise BadKey(f"the peer id {peer_id} is too long, {wanted}")
    raw = number.to_bytes(size, "big")
    if peer_id_of(raw[len(_PREFIX) :]) != peer_id:  # so its prefix is ours, and it has no other spelling
        raise BadKey(f"the peer id {peer_id} is of another kind of key, {wanted}")
    return raw[len(_PREFIX) :]


def verify(peer_id: str, message: bytes, signature: bytes) -> None:
    """Return when `signature` is this peer's over this message. Raises BadSignature (also: no such peer id)."""
    try:
        public_key = public_key_of(peer_id)
    except BadKey as exc:
        raise BadSignature(f"nobody can sign as this peer: {exc}") from exc
    verify_key(public_key, message, signature)


def verify_key(public_key: bytes, message: bytes, signature: bytes) -> None:
    """As `verify`, by raw public key. Raises BadSignature."""
    if len(signature) != SIGNATURE_BYTES:
        raise BadSignature(f"a signature of {len(signature)} bytes came, Ed25519 has {SIGNATURE_BYTES}")
    if len(public_key) != KEY_BYTES:
        raise BadSignature(f"a public key of {len(public_key)} bytes came, Ed25519 has {KEY_BYTES}")
    try:
        VerifyKey(public_key).verify(message, signature)
    except BadSignatureError as exc:
        raise BadSignature(f"not signed by {peer_id_of(public_key)}") from exc


class Identity:
    """This node's key pair."""

    __slots__ = ("_key", "peer_id", "public_key")

    def __init__(self, seed: bytes) -> None:
        """Raises BadKey unless the seed has 32 bytes."""
        if len(seed) != KEY_BYTES:
            raise BadKey(f"a seed of {len(seed)} bytes came, Ed25519 has {KEY_BYTES}")
        self._key = SigningKey(seed)
        self.public_key: Final = bytes(self._key.verify_key)
        self.peer_id: Final = peer_id_of(self.public_key)

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"

    @property
    def seed(self) -> bytes:
        """The 32 secret bytes, for libp2p's key pair. Never log or send them."""
        return bytes(self._key)

    def sign(self, message: bytes) -> bytes:
        """The 64-byte Ed25519 signature. Deterministic."""
        return self._key.sign(message).signature

    @classmethod
    def make(cls) -> Identity:
        """A new identity from the system's randomness."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def load(cls, path: Path) -> Identity:
        """Read a key file.

        Raises: UnsafePermissions (others may read it, another owner, a symlink), BadKey (missing, damaged).
        """
        try:
            return cls._from_text(_read_private(path), path)
        except FileNotFoundError as exc:
            raise BadKey(f"there is no key file at {path}") from exc

    @classmethod
    def load_or_make(cls, path: Path) -> Identity:
        """The identity kept at `path`; made and kept there when there is none. Raises as `load` and `save` do."""
        try:
            return cls._from_text(_read_private(path), path)
        except FileNotFoundError:
            pass
        identity = cls.make()
        identity.save(path)
        return identity

    def save(self, path: Path) -> None:
        """Write the key file once, for the owner alone; after this returns, it survives a power loss.

        A kill leaves the whole file or none at `path`, and at worst a private `.tmp-` file beside it, which `load`
        removes when it is the same key.
        Raises BadKey when something stands at `path` (it is left as it was) or the disk refuses.
        """
        text = f"{_MAGIC}\n{self.seed.hex()}\n{self.peer_id}\n".encode()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise BadKey(f"cannot make the folder {path.parent} for the key file: {exc.strerror}") from exc
        try:
            write_whole(path, text, over=False)
        except FileExistsError as exc:
            raise BadKey(f"{path} exists already and was not overwritten; move it away to make a new identity") from exc
        except OSError as exc:
            raise BadKey(f"cannot write the key file {path}: {exc.strerror}") from exc

    @classmethod
    def _from_text(cls, content: bytes, path: Path) -> Identity:
        damaged = f"the key file {path} is damaged ({len(content)} bytes); restore it from a copy, or move it away"
        lines = content.decode("ascii", "replace").split("\n")
        if len(lines) != 4 or lines[0] != _MAGIC or lines[3] != "" or len(lines[1]) != 2 * KEY_BYTES:
            raise BadKey(damaged)
        try:
            identity = cls(bytes.fromhex(lines[1]))
        except (ValueError, BadKey):
            raise BadKey(damaged) from None  # nothing that could quote the seed
        if identity.peer_id != lines[2]:
            raise BadKey(f"{damaged}: its key and its peer id do not belong together")
        return identity


def _read_private(path: Path) -> bytes:
    """The content of a file that is ours alone. Raises FileNotFoundError, UnsafePermissions, BadKey."""
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    # O_NONBLOCK: a FIFO in this place must not hang the start.
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        handle = os.open(path, flags)
        try:
            found = os.fstat(handle)
            _check_private(path, found)
            content = os.read(handle, KEY_FILE_BYTES_MAX)
        finally:
            os.close(handle)
        if found.st_nlink > 1:
            _sweep(path, found)
    except FileNotFoundError:
        raise
    except OSError as exc:
        if exc.errno == errno.ELOOP:
            raise UnsafePermissions(f"the key file {path} is a symbolic link; put the file itself there") from exc
        raise BadKey(f"cannot read the key file {path}: {exc.strerror}") from exc
    return content


def _sweep(path: Path, found: os.stat_result) -> None:
    """Remove the second name of this file that a kill inside `write_whole` left, so that the key has one place."""
    for beside in path.parent.iterdir():
        if beside.name.startswith(f".{path.name}.tmp-") and os.path.samestat(beside.lstat(), found):
            beside.unlink(missing_ok=True)


def _check_private(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise BadKey(f"{path} is not a regular file")
    if not _POSIX:  # Windows has no mode bits; its profile folders are private by default
        return
    if found.st_uid != os.geteuid():
        raise UnsafePermissions(
            f"the key file {path} belongs to user {found.st_uid}, this node runs as user {os.geteuid()}; "
            f"run it as the owner, or `chown {os.geteuid()} {path}`"
        )
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077:
        raise UnsafePermissions(f"the key file {path} has mode {mode:04o}, others may use it; `chmod 600 {path}`")
