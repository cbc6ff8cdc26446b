"""Sign-in of a wallet: one signature, in a browser, by which a session key may ask in the wallet's name for a day.

Rules: core. A challenge is one whole message of this node, answered once, within CHALLENGE_S: what comes back must be
that message to the letter, so nothing of it is parsed. The statement names the session key, the peer and what is
allowed. Challenges and sessions are bounded; when there is no room the oldest challenge goes, but no session that
holds. Nothing outlasts the process: after a restart wallets sign in again.
Source: EIP-4361 (Sign-In with Ethereum); EIP-191; SECURITY.md section 5.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from crypto.disk import told_time
from crypto.errors import BadKey, BadSignature
from crypto.wallet import WALLET_SIGNATURE_BYTES, WalletAddress, signer_of, wallet_address
from node.web.caller import Caller, of_wallet

CHALLENGES_MAX = 1_024
CHALLENGE_S = 300.0
SESSIONS_MAX = 10_000
SESSION_S_MAX = 24 * 3600
CHAIN_ID_MAX = (1 << 53) - 1
DOMAIN_CHARS_MAX = 260
_KEY = re.compile(r"[0-9a-f]{64}")
_DOMAIN = re.compile(r"[A-Za-z0-9.:\[\]_-]{1,260}")
_SIGNATURE = re.compile(rf"0x[0-9a-fA-F]{{{2 * WALLET_SIGNATURE_BYTES}}}")


class SignInFault(Enum):
    """Why a sign-in is not taken: the error's code."""

    MALFORMED = "sign_in_malformed"
    NOT_LISTED = "wallet_not_listed"
    UNKNOWN = "challenge_unknown"
    WRONG = "wallet_signature_wrong"
    FULL = "sessions_full"


class SignInRefused(Exception):
    """No session comes of this."""

    def __init__(self, fault: SignInFault, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.fault = fault
        self.param = param


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a client asks to be challenged for. key: the session's public key, hexadecimal; domain, uri: of the page."""

    address: str
    key: str
    domain: str
    uri: str
    chain_id: int = 1
    life_s: int = SESSION_S_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A session key that a wallet has authorised, until unix second `until_s`."""

    address: WalletAddress
    key: str
    until_s: float


@dataclass(frozen=True, slots=True)
class _Challenge:
    session: Session
    answer_by_s: float


class SignIns:
    """Challenges that wait for their answer, and sessions that hold. Times are unix seconds."""

    def __init__(self, peer: str, listed: frozenset[WalletAddress]) -> None:
        """peer: this node. listed: the wallets that may sign in; empty: any, as strangers."""
        self._peer = peer
        self._listed = listed
        self._challenges: dict[str, _Challenge] = {}  # by message, the oldest first
        self._sessions: dict[str, Session] = {}  # by key

    def challenge(self, wanted: Wanted, *, nonce: str, now: float) -> str:
        """The message to sign. nonce: at least 8 letters and digits, fresh. Raises SignInRefused."""
        address = self._address(wanted.address)
        if not _KEY.fullmatch(wanted.key):
            what = "the Ed25519 public key of the session, 64 hexadecimal digits in lower case"
            raise SignInRefused(SignInFault.MALFORMED, f"session_key is not {what}", param="session_key")
        if not _DOMAIN.fullmatch(wanted.domain):
            raise SignInRefused(
                SignInFault.MALFORMED, "the Host or Origin of the request names no domain", param="host"
            )
        if not 0 < wanted.life_s <= SESSION_S_MAX:
            message = f"seconds is {wanted.life_s}, wanted 1 to {SESSION_S_MAX}"
            raise SignInRefused(SignInFault.MALFORMED, message, param="seconds")
        if not 0 < wanted.chain_id <= CHAIN_ID_MAX:
            message = f"chain_id is {wanted.chain_id}, wanted 1 to {CHAIN_ID_MAX}"
            raise SignInRefused(SignInFault.MALFORMED, message, param="chain_id")
        session = Session(address=address, key=wanted.key, until_s=float(int(now) + wanted.life_s))
        message = self._message(session, wanted, nonce, now)
        for old in [text for text, challenge in self._challenges.items() if challenge.answer_by_s <= now]:
            del self._challenges[old]
        if len(self._challenges) >= CHALLENGES_MAX:
            del self._challenges[next(iter(self._challenges))]
        self._challenges[message] = _Challenge(session, now + CHALLENGE_S)
        return message

    def answer(self, message: str, signature: str, now: float) -> Session:
        """The session that this signature opens. The challenge is used up, however it ends. Raises SignInRefused."""
        challenge = self._challenges.pop(message, None)
        if challenge is None or challenge.answer_by_s <= now:
            raise SignInRefused(
                SignInFault.UNKNOWN,
                "the message is no challenge that waits for an answer here: it was answered, is over "
                f"{CHALLENGE_S / 60:.0f} minutes old, is of another node or was altered; ask for a new one",
                param="message",
            )
        if not _SIGNATURE.fullmatch(signature):
            what = f"0x and {2 * WALLET_SIGNATURE_BYTES} hexadecimal digits"
            raise SignInRefused(SignInFault.MALFORMED, f"signature is not {what}", param="signature")
        try:
            signer = signer_of(message, bytes.fromhex(signature[2:]))
        except BadSignature as exc:
            raise SignInRefused(SignInFault.WRONG, f"the signature is no wallet's: {exc}", param="signature") from exc
        session = challenge.session
        if signer != session.address:
            text = f"the message is for the wallet {session.address} to sign, and another signed it"
            raise SignInRefused(SignInFault.WRONG, text, param="signature")
        self._keep(session, now)
        return session

    def caller_of(self, key: str, now: float) -> Caller | None:
        """Who asks with this session key; None when no wallet has authorised it, or not for now."""
        session = self._sessions.get(key)
        if session is None:
            return None
        if session.until_s <= now:
            del self._sessions[key]
            return None
        return of_wallet(session.address, is_listed=session.address in self._listed)

    def _keep(self, session: Session, now: float) -> None:
        if len(self._sessions) >= SESSIONS_MAX and session.key not in self._sessions:
            self._sessions = {key: held for key, held in self._sessions.items() if held.until_s > now}
            if len(self._sessions) >= SESSIONS_MAX:
                raise SignInRefused(
                    SignInFault.FULL, "this node has as many sessions as it keeps: try another, or later"
                )
        self._sessions[session.key] = session

    def _address(self, text: str) -> WalletAddress:
        try:
            address = wallet_address(text)
        except BadKey as exc:
            raise SignInRefused(SignInFault.MALFORMED, str(exc), param="address") from exc
        if self._listed and address not in self._listed:
            message = f"the wallet {address} is not on this node's list: ask its operator"
            raise SignInRefused(SignInFault.NOT_LISTED, message, param="address")
        return address

    def _message(self, session: Session, wanted: Wanted, nonce: str, now: float) -> str:
        until = told_time(session.until_s)
        return (
            f"{wanted.domain} wants you to sign in with your Ethereum account:\n{session.address}\n\n"
            f"Let the session key {session.key} ask the node {self._peer} for answers in this wallet's name until "
            f"{until}, and nothing else.\n\n"
            f"URI: {wanted.uri}\nVersion: 1\nChain ID: {wanted.chain_id}\nNonce: {nonce}\n"
            f"Issued At: {told_time(now)}\nExpiration Time: {until}"
        )
