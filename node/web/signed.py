"""Signed requests: HTTP message signatures by an Ed25519 key, which any peer can check and no other peer can use.

Rules: core. A strict subset: one signature, over exactly COMPONENTS in this order, with exactly PARAMETERS. x-audience
names the peer that is asked, so that what one peer got is worth nothing at another. A signature lives at most
LIFE_S_MAX, and its nonce is remembered for twice that, so that none is taken twice. Everything that is compared has one
spelling. Of the body no more than its digest is looked at here. Any bytes give a Signed or a SignatureRefused.
Source: RFC 9421 sections 2 and 3 (HTTP message signatures); RFC 9530 (Content-Digest); SECURITY.md section 5.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from heapq import heappop, heappush

from crypto.errors import BadSignature
from crypto.identity import SIGNATURE_BYTES, verify_key

COMPONENTS = ("@method", "@path", "@query", "content-digest", "x-audience")
PARAMETERS = ("created", "expires", "nonce", "keyid", "alg")
SIGNED_HEADERS = ("signature-input", "signature", "content-digest", "x-audience")
LIFE_S_MAX = 60
SKEW_S_MAX = 5.0  # a client's clock may be this far ahead of ours
REMEMBERED_S = 2.0 * LIFE_S_MAX
NONCES_MAX = 100_000  # 38 MB; then signed requests wait, and none is forgotten early
HEADER_CHARS_MAX = 1024
NONCE_CHARS_MIN = 16
_NONCE = re.compile(r"[A-Za-z0-9_-]{16,64}")
_KEYID = re.compile(r"[0-9a-f]{64}")
_SECONDS = re.compile(r"[1-9][0-9]{0,11}")
_PARAMETER = r';[a-z]{1,16}=(?:[0-9]{1,12}|"[A-Za-z0-9_-]{1,128}")'
_INPUT = re.compile(rf"([a-z][a-z0-9_-]{{0,31}})=(\(([^()]*)\)((?:{_PARAMETER}){{1,8}}))")
_SPLIT = re.compile(r';([a-z]+)=("?)([^;"]*)"?')
_LIST = " ".join(f'"{name}"' for name in COMPONENTS)


class SignatureFault(Enum):
    """Why a signed request is not taken: the error's code."""

    MALFORMED = "signature_malformed"
    EXPIRED = "signature_expired"
    FUTURE = "signature_from_the_future"
    AUDIENCE = "signature_for_another_peer"
    WRONG = "signature_wrong"
    BODY = "signature_body_altered"
    REPLAYED = "signature_replayed"


class SignatureRefused(Exception):
    """What came is no signature that may be used here and now."""

    def __init__(self, fault: SignatureFault, message: str) -> None:
        super().__init__(message)
        self.fault = fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is asked, as it came: raw path and query, without decoding."""

    method: str
    path: str
    query: str  # without the question mark


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """A request whose head is signed. key: the public key, hexadecimal; digest: that its body must have."""

    key: str
    nonce: str
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Input:
    label: str
    told: str  # the list and its parameters, as they came: the last line of what is signed
    parameters: dict[str, str]


def is_signed(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a request means to be signed."""
    return any(name.lower() in (b"signature", b"signature-input") for name, _ in headers)


def check(target: Target, headers: Iterable[tuple[bytes, bytes]], *, audience: str, now: float) -> Signed:
    """The signer and what is signed. now: unix seconds; audience: our peer id. Raises SignatureRefused.

    That the nonce is new, and that the body has the digest, is left to the caller.
    """
    told = _told(headers)
    given = _input_of(told["signature-input"])
    signature = _bytes_of(told["signature"], f"{given.label}=", SIGNATURE_BYTES, "signature")
    digest = _bytes_of(told["content-digest"], "sha-256=", hashlib.sha256().digest_size, "content-digest")
    key, nonce = given.parameters["keyid"], given.parameters["nonce"]
    _check_time(int(given.parameters["created"]), int(given.parameters["expires"]), now)
    if told["x-audience"] != audience:
        raise SignatureRefused(
            SignatureFault.AUDIENCE,
            f"the request is signed for the peer {told['x-audience'][:64]!a}, and this is "
            f"{audience}: sign it for this one",
        )
    try:
        verify_key(bytes.fromhex(key), signature_base(target, told, given.told).encode("latin-1"), signature)
    except BadSignature:
        raise SignatureRefused(
            SignatureFault.WRONG,
            "the signature is not this key's over this method, path, query, content-digest and x-audience: "
            "something was altered on the way, or signed otherwise",
        ) from None
    return Signed(key=key, nonce=nonce, digest=digest)


def signature_base(target: Target, headers: dict[str, str], told: str) -> str:
    """The text that is signed (RFC 9421 section 2.5). told: the list and parameters of Signature-Input."""
    values = {
        "@method": target.method,
        "@path": target.path or "/",
        "@query": f"?{target.query}",
        "content-digest": headers["content-digest"],
        "x-audience": headers["x-audience"],
    }
    lines = [f'"{name}": {values[name]}' for name in COMPONENTS]
    return "\n".join([*lines, f'"@signature-params": {told}'])


