"""Identity: peer ids, signatures, and the key file (SECURITY.md K1)."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from crypto.errors import BadKey, BadSignature, CryptoError, UnsafePermissions
from crypto.identity import KEY_BYTES, Identity, peer_id_of, public_key_of, verify

ROOT = Path(__file__).parent.parent
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no mode bits")

# RFC 8032, section 7.1, tests 1 and 2: seed, public key, message, signature.
RFC_8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
        "d25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c"
        "387b2eaeb4302aeeb00d291612bb0c00",
    ),
]
GOLDEN_PEER_ID = "12D3KooWA4Xop1JaT3MHxwYMkCepYsv4iPVopMXwCz5iHYdBfeSB"  # of the seed 00 01 .. 1f
KEY = Identity(bytes(range(32)))


@pytest.mark.parametrize(("seed", "public_key", "message", "signature"), RFC_8032)
def test_rfc_8032(seed: str, public_key: str, message: str, signature: str) -> None:
    identity = Identity(bytes.fromhex(seed))
    assert identity.public_key.hex() == public_key
    assert identity.sign(bytes.fromhex(message)).hex() == signature
    verify(identity.peer_id, bytes.fromhex(message), bytes.fromhex(signature))


def test_golden_peer_id() -> None:
    assert KEY.peer_id == GOLDEN_PEER_ID
    assert public_key_of(GOLDEN_PEER_ID) == KEY.public_key


@pytest.mark.slow
def test_the_peer_id_is_libp2ps_own() -> None:
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.peer.id import ID

    for seed in (bytes(32), b"\xff" * 32, *(bytes([n]) * 32 for n in range(1, 20))):
        ours = Identity(seed)
        theirs = create_new_key_pair(ours.seed)
        assert theirs.public_key.to_bytes() == ours.public_key
        assert str(ID.from_pubkey(theirs.public_key)) == ours.peer_id
        assert theirs.private_key.sign(b"message") == ours.sign(b"message")
        assert ID.from_string(ours.peer_id).extract_public_key().to_bytes() == public_key_of(ours.peer_id)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES))
def test_peer_ids_and_public_keys_are_one_to_one(public_key: bytes) -> None:
    peer_id = peer_id_of(public_key)
    assert len(peer_id) == 52
    assert peer_id.startswith("12D3Koo")
    assert public_key_of(peer_id) == public_key


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(max_size=80) | st.text("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz", max_size=60))
@example("")
@example("1" + GOLDEN_PEER_ID)
@example(GOLDEN_PEER_ID[1:])
@example(GOLDEN_PEER_ID + " ")
@example(GOLDEN_PEER_ID[:-1])
@example(GOLDEN_PEER_ID.lower())
@example("QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N")  # an RSA peer's
@example("16Uiu2HAmRTo4mhrpTjHv8mR1VpUTWAVMiwXvxkXCbSmzGSG4hMyo")  # a secp256k1 peer's
@example("1" * 64)
@example("z" * 64)
@example("z" * 100_000)
def test_other_texts_are_bad_keys(text: str) -> None:
    with pytest.raises(BadKey) as caught:
        public_key_of(text)
    assert len(str(caught.value)) < 800
    with pytest.raises(BadSignature):
        verify(text, b"", bytes(64))


@pytest.mark.parametrize("size", [0, 31, 33])
def test_keys_of_another_length_are_bad(size: int) -> None:
    with pytest.raises(BadKey, match=f"{size} bytes"):
        Identity(bytes(size))
    with pytest.raises(BadKey, match=f"{size} bytes"):
        peer_id_of(bytes(size))


def test_signatures_bind_key_and_message() -> None:
    signature = KEY.sign(b"message")
    verify(KEY.peer_id, b"message", signature)
    flipped = bytes([signature[0] ^ 1]) + signature[1:]
    other = Identity.make()
    for peer, message, proof in [
        (KEY.peer_id, b"messagf", signature),
        (other.peer_id, b"message", signature),
        (KEY.peer_id, b"message", flipped),
        (KEY.peer_id, b"message", b""),
        (KEY.peer_id, b"message", signature + b"\x00"),
        (peer_id_of(bytes(32)), b"message", bytes(64)),  # a key of small order
        (peer_id_of(b"\x01" + bytes(31)), b"message", b"\x01" + bytes(63)),  # the neutral element signs anything
    ]:
        with pytest.raises(BadSignature):
            verify(peer, message, proof)


def test_identities_differ_and_never_show_the_seed() -> None:
    one, two = Identity.make(), Identity.make()
    assert one.peer_id != two.peer_id
    for shown in (repr(one), str(one), f"{one}", repr([one])):
        assert one.seed.hex() not in shown
        assert repr(one.seed)[2:-1] not in shown
        assert one.peer_id in shown


# --- the key file ---


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "new" / "identity.key"
    KEY.save(path)
    again = Identity.load(path)
    assert (again.seed, again.peer_id) == (KEY.seed, KEY.peer_id)
    assert os.listdir(path.parent) == ["identity.key"]


@posix
def test_only_the_owner_may_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "identity.key"
    KEY.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_load_or_make_makes_once(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    made = Identity.load_or_make(path)
    assert Identity.load_or_make(path).peer_id == made.peer_id


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(b"something of the user's")
    with pytest.raises(BadKey, match="not overwritten"):
        KEY.save(path)
    assert path.read_bytes() == b"something of the user's"
    assert os.listdir(tmp_path) == ["identity.key"]


@posix
@pytest.mark.parametrize("target", ["there", "nowhere"])
def test_a_symlink_is_neither_followed_nor_replaced(tmp_path: Path, target: str) -> None:
    KEY.save(tmp_path / "there")
    path = tmp_path / "identity.key"
    path.symlink_to(tmp_path / target)
    with pytest.raises(UnsafePermissions, match="symbolic link"):
        Identity.load(path)
    with pytest.raises(UnsafePermissions, match="symbolic link"):
        Identity.load_or_make(path)
    with pytest.raises(BadKey, match="not overwritten"):
        KEY.save(path)
    assert path.is_symlink()
    assert not (tmp_path / "nowhere").exists()


@posix
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o604, 0o601, 0o620, 0o777])
def test_a_file_that_others_may_use_is_refused_and_says_what_to_do(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.key"
    KEY.save(path)
    path.chmod(mode)
    for load in (Identity.load, Identity.load_or_make):
        with pytest.raises(UnsafePermissions) as caught:
            load(path)
        for said in (str(path), f"{mode:04o}", f"chmod 600 {path}"):
            assert said in str(caught.value)
    path.chmod(0o600)
    assert Identity.load(path).peer_id == KEY.peer_id


@posix
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root to give a file away")
def test_a_file_of_another_owner_is_refused_even_for_root(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    KEY.save(path)
    os.chown(path, 12_345, -1)
    with pytest.raises(UnsafePermissions, match="belongs to user 12345"):
        Identity.load(path)


def key_text() -> bytes:
    return f"openagi identity 1\n{KEY.seed.hex()}\n{KEY.peer_id}\n".encode()


def test_the_format_of_the_file_is_fixed(tmp_path: Path) -> None:
    """What older nodes wrote must stay readable."""
    KEY.save(tmp_path / "key")
    assert (tmp_path / "key").read_bytes() == key_text()


@posix
@pytest.mark.parametrize("size", range(len(key_text())))
def test_a_truncated_file_is_refused_at_every_length(tmp_path: Path, size: int) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(key_text()[:size])
    path.chmod(0o600)
    with pytest.raises(BadKey, match="damaged") as caught:
        Identity.load(path)
    assert KEY.seed.hex()[:16] not in str(caught.value)
    with pytest.raises(BadKey):  # and it is not replaced by a new identity either
        Identity.load_or_make(path)
    assert path.read_bytes() == key_text()[:size]


@posix
@pytest.mark.parametrize(
    "content",
    [
        key_text() + b"\n",
        key_text().replace(b"identity 1", b"identity 2"),
        key_text().replace(KEY.seed.hex().encode(), bytes(32).hex().encode()),  # another seed than the id says
        key_text().replace(KEY.seed.hex().encode(), b"g" * 64),
        key_text().replace(KEY.seed.hex().encode(), b"\xff" * 64),
        key_text().replace(b"00010203", b"00 10 20"),
        b"\x00" * 4096,
        b"x" * (1 << 20),
        KEY.seed,
        b"-----BEGIN OPENSSH PRIVATE KEY-----\n",
    ],
    ids=lambda content: repr(content[:20]),
)
def test_another_content_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(BadKey, match="damaged"):
        Identity.load(path)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadKey, match="no key file at"):
        Identity.load(tmp_path / "none" / "identity.key")


@posix
def test_other_kinds_of_file_are_refused_without_hanging(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    (tmp_path / "folder").mkdir(mode=0o700)
    for name in ("fifo", "folder"):
        with pytest.raises(BadKey, match="not a regular file"):
            Identity.load(tmp_path / name)


@posix
def test_a_folder_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadKey, match="cannot make the folder"):
        KEY.save(tmp_path / "file" / "identity.key")
    with pytest.raises(BadKey, match="cannot make the folder"):
        KEY.save(tmp_path / "file" / "deep" / "identity.key")
    with pytest.raises(CryptoError):
        Identity.load(tmp_path / "file" / "identity.key")


@posix
def test_a_full_disk_leaves_nothing_behind() -> None:
    """Writing to a folder that takes no files: BadKey, with the system's reason."""
    with pytest.raises(BadKey, match="cannot write the key file"):
        KEY.save(Path("/proc/self/identity.key"))


