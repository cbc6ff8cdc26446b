"""Ethereum wallets: whose signature is under a text, and how an address is written.

Rules: core. The address is recovered from the signature, never believed; a signature has one spelling (low s).
Source: EIP-191 version 0x45 (personal_sign); EIP-55 (checksummed addresses); EIP-2 (low s); SEC 1 section 4.1.6.
"""

from __future__ import annotations

import re
from typing import Final, NewType

from coincurve import PublicKey
from Crypto.Hash import keccak

from crypto.errors import BadKey, BadSignature

WalletAddress = NewType("WalletAddress", str)  # 0x and 40 hexadecimal digits, in EIP-55's spelling

WALLET_SIGNATURE_BYTES: Final = 65  # r, s, v
_ORDER_HALF: Final = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141 // 2
_ADDRESS: Final = re.compile(r"0x[0-9a-fA-F]{40}")


def _keccak256(content: bytes) -> bytes:
    return keccak.new(digest_bits=256, data=content).digest()


def wallet_address(text: str) -> WalletAddress:
    """The address that this text is, in its one spelling. Raises BadKey, also on a wrong checksum."""
    if not _ADDRESS.fullmatch(text):
        raise BadKey(f"{text[:60]!a} is not an address of a wallet, wanted 0x and 40 hexadecimal digits")
    digits = text[2:].lower()
    marks = _keccak256(digits.encode()).hex()
    spelled = "".join(char.upper() if int(mark, 16) >= 8 else char for char, mark in zip(digits, marks, strict=False))
    if text[2:] not in (digits, digits.upper(), spelled):
        raise BadKey(f"the checksum of the address {text} is wrong: a letter was mistyped")
    return WalletAddress(f"0x{spelled}")


def signer_of(message: str, signature: bytes) -> WalletAddress:
    """Whose personal_sign this is over this text. Raises BadSignature when it is nobody's."""
    if len(signature) != WALLET_SIGNATURE_BYTES:
        raise BadSignature(f"a signature of {len(signature)} bytes came, a wallet's has {WALLET_SIGNATURE_BYTES}")
    if not 0 < int.from_bytes(signature[32:64], "big") <= _ORDER_HALF:
        raise BadSignature("the signature's s is not in the lower half of its range")
    recovery = signature[64] - 27 if signature[64] in (27, 28) else signature[64]
    if recovery not in (0, 1):
        raise BadSignature(f"the signature's v is {signature[64]}, wanted 0, 1, 27 or 28")
    content = message.encode()
    digest = _keccak256(b"\x19Ethereum Signed Message:\n%d" % len(content) + content)
    try:
        key = PublicKey.from_signature_and_message(signature[:64] + bytes((recovery,)), digest, hasher=None)
    except ValueError as exc:
        raise BadSignature("the signature is no wallet's over any text") from exc
    return wallet_address(f"0x{_keccak256(key.format(compressed=False)[1:])[-20:].hex()}")
