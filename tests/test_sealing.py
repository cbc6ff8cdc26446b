"""crypto/sealing.py and sealing_keys.py: RFC 9180's own vector, what opens and what does not, keys that come and go."""

from __future__ import annotations

import pytest
from cryptography.hazmat.bindings._rust import openssl
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crypto.errors import BadKey, BadSeal, BadSignature, CryptoError, Expired, Replayed, UnknownSealingKey, WrongNetwork
from crypto.identity import Identity
from crypto.sealing import (
    CONTENT_BYTES_MAX,
    FRAME_BYTES_MAX,
    PAD_BYTES,
    SALT_BYTES,
    AnswerOpener,
    AnswerSealer,
    Context,
    _suite,
    open_request,
    read_key,
    seal_request,
    sign_key,
)
from crypto.sealing_keys import GRACE_S, LIFE_S, RESIGN_S, SealingKeys
from tests.test_house import ROOT

ALICE, BOB = Identity(bytes(range(32))), Identity(bytes(range(1, 33)))
NOW_MS = 1_800_000_000_000
SECRET, SALT, REQUEST_ID = b"s" * 32, b"t" * 32, b"i" * 16
PRIVATE = X25519PrivateKey.from_private_bytes(b"\x01" * 32)
PUBLIC = PRIVATE.public_key().public_bytes_raw()
CONTEXT = Context(network="main", peer=ALICE.peer_id, request_id=REQUEST_ID)
SEALED = seal_request(b"a prompt", public=PUBLIC, secret=SECRET, context=CONTEXT)


calm = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# --- HPKE ---


def test_the_vector_of_rfc_9180_a_1_1() -> None:
    private = X25519PrivateKey.from_private_bytes(
        bytes.fromhex("4612c550263fc8ad58375df3f557aac531d26850903e55a9f23f21d8534e8ac8")
    )
    enc = bytes.fromhex("37fda3567bdbd628e88668c3c8d7e97d1d1253b6d4ea6d44c150f741f1bf4431")
    sealed = bytes.fromhex("f938558b5d72f1a23810b4be2ab4f84331acc02fc97babc53a52ae8218a355a96d8770ac83d07bea87e13c512a")
    info = bytes.fromhex("4f6465206f6e2061204772656369616e2055726e")
    # the vector has associated data, for which cryptography has a function of its tests' only
    opened = openssl.hpke._decrypt_with_aad(_suite(), enc + sealed, private, info, b"Count-0")
    assert opened == b"Beauty is truth, truth beauty"


def test_a_request_opens_for_whom_it_is() -> None:
    opened = open_request(SEALED, PRIVATE, CONTEXT)
    assert (opened.secret, opened.content) == (SECRET, b"a prompt")
    assert "prompt" not in repr(opened)
    assert "ssss" not in repr(opened)


@pytest.mark.parametrize(
    "other",
    [
        Context(network="other", peer=ALICE.peer_id, request_id=REQUEST_ID),
        Context(network="main", peer=BOB.peer_id, request_id=REQUEST_ID),
        Context(network="main", peer=ALICE.peer_id, request_id=b"j" * 16),
    ],
)
def test_it_opens_in_no_other_context(other: Context) -> None:
    with pytest.raises(BadSeal):
        open_request(SEALED, PRIVATE, other)