# The child is killed by itself at the n-th line that `save` runs, so that every place of a kill is met once.
KILL_AT_EACH_LINE = """
import os, signal, sys
from pathlib import Path
from crypto.identity import Identity

key, folder = Identity(bytes(range(32))), Path(sys.argv[1])

def killed_at(n, path):
    lines = 0
    def count(frame, event, argument):
        nonlocal lines
        if frame.f_code.co_filename.endswith(("identity.py", "disk.py")):
            lines += event == "line"
            if lines == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return count
        return None
    child = os.fork()
    if child == 0:
        sys.settrace(count)
        key.save(path)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])

n = 1
while killed_at(n, folder / str(n) / "identity.key"):
    n += 1
print(n - 1)
"""


@posix
@pytest.mark.slow
def test_a_kill_at_any_line_of_save_leaves_the_whole_file_or_none(tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", KILL_AT_EACH_LINE, str(tmp_path)], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert child.returncode == 0, child.stderr[-500:]
    kills = int(child.stdout)
    assert kills >= 15, "the tracing found no lines to kill at"
    whole = twice = 0
    for n in range(1, kills + 1):
        path = tmp_path / str(n) / "identity.key"
        whole += path.exists()
        twice += path.exists() and path.stat().st_nlink == 2
        for left in path.parent.glob(".*"):
            assert re.fullmatch(r"\.identity\.key\.tmp-\d+-[0-9a-f]{8}", left.name)
            assert stat.S_IMODE(left.stat().st_mode) == 0o600
        assert path.exists() == (Identity.load_or_make(path).peer_id == KEY.peer_id)
        assert path.stat().st_nlink == 1, "a second name of the key was left"
    assert 0 < whole < kills
    assert twice > 0


@posix
@pytest.mark.slow
def test_only_one_of_many_writers_wins(tmp_path: Path) -> None:
    """Eight processes at once: one key in the file, the others are told that it exists or read it."""
    script = (
        "import sys; from pathlib import Path; from crypto.identity import Identity; from crypto.errors import BadKey\n"
        "try: print(Identity.load_or_make(Path(sys.argv[1])).peer_id)\n"
        "except BadKey as e: assert 'exists already' in str(e); print('told')\n"
    )
    path = tmp_path / "identity.key"
    writers = [
        subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(4)
    ]
    said = {writer.communicate(timeout=60)[0].strip() for writer in writers}
    assert all(writer.returncode == 0 for writer in writers)
    assert said - {"told"} == {Identity.load(path).peer_id}
