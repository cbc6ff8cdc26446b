"""Wallets: whose signature is under a text, and the session that one opens."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from coincurve import PrivateKey
from Crypto.Hash import keccak
from hypothesis import given, settings
from hypothesis import strategies as st

from crypto.errors import BadKey, BadSignature
from crypto.wallet import signer_of, wallet_address
from node.web.caller import KNOWN, STRANGER
from node.web.wallets import (
    CHALLENGE_S,
    CHALLENGES_MAX,
    SESSION_S_MAX,
    SignInFault,
    SignInRefused,
    SignIns,
    Wanted,
)

PEER = "12D3KooWFake"
KEY = "ab" * 32
NOW = 1_800_000_000.0
WALLET = PrivateKey(bytes(range(1, 33)))


def keccak256(content: bytes) -> bytes:
    return keccak.new(digest_bits=256, data=content).digest()


ADDRESS = wallet_address("0x" + keccak256(WALLET.public_key.format(compressed=False)[1:])[-20:].hex())


def personal_sign(message: str, wallet: PrivateKey = WALLET) -> str:
    """As a wallet in a browser does it."""
    content = message.encode()
    digest = keccak256(b"\x19Ethereum Signed Message:\n" + str(len(content)).encode() + content)
    raw = wallet.sign_recoverable(digest, hasher=None)
    return "0x" + (raw[:64] + bytes((raw[64] + 27,))).hex()


def test_a_known_signature_has_its_known_signer() -> None:
    """The example of eth-account's documentation."""
    signature = bytes.fromhex(
        "e6ca9bba58c88611fad66a6ce8f996908195593807c4b38bd528d2cff09d4eb3"
        "3e5bfbbf4d3e39b1a2fd816a7680c19ebebaf3a141b239934ad43cb33fcec8ce1c"
    )
    assert signer_of("I♥SF", signature) == "0x5ce9454909639D2D17A3F753ce7d93fa0b9aB12E"
    assert signer_of("I♥SF", signature[:64] + b"\x01") == "0x5ce9454909639D2D17A3F753ce7d93fa0b9aB12E"
    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
    high = order - int.from_bytes(signature[32:64], "big")
    with pytest.raises(BadSignature, match="lower half"):
        signer_of("I♥SF", signature[:32] + high.to_bytes(32, "big") + b"\x1b")


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=50), st.one_of(st.binary(max_size=80), st.binary(min_size=65, max_size=65)))
def test_any_bytes_are_a_signer_or_an_error(message: str, signature: bytes) -> None:
    with suppress(BadSignature):
        assert wallet_address(signer_of(message, signature))


def test_addresses_have_one_spelling() -> None:
    """The examples of EIP-55."""
    for spelled in ("0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed", "0xfB6916095ca1df60bB79Ce92cE3Ea74c37c5d359"):
        assert wallet_address(spelled) == wallet_address(spelled.lower()) == spelled
        with pytest.raises(BadKey, match="checksum"):
            wallet_address(spelled.replace("e", "E", 1) if "e" in spelled else spelled)
    for text in ("", "0x12", "0x" + "g" * 40, "5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed00"):
        with pytest.raises(BadKey, match="40 hexadecimal digits"):
            wallet_address(text)


def challenged(sign_ins: SignIns, *, now: float = NOW, nonce: str = "00" * 16, **changes: Any) -> str:
    given: dict[str, Any] = {"address": ADDRESS, "key": KEY, "domain": "127.0.0.1:8765", "uri": "http://127.0.0.1:8765"}
    return sign_ins.challenge(Wanted(**{**given, **changes}), nonce=nonce, now=now)


def fault_of(sign_ins: SignIns, message: str, signature: str, now: float = NOW) -> SignInFault:
    with pytest.raises(SignInRefused) as caught:
        sign_ins.answer(message, signature, now)
    return caught.value.fault


def test_a_wallet_opens_a_session_for_a_day_at_most() -> None:
    sign_ins = SignIns(PEER, frozenset())
    message = challenged(sign_ins)
    lines = message.split("\n")
    assert lines[0] == "127.0.0.1:8765 wants you to sign in with your Ethereum account:"
    assert lines[1] == ADDRESS
    assert KEY in lines[3]
    assert PEER in lines[3]
    assert lines[5:] == [
        "URI: http://127.0.0.1:8765",
        "Version: 1",
        "Chain ID: 1",
        f"Nonce: {'00' * 16}",
        "Issued At: 2027-01-15T08:00:00Z",
        "Expiration Time: 2027-01-16T08:00:00Z",
    ]
    assert sign_ins.caller_of(KEY, NOW) is None
    session = sign_ins.answer(message, personal_sign(message), NOW + 1)
    assert session.until_s == NOW + SESSION_S_MAX
    caller = sign_ins.caller_of(KEY, NOW + SESSION_S_MAX - 1)
    assert caller is not None
    assert caller.limits == STRANGER
    assert sign_ins.caller_of(KEY, NOW + SESSION_S_MAX) is None
    assert fault_of(sign_ins, message, personal_sign(message)) is SignInFault.UNKNOWN  # once


def test_only_listed_wallets_when_there_is_a_list() -> None:
    listed = SignIns(PEER, frozenset({ADDRESS}))
    message = challenged(listed, address=ADDRESS.lower())
    listed.answer(message, personal_sign(message), NOW)
    caller = listed.caller_of(KEY, NOW)
    assert caller is not None
    assert caller.limits == KNOWN
    with pytest.raises(SignInRefused) as caught:
        challenged(SignIns(PEER, frozenset({wallet_address("0x" + "1" * 40)})))
    assert caught.value.fault is SignInFault.NOT_LISTED


def test_what_opens_no_session() -> None:
    sign_ins = SignIns(PEER, frozenset())
    other = PrivateKey(bytes(range(2, 34)))
    message = challenged(sign_ins)
    assert fault_of(sign_ins, message, personal_sign(message, other)) is SignInFault.WRONG
    assert fault_of(sign_ins, message, personal_sign(message)) is SignInFault.UNKNOWN  # a failure uses it up
    message = challenged(sign_ins)
    altered = message.replace(KEY, "cd" * 32)
    assert fault_of(sign_ins, altered, personal_sign(altered)) is SignInFault.UNKNOWN
    assert fault_of(sign_ins, message, personal_sign(message), NOW + CHALLENGE_S) is SignInFault.UNKNOWN
    message = challenged(sign_ins)
    assert fault_of(sign_ins, message, "0x12") is SignInFault.MALFORMED
    message = challenged(sign_ins)
    assert fault_of(sign_ins, message, "0x" + "ff" * 65) is SignInFault.WRONG
    assert fault_of(SignIns("another", frozenset()), message, personal_sign(message)) is SignInFault.UNKNOWN
    for changes in (
        {"address": "0x1"},
        {"key": "AB" * 32},
        {"key": "x"},
        {"life_s": 0},
        {"life_s": SESSION_S_MAX + 1},
        {"chain_id": 0},
        {"domain": ""},
        {"domain": "a\nb"},
    ):
        with pytest.raises(SignInRefused) as caught:
            challenged(sign_ins, **changes)
        assert caught.value.fault is SignInFault.MALFORMED


def test_challenges_are_bounded() -> None:
    sign_ins = SignIns(PEER, frozenset())
    first = challenged(sign_ins, nonce="f" * 32)
    for number in range(CHALLENGES_MAX):
        challenged(sign_ins, nonce=f"{number:032d}")
    assert fault_of(sign_ins, first, personal_sign(first)) is SignInFault.UNKNOWN
    assert len(sign_ins._challenges) == CHALLENGES_MAX
