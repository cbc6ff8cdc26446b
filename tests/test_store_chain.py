"""The chain: its formula, its events' bounds, and that any change of the file is found and named."""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crypto.canonical import encode
from crypto.errors import BadEncoding, BadSignature
from crypto.identity import Identity
from node.chain import FIRST_PREV, Head, body_digest, chain_hash, open_head, sign_head
from node.events import BODY_BYTES_MAX, FORGET_ROWS_MAX, HOUR_MS, KINDS, Forgotten, Note, decode_body, encode_body
from node.retention import Retention, Term
from tests.store_world import IDENTITY, World, inference, note, state


def test_the_formula_is_the_one_that_is_documented() -> None:
    raw = encode_body(Note(text="hello", subject="s"))
    assert raw == msgpack.packb({"subject": "s", "text": "hello"})
    nonce = bytes(range(32))
    content = hashlib.sha256(b"openagi:commitment:" + nonce + raw).digest()
    assert body_digest(raw, nonce) == content
    fields = msgpack.packb([1, FIRST_PREV, 7, 1_800_000_000_000, "note", content], use_bin_type=True)
    assert (
        chain_hash(FIRST_PREV, 7, 1_800_000_000_000, "note", content)
        == hashlib.sha256(b"openagi:memory:" + fields).digest()
    )


def test_a_head_is_of_one_node_for_one_purpose_and_does_not_grow_old() -> None:
    head = Head(id=7, hash=bytes(32))
    raw = sign_head(IDENTITY, head, 1_000)
    assert open_head(raw, IDENTITY.peer_id) == head
    with pytest.raises(BadSignature, match="wanted one of"):
        open_head(raw, Identity.make().peer_id)


@pytest.mark.parametrize(
    ("kind", "value", "why"),
    [
        ("note", {"subject": "", "text": "x", "more": 1}, "unknown field `more`"),
        ("note", {"text": "x" * 12_001}, "length <= 12000"),
        ("note", {"text": "x", "subject": "y" * 129}, "length <= 128"),
        ("note", {}, "missing required field `text`"),
        ("state", {"figures": {f"f{n}": 1.0 for n in range(65)}}, "length <= 64"),
        ("state", {"figures": {"Not A Name": 1.0}}, "matching regex"),
        ("state", {"figures": {"f": "1"}}, "Expected `float`"),
        ("lost", {"reason": "", "since_ms": -1, "counts": {}}, ">= 0"),
        ("mood", {}, "known are state, prediction"),
    ],
)
def test_a_body_out_of_bounds_is_refused_and_said(kind: str, value: object, why: str) -> None:
    with pytest.raises(BadEncoding, match=why):
        decode_body(kind, encode(value))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([*KINDS, "mood"]), st.binary(max_size=60))
def test_any_bytes_are_a_body_or_bad_encoding(kind: str, raw: bytes) -> None:
    try:
        body = decode_body(kind, raw)
    except BadEncoding:
        return
    assert encode_body(body)


def test_the_largest_of_what_we_write_fits() -> None:
    ranges = [(2**40 + 2 * n, 2**40 + 2 * n) for n in range(FORGET_ROWS_MAX)]
    assert len(encode_body(Forgotten(ranges=ranges))) < BODY_BYTES_MAX
    assert len(encode_body(Note(text="\U0001f600" * 12_000))) < BODY_BYTES_MAX


