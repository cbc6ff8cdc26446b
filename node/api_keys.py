"""API keys: what one is, which are given out, and whether what a client sends is one of them.

Rules: core. A key is told once, as oa_ID.SECRET, and only its SHA-256 is kept: a secret of 256 random bits needs no
slow hash. It is looked up by its id and compared in constant time; that one was revoked or is over is told only to
who has its secret. What is kept is a JSON file of strictly decoded records, bounded in number.
Source: SECURITY.md section 5 and C3.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Iterable
from enum import Enum, StrEnum
from typing import Annotated

import msgspec

PREFIX = "oa_"
ID_BYTES = 6
SECRET_BYTES = 32
KEYS_MAX = 1000  # of one node; a gateway for more people than that wants an issuer of its own
NAME_CHARS_MAX = 80
FILE_BYTES_MAX = 1 << 20
TEXT_CHARS_MAX = 100  # of a key that a client sends; ours have 59
EXPIRES_S_MAX = 10 * 366 * 86_400
_TEXT = re.compile(r"oa_([0-9a-f]{12})\.[A-Za-z0-9_-]{43}")
_RATE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)/(s|m|h)")
_SPAN = re.compile(r"([0-9]{1,6})(m|h|d)")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_NOBODY = "0" * 64  # compared with when there is no such id, so that this takes as long


class KeyScope(StrEnum):
    """What a key is for; ADMIN is for all."""

    INFER = "infer"
    TRAIN = "train"
    METRICS = "metrics"
    ADMIN = "admin"


class KeyFault(Enum):
    """Why a key is not taken: the error's code."""

    UNKNOWN = "unknown_key"
    REVOKED = "revoked_key"
    EXPIRED = "expired_key"


class KeyRefused(Exception):
    """What came is no key that may be used now."""

    def __init__(self, fault: KeyFault, message: str) -> None:
        super().__init__(message)
        self.fault = fault


class ApiKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One key as it is kept. Times are unix seconds.

    requests_per_s, burst: of all its requests. tokens_per_min: prompt and answer together, None for no limit.
    concurrent: requests for answers under way at a time.
    """

    id: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{12}$")]
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=NAME_CHARS_MAX)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    scopes: Annotated[tuple[KeyScope, ...], msgspec.Meta(min_length=1)]
    created_s: int
    expires_s: int | None = None
    revoked_s: int | None = None
    requests_per_s: Annotated[float, msgspec.Meta(gt=0, le=1e6)] = 5.0
    burst: Annotated[float, msgspec.Meta(ge=1, le=1e9)] = 20.0
    tokens_per_min: Annotated[int, msgspec.Meta(ge=1, le=10**9)] | None = None
    concurrent: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 2


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: Annotated[tuple[ApiKey, ...], msgspec.Meta(max_length=KEYS_MAX)]


def key_text(id: str, secret: bytes) -> str:
    """The key as its owner gets it."""
    assert len(secret) == SECRET_BYTES
    return f"{PREFIX}{id}.{base64.urlsafe_b64encode(secret).rstrip(b'=').decode()}"


def digest_of(text: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(text.encode()).hexdigest()


def decode_keys(content: bytes) -> tuple[ApiKey, ...]:
    """The keys of a file. Raises ValueError that says what is wrong, and quotes nothing."""
    try:
        keys = msgspec.json.decode(content, type=_File).keys
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ValueError(str(exc)[:200]) from None
    if len({key.id for key in keys}) < len(keys):
        raise ValueError("two keys have the same id")
    return keys


def encode_keys(keys: Iterable[ApiKey]) -> bytes:
    """The file of these keys, for people to read too."""
    return msgspec.json.format(msgspec.json.encode(_File(tuple(keys))), indent=2) + b"\n"


class Keyring:
    """The keys of a node at one time."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._by_id = {key.id: key for key in keys}

    def __len__(self) -> int:
        return len(self._by_id)

    def check(self, text: str, now: float) -> ApiKey:
        """The key that this text is. now: unix seconds. Raises KeyRefused, for any text."""
        found = _TEXT.fullmatch(text) if len(text) <= TEXT_CHARS_MAX else None
        key = self._by_id.get(found[1]) if found else None
        digest = hashlib.sha256(text[:TEXT_CHARS_MAX].encode("utf-8", "replace")).hexdigest()
        if not hmac.compare_digest(digest, key.sha256 if key else _NOBODY) or key is None:
            raise KeyRefused(
                KeyFault.UNKNOWN,
                "the API key is none of this node's: its operator makes one by `python -m node keys create`",
            )
        if key.revoked_s is not None:
            raise KeyRefused(KeyFault.REVOKED, f"the API key {key.id} was revoked; ask the node's operator for another")
        if key.expires_s is not None and now >= key.expires_s:
            raise KeyRefused(KeyFault.EXPIRED, f"the API key {key.id} has expired; ask the node's operator for another")
        return key


def is_ours(text: str) -> bool:
    """Whether a credential means to be a key of a node, and not what clients send when they must send something."""
    return text.startswith(PREFIX)


def parse_rate(text: str) -> float:
    """Requests a second from 5/s, 30/m, 100/h. Raises ValueError with what was wanted."""
    found = _RATE.fullmatch(text)
    rate = float(found[1]) / _UNIT_S[found[2]] if found else 0.0
    if not 0 < rate <= 1e6:
        raise ValueError(f"{text[:40]!r} is not a rate like 5/s, 30/m or 100/h, above 0 and at most a million a second")
    return rate


def parse_span_s(text: str) -> int:
    """Seconds from 30m, 12h, 30d. Raises ValueError with what was wanted."""
    found = _SPAN.fullmatch(text)
    seconds = int(found[1]) * _UNIT_S[found[2]] if found else 0
    if not 0 < seconds <= EXPIRES_S_MAX:
        raise ValueError(f"{text[:40]!r} is not a time like 30m, 12h or 30d, above 0 and at most ten years")
    return seconds
