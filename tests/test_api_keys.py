"""API keys: what is one, what is kept of it, how a running node learns of it, and the commands."""

from __future__ import annotations

import json
import os
import secrets
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from node.__main__ import app
from node.api_key_file import KEYS_FILE, KeyFile, changing_keys, read_keys
from node.api_keys import (
    ApiKey,
    KeyFault,
    KeyRefused,
    Keyring,
    KeyScope,
    decode_keys,
    digest_of,
    encode_keys,
    key_text,
    parse_rate,
    parse_span_s,
)
from node.errors import ConfigError

ID = "0123456789ab"


def made(id: str = ID, **changes: object) -> tuple[ApiKey, str]:
    """A key and its text."""
    text = key_text(id, secrets.token_bytes(32))
    given: dict[str, object] = {"name": "n", "scopes": (KeyScope.INFER,), "created_s": 0, **changes}
    return ApiKey(id=id, sha256=digest_of(text), **given), text  # type: ignore[arg-type]


def fault_of(ring: Keyring, text: str, now: float = 0.0) -> KeyFault:
    with pytest.raises(KeyRefused) as caught:
        ring.check(text, now)
    assert len(text) < 20 or text not in str(caught.value)
    return caught.value.fault


def test_a_key_is_taken_by_its_whole_text_and_each_fault_has_its_word() -> None:
    good, text = made()
    ring = Keyring([good])
    assert ring.check(text, 0.0) is good
    assert fault_of(ring, text[:-1] + ("A" if text[-1] != "A" else "B")) is KeyFault.UNKNOWN
    assert fault_of(ring, f"oa_{ID}.") is KeyFault.UNKNOWN
    assert fault_of(ring, good.sha256) is KeyFault.UNKNOWN
    assert fault_of(Keyring([]), text) is KeyFault.UNKNOWN
    revoked, text = made(revoked_s=5)
    assert fault_of(Keyring([revoked]), text) is KeyFault.REVOKED
    assert fault_of(Keyring([revoked]), key_text(ID, bytes(32))) is KeyFault.UNKNOWN  # not told to who has no secret
    expires, text = made(expires_s=10)
    assert Keyring([expires]).check(text, 9.9) is expires
    assert fault_of(Keyring([expires]), text, 10.0) is KeyFault.EXPIRED


@pytest.mark.slow
@settings(deadline=None, max_examples=50)
@given(st.one_of(st.text(max_size=200), st.from_regex(r"oa_[0-9a-f]{12}\.[A-Za-z0-9_-]{43}", fullmatch=True)))
def test_any_text_is_refused_with_a_word(text: str) -> None:
    assert fault_of(Keyring([made()[0]]), text) is KeyFault.UNKNOWN