@calm
@given(at=st.integers(0, len(SEALED) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_found(at: int, bit: int) -> None:
    changed = bytearray(SEALED)
    changed[at] ^= 1 << bit
    with pytest.raises(BadSeal):
        open_request(bytes(changed), PRIVATE, CONTEXT)


@calm
@given(
    st.binary(max_size=200) | st.binary(max_size=120).map(lambda raw: SEALED[:32] + raw) | st.just(bytes(200)),
)
def test_any_bytes_are_a_bad_seal_and_nothing_else(raw: bytes) -> None:
    with pytest.raises(BadSeal):
        open_request(raw, PRIVATE, CONTEXT)


def test_nothing_is_sealed_to_a_key_that_agrees_with_every_other() -> None:
    with pytest.raises(BadKey):
        seal_request(b"", public=bytes(32), secret=SECRET, context=CONTEXT)


def test_golden() -> None:
    """The bytes of docs/PROTOCOLS.md."""
    text = (ROOT / "docs/PROTOCOLS.md").read_text()
    head = "fa7a837979af94d3f2b1b549f347523db37e02a25f7f35f5756249d77204fd5c"
    tail = text[text.index(head) + len(head) :].split()[0]
    context = Context(network="main", peer=ALICE.peer_id, request_id=bytes(range(16)))
    opened = open_request(bytes.fromhex(head + tail), PRIVATE, context)
    assert (opened.secret, opened.content) == (b"\2" * 32, b"{}")
    frame = AnswerSealer(b"\2" * 32, b"\3" * 32, context).seal(b"hello", is_last=True)
    assert len(frame) == 529
    assert frame[:16].hex() == "02aa70ba9c999ca05c067b7ff993cdb0"
    assert frame[-16:].hex() == "e9fb5b8d3c9eef9cecd98c6f574037ea"
    assert all(part in text for part in (frame[:16].hex(), frame[-16:].hex(), "d11dbd5dc568b9a83ba266a63f5db04d"))


# --- the answer ---


def frames_of(*contents: bytes) -> list[bytes]:
    sealer = AnswerSealer(SECRET, SALT, CONTEXT)
    last = len(contents) - 1
    return [sealer.opening(), *(sealer.seal(one, is_last=n == last) for n, one in enumerate(contents))]


def test_frames_open_in_order_and_the_last_says_so() -> None:
    contents = [b"head", b"", b"x" * CONTENT_BYTES_MAX, b"end"]
    opener = AnswerOpener(SECRET, CONTEXT)
    got = []
    for frame in frames_of(*contents):
        assert not opener.is_ended
        assert len(frame) <= FRAME_BYTES_MAX
        got.append(opener.open(frame))
    assert got == [b"", *contents]
    assert opener.is_ended


def test_the_length_of_a_frame_tells_no_token() -> None:
    lengths = {len(frames_of(b"w" * size)[1]) for size in range(PAD_BYTES - 4)}
    assert len(lengths) == 1


def test_two_answers_to_one_request_share_no_key() -> None:
    other = AnswerSealer(SECRET, b"u" * SALT_BYTES, CONTEXT)
    assert other.seal(b"head", is_last=True) != AnswerSealer(SECRET, SALT, CONTEXT).seal(b"head", is_last=True)


@calm
@given(st.data())
def test_frames_that_were_left_out_repeated_moved_or_changed_do_not_open(data: st.DataObject) -> None:
    right = frames_of(b"head", b"one", b"two", b"three")
    frames = list(right)
    at = data.draw(st.integers(0, len(frames) - 1))
    match data.draw(st.sampled_from(["drop", "repeat", "swap", "flip", "cut", "empty", "kind"])):
        case "drop":
            del frames[at]
        case "repeat":
            frames.insert(at, frames[at])
        case "swap":
            other = (at + 1) % len(frames)
            frames[at], frames[other] = frames[other], frames[at]
        case "flip":
            byte = data.draw(st.integers(0, len(frames[at]) - 1))
            frames[at] = frames[at][:byte] + bytes((frames[at][byte] ^ 1,)) + frames[at][byte + 1 :]
        case "cut":
            frames[at] = frames[at][: data.draw(st.integers(0, len(frames[at]) - 1))]
        case "empty":
            frames[at] = b""
        case "kind":
            frames[at] = (
                bytes((data.draw(st.sampled_from([n for n in range(256) if n != frames[at][0]])),)) + frames[at][1:]
            )
    opener = AnswerOpener(SECRET, CONTEXT)
    got, failed = [], False
    for frame in frames:
        try:
            got.append(opener.open(frame))
        except BadSeal:
            failed = True
            with pytest.raises(BadSeal):  # and for ever
                opener.open(right[min(len(got), len(right) - 1)])
            break
    assert failed or not opener.is_ended
    assert got == [b"", b"head", b"one", b"two", b"three"][: len(got)]


def test_nothing_follows_the_last_frame() -> None:
    opener = AnswerOpener(SECRET, CONTEXT)
    frames = frames_of(b"head")
    for frame in frames:
        opener.open(frame)
    with pytest.raises(BadSeal):
        opener.open(frames[-1])
    sealer, opener = AnswerSealer(SECRET, SALT, CONTEXT), AnswerOpener(SECRET, CONTEXT)
    opener.open(sealer.opening())
    opener.open(sealer.seal(b"head", is_last=True))
    sealer.is_ended = False  # a serving peer that goes on
    with pytest.raises(BadSeal, match="after the last"):
        opener.open(sealer.seal(b"more", is_last=False))


# --- who the key is of ---


def statement(identity: Identity = ALICE, network: str = "main") -> bytes:
    return sign_key(identity, PUBLIC, network=network, time_ms=NOW_MS, expires_ms=NOW_MS + 86_400_000)


def test_a_key_is_believed_when_its_peer_signed_it() -> None:
    key = read_key(statement(), peer=ALICE.peer_id, network="main", now_ms=NOW_MS)
    assert (key.peer, key.public) == (ALICE.peer_id, PUBLIC)


def test_a_key_of_another_peer_network_or_time_is_not() -> None:
    with pytest.raises(BadSignature):
        read_key(statement(BOB), peer=ALICE.peer_id, network="main", now_ms=NOW_MS)
    with pytest.raises(WrongNetwork):
        read_key(statement(network="other"), peer=ALICE.peer_id, network="main", now_ms=NOW_MS)
    with pytest.raises(Expired):
        read_key(statement(), peer=ALICE.peer_id, network="main", now_ms=NOW_MS + 90_000_000)


@calm
@given(at=st.integers(0, len(statement()) - 1), bit=st.integers(0, 7))
def test_a_changed_statement_is_refused(at: int, bit: int) -> None:
    changed = bytearray(statement())
    changed[at] ^= 1 << bit
    with pytest.raises(CryptoError):
        read_key(bytes(changed), peer=ALICE.peer_id, network="main", now_ms=NOW_MS)


# --- keys that come and go ---


class Shop:
    """Alice's keys, and requests to them."""

    def __init__(self) -> None:
        self.keys = SealingKeys(ALICE, "main", 0.0)

    def public(self, now: float = 0.0) -> bytes:
        raw = self.keys.statement(now, NOW_MS)
        return read_key(raw, peer=ALICE.peer_id, network="main", now_ms=NOW_MS).public

    def sealed(self, public: bytes) -> bytes:
        return seal_request(b"a prompt", public=public, secret=SECRET, context=CONTEXT)

    def open(self, public: bytes, sealed: bytes, now: float = 0.0) -> bytes:
        return self.keys.open(sealed, public=public, request_id=REQUEST_ID, now=now).content


def test_what_was_opened_once_is_not_opened_again() -> None:
    shop = Shop()
    public = shop.public()
    sealed = shop.sealed(public)
    assert shop.open(public, sealed) == b"a prompt"
    with pytest.raises(Replayed):
        shop.open(public, sealed)
    with pytest.raises(Replayed):  # also when the key is the one before
        shop.open(public, sealed, now=LIFE_S)
    assert shop.open(public, shop.sealed(public)) == b"a prompt"


def test_a_key_opens_for_its_day_and_a_grace() -> None:
    shop = Shop()
    old = shop.public()
    assert shop.public(LIFE_S - 1) == old
    assert shop.public(LIFE_S) != old
    assert shop.open(old, shop.sealed(old), now=LIFE_S + GRACE_S - 1) == b"a prompt"
    with pytest.raises(UnknownSealingKey):
        shop.open(old, shop.sealed(old), now=LIFE_S + GRACE_S)


def test_a_key_whose_time_is_over_is_not_in_memory_any_more() -> None:
    shop = Shop()
    first = shop.keys._present
    shop.keys.tick(LIFE_S)
    assert shop.keys._before is first
    shop.keys.tick(LIFE_S + GRACE_S)
    assert shop.keys._before is None


def test_a_statement_ends_with_its_key_and_is_signed_anew() -> None:
    shop = Shop()
    raw = shop.keys.statement(LIFE_S - 100, NOW_MS)
    read_key(raw, peer=ALICE.peer_id, network="main", now_ms=NOW_MS)
    with pytest.raises(Expired):
        read_key(raw, peer=ALICE.peer_id, network="main", now_ms=NOW_MS + 200_000)
    assert shop.keys.statement(LIFE_S - 100 + RESIGN_S - 1, NOW_MS + 60_000) == raw
    assert shop.keys.statement(LIFE_S - 100 + RESIGN_S, NOW_MS + 60_000) != raw


def test_a_full_list_makes_a_new_key_instead_of_forgetting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crypto.sealing_keys.SEEN_MAX", 3)
    shop = Shop()
    old, requests = shop.public(), []
    for _ in range(3):
        requests.append(shop.sealed(old))
        shop.open(old, requests[-1])
    assert shop.public() != old
    for sealed in requests:
        with pytest.raises(UnknownSealingKey):
            shop.open(old, sealed)
    assert shop.open(shop.public(), shop.sealed(shop.public())) == b"a prompt"
    assert shop.keys.rotations == 1


def test_the_one_before_may_fill_its_list_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crypto.sealing_keys.SEEN_MAX", 2)
    shop = Shop()
    old = shop.public()
    shop.open(old, shop.sealed(old))
    new = shop.public(LIFE_S)
    shop.open(old, shop.sealed(old), now=LIFE_S)
    with pytest.raises(UnknownSealingKey):
        shop.open(old, shop.sealed(old), now=LIFE_S)
    assert shop.public(LIFE_S) == new


def test_garbage_fills_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crypto.sealing_keys.SEEN_MAX", 2)
    shop = Shop()
    public = shop.public()
    for number in range(10):
        with pytest.raises(BadSeal):
            shop.open(public, bytes((number,)) * 100)
    assert shop.public() == public


@calm
@given(public=st.binary(max_size=40) | st.just(PUBLIC), sealed=st.binary(max_size=200) | st.just(SEALED))
def test_any_bytes_open_or_are_one_of_three_errors(public: bytes, sealed: bytes) -> None:
    keys = SealingKeys(ALICE, "main", 0.0, make=lambda: PRIVATE)
    try:
        opened = keys.open(sealed, public=public, request_id=REQUEST_ID, now=0.0)
    except (BadSeal, UnknownSealingKey):
        return
    assert (public, sealed, opened.content) == (PUBLIC, SEALED, b"a prompt")
