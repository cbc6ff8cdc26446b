"""Signed requests: what is signed holds, once, here and now; all else has its word. The clients in docs sign so."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from node.web.signed import (
    HEADER_CHARS_MAX,
    REMEMBERED_S,
    SIGNED_HEADERS,
    Nonces,
    SignatureFault,
    SignatureRefused,
    Signed,
    Target,
    check,
    check_body,
    is_signed,
)

CLIENTS = Path(__file__).parent.parent / "docs" / "clients"
PEER = "12D3KooWFakeFakeFakeFakeFakeFakeFakeFakeFakeFakeFake"
NOW = 1_800_000_000.0
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
BODY = b'{"prompt": "a"}'
TARGET = Target(method="POST", path="/v1/completions", query="a=%20b")
URL = "http://127.0.0.1:8765/v1/completions?a=%20b"
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


@cache
def client() -> ModuleType:
    """docs/clients/signed.py."""
    spec = importlib.util.spec_from_file_location("signed_client", CLIENTS / "signed.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def headers(**changes: str | None) -> dict[str, str]:
    """Signed headers as the client makes them, with changes; underscores stand for dashes."""
    told: dict[str, Any] = client().signed_headers(KEY, "POST", URL, BODY, PEER, NOW)
    told |= {name.replace("_", "-"): value for name, value in changes.items()}
    return {name: value for name, value in told.items() if value is not None}


def pairs(told: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode("latin-1")) for name, value in told.items()]


def fault_of(
    told: list[tuple[bytes, bytes]], target: Target = TARGET, audience: str = PEER, now: float = NOW
) -> SignatureFault:
    with pytest.raises(SignatureRefused) as caught:
        check(target, told, audience=audience, now=now)
    assert str(caught.value)
    return caught.value.fault


def test_a_signed_request_holds() -> None:
    signed = check(TARGET, pairs(headers()), audience=PEER, now=NOW)
    assert signed.key == KEY.public_key().public_bytes_raw().hex()
    check_body(signed, BODY)
    with pytest.raises(SignatureRefused) as caught:
        check_body(signed, BODY + b" ")
    assert caught.value.fault is SignatureFault.BODY
    assert is_signed(pairs(headers()))
    assert not is_signed([(b"content-digest", b"x")])


def test_whatever_is_altered_does_not() -> None:
    told = headers()
    for target in (
        Target(method="PUT", path=TARGET.path, query=TARGET.query),
        Target(method="POST", path="/v1/completion", query=TARGET.query),
        Target(method="POST", path=TARGET.path, query=""),
        Target(method="POST", path=TARGET.path, query="a= b"),
    ):
        assert fault_of(pairs(told), target) is SignatureFault.WRONG
    other = client().signed_headers(KEY, "POST", URL, b"other", PEER, NOW)
    assert fault_of(pairs({**told, "content-digest": other["content-digest"]})) is SignatureFault.WRONG
    assert fault_of(pairs({**told, "signature": other["signature"]})) is SignatureFault.WRONG
    stranger = Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex()
    mine = KEY.public_key().public_bytes_raw().hex()
    assert fault_of(pairs({**told, "signature-input": told["signature-input"].replace(mine, stranger)})) is (
        SignatureFault.WRONG
    )
    longer = told["signature-input"].replace(f"expires={int(NOW) + 30}", f"expires={int(NOW) + 60}")
    assert fault_of(pairs({**told, "signature-input": longer})) is SignatureFault.WRONG


def test_another_peer_and_another_time_have_their_words() -> None:
    told = pairs(headers())
    assert fault_of(told, audience="12D3KooWSomebodyElse") is SignatureFault.AUDIENCE
    assert fault_of(told, now=NOW + 30) is SignatureFault.EXPIRED
    assert fault_of(told, now=NOW - 6) is SignatureFault.FUTURE
    for now in (NOW - 5, NOW + 29.9):
        check(TARGET, told, audience=PEER, now=now)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"@query" ', ""),
        ('"@method" "@path"', '"@path" "@method"'),
        ('"x-audience"', '"x-audience" "host"'),
        ("ed25519", "rsa-v1_5-sha256"),
        (";alg=", ";tag="),
        (f";created={int(NOW)}", ""),
        (f";created={int(NOW)}", f";created={int(NOW)};created={int(NOW)}"),
        (f";created={int(NOW)}", f';created="{int(NOW)}"'),
        (f"expires={int(NOW) + 30}", f"expires={int(NOW) + 61}"),
        (f"expires={int(NOW) + 30}", f"expires={int(NOW)}"),
        (f"expires={int(NOW) + 30}", "expires=-1"),
        ("nonce=", "nonce=x"),
        ("keyid=", "keyid=A"),
        ("sig1=", "sig2="),
        ("sig1=", "SIG1="),
        ("sig1=", "sig1= "),
        (";alg", "; alg"),
        ('";alg="ed25519"', '";alg="ed25519", sig2=("@method")'),
    ],
)
def test_what_is_not_of_the_subset_is_malformed(old: str, new: str) -> None:
    told = headers()
    assert old in told["signature-input"]
    told["signature-input"] = told["signature-input"].replace(old, new)
    assert fault_of(pairs(told)) is SignatureFault.MALFORMED


def test_each_header_is_there_once_in_its_one_spelling() -> None:
    told = headers()
    for name in SIGNED_HEADERS:
        assert fault_of([pair for pair in pairs(told) if pair[0] != name.encode()]) is SignatureFault.MALFORMED
        assert fault_of([*pairs(told), (name.encode(), told[name].encode())]) is SignatureFault.MALFORMED
        assert fault_of(pairs({**told, name: "x" * (HEADER_CHARS_MAX + 1)})) is SignatureFault.MALFORMED
    for name in ("signature", "content-digest"):
        for value in (told[name][:-2] + ":", told[name].replace("=:", ":", 1), told[name] + " ", told[name][:-1]):
            assert fault_of(pairs({**told, name: value})) is SignatureFault.MALFORMED
        at = len(told[name].rstrip("=:")) - 1
        last = told[name][at]  # its lowest bits count for nothing
        other = told[name][:at] + ALPHABET[ALPHABET.index(last) + 1] + told[name][at + 1 :]
        assert fault_of(pairs({**told, name: other})) is SignatureFault.MALFORMED


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(SIGNED_HEADERS),
    st.one_of(
        st.binary(max_size=200),
        st.sampled_from([b'sig1=("@method");created=1', b"sig1=::", b"sha-256=:AAAA:", b";alg=", b'"', b"(", b")"]),
    ),
    st.integers(0, 400),
)
def test_any_bytes_are_a_word(name: str, value: bytes, at: int) -> None:
    told = dict(pairs(headers()))
    whole = told[name.encode()]
    for raw in (value, whole[:at] + value + whole[at:], whole[:at] + value):
        if raw != whole:
            fault_of(list({**told, name.encode(): raw}.items()))


def test_a_nonce_is_used_once_for_twice_the_life_of_a_signature() -> None:
    nonces = Nonces()
    first = Signed(key="a", nonce="n", digest=b"")
    nonces.use(first, 0.0)
    nonces.use(Signed(key="b", nonce="n", digest=b""), 0.0)
    for now in (0.0, REMEMBERED_S - 0.1):
        with pytest.raises(SignatureRefused) as caught:
            nonces.use(first, now)
        assert caught.value.fault is SignatureFault.REPLAYED
    nonces.use(first, REMEMBERED_S)
    assert len(nonces) == 1


def test_nonces_are_bounded_and_none_is_forgotten_early() -> None:
    nonces = Nonces(50)
    for number in range(50):
        assert nonces.wait_s(1.0) == 0
        nonces.use(Signed(key="a", nonce=str(number), digest=b""), 1.0)
    assert nonces.wait_s(2.0) == REMEMBERED_S - 1.0
    with pytest.raises(SignatureRefused):
        nonces.use(Signed(key="a", nonce="0", digest=b""), 2.0)
    assert nonces.wait_s(REMEMBERED_S + 1.0) == 0
    assert len(nonces) == 0


def test_after_a_clock_was_set_back_nonces_are_forgotten_all_the_same() -> None:
    nonces = Nonces(50)
    nonces.use(Signed(key="a", nonce="ahead", digest=b""), 864_000.0)
    for number in range(49):
        nonces.use(Signed(key="a", nonce=str(number), digest=b""), float(number))
    assert nonces.wait_s(49.0) == REMEMBERED_S - 49.0
    assert nonces.wait_s(REMEMBERED_S + 48.0) == 0
    assert len(nonces) == 1
    with pytest.raises(SignatureRefused):
        nonces.use(Signed(key="a", nonce="ahead", digest=b""), 864_000.0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node.js on the PATH to sign with")
def test_the_javascript_client_signs_the_same() -> None:
    script = (
        f"import {{ makeKey, signedHeaders }} from '{(CLIENTS / 'signed.mjs').as_uri()}';"
        f"const told = await signedHeaders(await makeKey(), 'post', '{URL}', {BODY.decode()!r}, '{PEER}', {NOW});"
        "console.log(JSON.stringify(told));"
    )
    done = subprocess.run(
        ["node", "--no-warnings", "--input-type=module", "-e", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    signed = check(TARGET, pairs(json.loads(done.stdout)), audience=PEER, now=NOW)
    check_body(signed, BODY)