def check_body(signed: Signed, body: bytes) -> None:
    """Raises SignatureRefused when the body is not the one that was signed."""
    if not hmac.compare_digest(hashlib.sha256(body).digest(), signed.digest):
        raise SignatureRefused(
            SignatureFault.BODY, "the body does not have the content-digest that was signed: it was altered on the way"
        )


_Use = tuple[str, str]  # key and nonce


class Nonces:
    """Nonces that were used, for as long as their signatures could be tried again. Times are unix seconds."""

    def __init__(self, nonces_max: int = NONCES_MAX) -> None:
        self._nonces_max = nonces_max
        self._used: set[_Use] = set()
        self._ends: list[tuple[float, _Use]] = []  # a heap: where a clock was set back, the last is not the latest

    def wait_s(self, now: float) -> float:
        """Seconds until there is room for one more; 0 when there is."""
        self._forget(now)
        if len(self._used) < self._nonces_max:
            return 0.0
        return max(0.0, self._ends[0][0] - now)

    def use(self, signed: Signed, now: float) -> None:
        """Take note of one; there must be room. Raises SignatureRefused when it was used before."""
        self._forget(now)
        use = (signed.key, signed.nonce)
        if use in self._used:
            raise SignatureRefused(
                SignatureFault.REPLAYED, "this signed request came before: sign each one anew, with a fresh nonce"
            )
        assert len(self._used) < self._nonces_max, "the caller asked wait_s"
        self._used.add(use)
        heappush(self._ends, (now + REMEMBERED_S, use))

    def _forget(self, now: float) -> None:
        while self._ends and self._ends[0][0] <= now:
            self._used.remove(heappop(self._ends)[1])

    def __len__(self) -> int:
        return len(self._used)


def _malformed(message: str) -> SignatureRefused:
    return SignatureRefused(SignatureFault.MALFORMED, message)


def _told(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """The headers of a signature, each there exactly once."""
    told: dict[str, str] = {}
    for raw_name, value in headers:
        name = raw_name.decode("latin-1").lower()
        if name not in SIGNED_HEADERS:
            continue
        if name in told:
            raise _malformed(f"the header {name} came twice, wanted once")
        if len(value) > HEADER_CHARS_MAX:
            raise _malformed(f"the header {name} has {len(value)} bytes, at most {HEADER_CHARS_MAX} are taken")
        told[name] = value.decode("latin-1")
    for name in SIGNED_HEADERS:
        if name not in told:
            raise _malformed(f"the header {name} is missing: a signed request has {', '.join(SIGNED_HEADERS)}")
    return told


def _input_of(text: str) -> _Input:
    found = _INPUT.fullmatch(text)
    if found is None:
        raise _malformed(
            f"signature-input does not parse, wanted LABEL=({_LIST});created=...;{'...;'.join(PARAMETERS[1:])}"
        )
    if found[3] != _LIST:
        raise _malformed(f"signature-input covers ({found[3][:200]}), wanted exactly ({_LIST})")
    pairs = _SPLIT.findall(found[4])
    parameters = {name: value for name, _, value in pairs}
    if len(pairs) != len(parameters) or parameters.keys() != set(PARAMETERS):
        raise _malformed(f"signature-input has other parameters than {', '.join(PARAMETERS)}, or one twice")
    for name, quote, value in pairs:
        wanted = {"created": _SECONDS, "expires": _SECONDS, "nonce": _NONCE, "keyid": _KEYID}.get(name)
        is_number = name in ("created", "expires")
        if bool(quote) == is_number or (wanted is not None and not wanted.fullmatch(value)):
            raise _malformed(f"signature-input has {name}={value[:80]}, wanted {_WANTED[name]}")
    if parameters["alg"] != "ed25519":
        raise _malformed(f'signature-input has alg="{parameters["alg"][:40]}", wanted {_WANTED["alg"]}')
    return _Input(label=found[1], told=found[2], parameters=parameters)


_WANTED = {
    "created": "unix seconds",
    "expires": "unix seconds",
    "nonce": '"16 to 64 letters, digits, - and _", fresh for each request',
    "keyid": '"the Ed25519 public key, 64 hexadecimal digits in lower case"',
    "alg": '"ed25519"',
}


def _bytes_of(text: str, before: str, size: int, what: str) -> bytes:
    """The bytes of `BEFORE:BASE64:` (RFC 8941), in their one spelling."""
    inner = text.removeprefix(before)
    if text.startswith(before) and len(inner) > 2 and inner[0] == inner[-1] == ":":
        try:
            value = base64.b64decode(inner[1:-1].encode("latin-1"), validate=True)
        except binascii.Error:
            value = b""
        if len(value) == size and base64.b64encode(value).decode() == inner[1:-1]:
            return value
    raise _malformed(f"{what} is not {before}:BASE64: of {size} bytes")


def _check_time(created: int, expires: int, now: float) -> None:
    if not 0 < expires - created <= LIFE_S_MAX:
        raise _malformed(f"expires is {expires - created} s after created, wanted 1 to {LIFE_S_MAX}")
    if created > now + SKEW_S_MAX:
        raise SignatureRefused(
            SignatureFault.FUTURE,
            f"the request is signed {created - now:.0f} s ahead of this node's clock: set yours (NTP)",
        )
    if expires <= now:
        raise SignatureRefused(
            SignatureFault.EXPIRED, f"the signature expired {now - expires:.0f} s ago: sign it anew (or set your clock)"
        )