@settings(deadline=None, max_examples=100)
@given(st.one_of(st.binary(max_size=300), st.just(encode_keys([made()[0]] * 2))))
def test_any_file_is_keys_or_a_sentence(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_keys(content)


@pytest.mark.parametrize(("text", "rate"), [("5/s", 5.0), ("30/m", 0.5), ("36/h", 0.01), ("0.5/s", 0.5)])
def test_rates(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["5", "0/s", "-1/s", "5/d", "1e9/s", "9999999/s", "", "5/s ", "٥/s"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(ValueError, match="is not a rate like 5/s"):
        parse_rate(text)
    with pytest.raises(ValueError, match="is not a time like 30m"):
        parse_span_s(text)


def test_times() -> None:
    assert [parse_span_s(text) for text in ("1m", "12h", "30d")] == [60, 43_200, 2_592_000]


def write(path: Path, *keys: ApiKey, at_ns: int) -> None:
    with changing_keys(path) as kept:
        kept[:] = keys
    os.utime(path, ns=(at_ns, at_ns))


def test_a_running_node_notices_keys_within_a_second_and_reads_only_what_changed(tmp_path: Path) -> None:
    path = tmp_path / KEYS_FILE
    file = KeyFile(path)
    assert len(file) == 0
    first, text = made()
    assert file.ring(now=10.0) is file.ring(now=10.9)
    write(path, first, at_ns=1_000)
    assert fault_of(file.ring(now=10.9), text) is KeyFault.UNKNOWN
    ring = file.ring(now=11.0)
    assert ring.check(text, 0.0) == first
    assert file.ring(now=20.0) is ring
    write(path, made(revoked_s=1)[0], at_ns=2_000)
    assert fault_of(file.ring(now=21.0), text) is KeyFault.UNKNOWN
    path.unlink()
    assert len(file.ring(now=22.0)) == 0


def test_a_file_that_breaks_under_a_node_leaves_the_keys_it_had(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / KEYS_FILE
    first, text = made()
    write(path, first, at_ns=1_000)
    file = KeyFile(path)
    path.write_bytes(b'{"keys": [{"secret": "canary"}]}')
    assert file.ring(now=5.0).check(text, 0.0) == first
    assert "are still taken" in caplog.text
    with pytest.raises(ConfigError, match="are damaged") as caught:
        KeyFile(path)
    assert "canary" not in str(caught.value)


@pytest.mark.skipif(os.name != "posix", reason="Windows has no mode bits")
def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / KEYS_FILE
    write(path, made()[0], at_ns=1_000)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_keys(path)
    path.chmod(0o600)
    path.rename(tmp_path / "real")
    path.symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match="symbolic link"):
        read_keys(path)


def test_two_changes_at_a_time_are_not_lost(tmp_path: Path) -> None:
    path = tmp_path / KEYS_FILE
    with changing_keys(path) as keys:
        with pytest.raises(ConfigError, match="another command is changing"), changing_keys(path):
            pass
        keys.append(made()[0])
    assert len(read_keys(path)) == 1


def run(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["keys", *words])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


@pytest.mark.slow
def test_the_commands_make_list_and_revoke(tmp_path: Path) -> None:
    where = ("--data-dir", str(tmp_path))
    told = json.loads(run("create", "--name", "bob", "--limit", "30/m", "--expires", "30d", "--json", *where))
    text = told.pop("key")
    plain = run("create", "--name", "[bold]eve", "--scope", "train", "--scope", "metrics", "--tokens", "9", *where)
    first, second = read_keys(tmp_path / KEYS_FILE)
    ring = Keyring([first, second])
    assert ring.check(text, first.created_s) == first
    assert ring.check(plain.strip(), 0) == second
    assert (first.requests_per_s, first.burst, second.tokens_per_min) == (0.5, 2.0, 9)
    assert second.scopes == (KeyScope.TRAIN, KeyScope.METRICS)
    assert first.expires_s == first.created_s + 30 * 86_400
    listing = run("list", *where) + run("list", "--json", *where)
    assert "[bold]eve" in listing
    assert told["id"] in listing
    kept = (tmp_path / KEYS_FILE).read_text()
    for secret in (text, plain.strip()):
        assert secret.partition(".")[2] not in listing + kept
    assert "is revoked" in run("revoke", first.id, *where)
    assert json.loads(run("list", "--json", *where))["keys"][0]["state"] == "revoked"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("create", "--name", "x", "--scope", "root"), "--scope wants one of infer, train, metrics, admin"),
        (("create", "--name", ""), "--name wants"),
        (("create", "--name", "x", "--limit", "5"), "is not a rate like 5/s"),
        (("create", "--name", "x", "--expires", "5"), "is not a time like 30m"),
        (("create", "--name", "x", "--tokens", "0"), "--tokens"),
        (("create", "--name", "x", "--concurrent", "0"), "--concurrent"),
        (("revoke", "nobody"), "there is no API key 'nobody'"),
    ],
    ids=str,
)
def test_what_the_commands_refuse(tmp_path: Path, words: tuple[str, ...], wanted: str) -> None:
    assert wanted in run(*words, "--data-dir", str(tmp_path), code=2)
    assert not (tmp_path / KEYS_FILE).exists()