# --- a history that was tampered with ---


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A closed memory with everything in it: hours, a checkpoint, kept events before it, forgotten ones after."""
    world = World(tmp_path_factory.mktemp("history"))
    world.retention = Retention(terms={**Retention().terms, "state": Term(age_ms=HOUR_MS, rows_max=9)})
    store = world.open()
    store.append([note(f"early {n}", "gone" if n == 2 else "") for n in range(4)] + [state(), state()])
    store.append([note("early 4")])
    store.forget("gone")
    world.now_ms += 2 * HOUR_MS
    assert store.retain(world.now_ms) == 2
    store.append([note("late", "gone too"), inference(text="hello", subject="s"), note("later", "s")])
    store.forget("gone too")
    store.append([state(ts_ms=world.now_ms) for _ in range(3)] + [note("last but one"), note("last")])
    store.close()
    return world


def copied(history: World, folder: Path) -> World:
    for each in folder.glob("memory.db*"):
        each.unlink()
    world = World(folder, history.retention)
    world.path.write_bytes(history.path.read_bytes())
    world.now_ms = history.now_ms
    return world


def fault_of(world: World) -> tuple[int, str]:
    """What opening and verifying say; (0, "") when all is well. The file as a whole is id 0."""
    store = world.open()
    aside = store.statistics().set_aside
    fault = store.verify()
    store.close()
    return (0, aside) if aside else (fault.id, fault.why) if fault else (0, "")


def test_the_untouched_history_verifies(history: World, tmp_path: Path) -> None:
    assert fault_of(copied(history, tmp_path)) == (0, "")


TAMPERED = {
    "removed": ("DELETE FROM events WHERE kind = 'inference'", "it is missing"),
    "tail cut off": ("DELETE FROM events WHERE id > (SELECT max(id) - 2 FROM events)", "the end was cut off"),
    "reordered": (  # the last two notes of the forgotten stretch
        "UPDATE events SET id = 99 WHERE id = 12; UPDATE events SET id = 12 WHERE id = 13; "
        "UPDATE events SET id = 13 WHERE id = 99",
        "its prev_hash is not",
    ),
    "put before the first": ("UPDATE events SET id = -5 WHERE kind = 'inference'", "ids begin at 1"),
    "erased without a word": ("UPDATE events SET body = NULL, nonce = NULL WHERE kind = 'inference'", "no forgotten"),
    "erased in another's name": (
        "UPDATE events SET body = NULL, nonce = NULL, subject = NULL, erased_by = "
        "(SELECT max(id) FROM events WHERE kind = 'forgotten') WHERE kind = 'inference'",
        "no forgotten",
    ),
    "subject": ("UPDATE events SET subject = 'x' WHERE kind = 'inference'", "its subject is not its body's"),
    "subject left": ("UPDATE events SET subject = 'x' WHERE id = 3", "is still there"),
    "kept removed": ("DELETE FROM events WHERE id = 2", "the checkpoint names"),
    "all before removed": ("DELETE FROM events WHERE id < 8", "the checkpoint names"),
    "body": (
        "UPDATE events SET body = x'82a77375626a656374a0a474657874a161' WHERE id = 1",
        "they do not make its body",
    ),
    "head removed": ("DELETE FROM meta WHERE key = 'head'", "signed head is missing"),
    "head of another": ("UPDATE meta SET value = x'00' WHERE key = 'head'", "signed head is missing"),
    "type": ("UPDATE events SET nonce = NULL WHERE kind = 'inference'", "does not have its type"),
    "says forgotten": ("UPDATE events SET erased_by = 1 WHERE kind = 'inference'", "has a body and says"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_tampering_is_named(history: World, tmp_path: Path, name: str) -> None:
    world = copied(history, tmp_path)
    question, why = TAMPERED[name]
    world.tamper(question)
    assert why in fault_of(world)[1]


def rewritten(world: World, event_id: int, *, after: bool) -> None:
    """Change an event's time, and make its hash (and all after it) fit again, as one without the key may."""
    rows = world.rows("SELECT id, ts_ms, kind, body_digest, prev_hash FROM events ORDER BY id")
    prev: bytes | None = None
    for row_id, ts_ms, kind, content, old_prev in rows:
        if row_id < event_id:
            continue
        new_ms = ts_ms + (row_id == event_id)
        prev = old_prev if prev is None else prev
        own = chain_hash(prev, row_id, new_ms, kind, content)
        world.tamper("UPDATE events SET ts_ms = ?, prev_hash = ?, hash = ? WHERE id = ?", (new_ms, prev, own, row_id))
        prev = own
        if not after:
            return


def test_a_history_rewritten_without_the_key_is_found(history: World, tmp_path: Path) -> None:
    world = copied(history, tmp_path)
    (event_id,) = world.rows("SELECT id FROM events WHERE kind = 'inference'")[0]
    rewritten(world, event_id, after=True)
    assert "the signed head names: the history was rewritten" in fault_of(world)[1]
    world = copied(history, tmp_path)
    rewritten(world, 1, after=False)
    assert "they are not the" in fault_of(world)[1], "before the checkpoint, where a hash of its own is all a row has"


COLUMNS = ("id", "ts_ms", "kind", "subject", "nonce", "body", "body_digest", "prev_hash", "hash", "erased_by")


@pytest.mark.slow
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.data())
def test_one_flipped_byte_anywhere_in_events_is_found_and_named(history: World, tmp_path: Path, place: Any) -> None:
    world = copied(history, tmp_path)
    rows = world.rows(f"SELECT {', '.join(COLUMNS)} FROM events ORDER BY id")
    row = place.draw(st.sampled_from(rows))
    column = place.draw(st.sampled_from([n for n, value in enumerate(row) if value not in (None, "")]))
    value = row[column]
    if isinstance(value, int):
        changed: Any = value ^ (1 << place.draw(st.integers(0, 40)))
    else:
        raw = bytearray(value.encode() if isinstance(value, str) else value)
        raw[place.draw(st.integers(0, len(raw) - 1))] ^= 1 << place.draw(st.integers(0, 6))
        changed = raw.decode("ascii", "replace") if isinstance(value, str) else bytes(raw)
    try:
        world.tamper(f"UPDATE events SET {COLUMNS[column]} = ? WHERE id = ?", (changed, row[0]))
    except sqlite3.IntegrityError:
        return  # another row has that id
    found, why = fault_of(world)
    assert why != "", f"{COLUMNS[column]} of event {row[0]}"
    if column == 0:
        assert found in (row[0], changed, 0) or "missing" in why or "checkpoint" in why
    elif row[0] == rows[-1][0]:
        assert found in (row[0], 0), "the last one, which is looked at when the file is opened"
    elif found != row[0]:  # what vouches for others: the first of those is named
        assert row[2] in ("forgotten", "pruned"), (found, why, row[0], COLUMNS[column])


@pytest.mark.slow
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 1 << 30), bit=st.integers(0, 7))
def test_a_flipped_bit_of_the_file_is_found_or_changes_no_event(
    history: World, tmp_path: Path, place: int, bit: int
) -> None:
    whole = bytearray(history.path.read_bytes())
    world = copied(history, tmp_path)
    whole[place % len(whole)] ^= 1 << bit
    world.path.write_bytes(bytes(whole))
    question = (
        "SELECT id, ts_ms, kind, body, body_digest, prev_hash, hash, erased_by FROM events NOT INDEXED ORDER BY id"
    )
    if fault_of(world)[1] == "":
        assert world.rows(question)[: len(history.rows(question))] == history.rows(question)


def test_every_kind_is_frozen_and_strict() -> None:
    for kind in KINDS.values():
        assert kind.__struct_config__.frozen
        assert kind.__struct_config__.forbid_unknown_fields
    with pytest.raises(AttributeError):
        Note(text="x").text = "y"  # type: ignore[misc]  # that is the test
