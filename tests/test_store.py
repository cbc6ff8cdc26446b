"""The node's memory: append, recall, retention, forgetting, and disks and files that fail."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crypto.errors import BadEncoding
from node.errors import StoreLocked
from node.events import HOUR_MS, Event, Forgotten, Hour, Lost, Note, Pruned
from node.retention import DAY_MS, Retention, Term
from node.store import Store
from node.store_vectors import DIMS_MAX
from tests.store_world import IDENTITY, T0_MS, World, inference, note, state


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def texts(found: list[object]) -> list[str]:
    return [each.body.text for each in found if isinstance(each.body, Note)]  # type: ignore[attr-defined]  # Kept


def test_what_was_appended_is_recalled_newest_first_and_over_a_restart(world: World) -> None:
    store = world.open()
    assert store.append([note("the first of all", "s1"), state(), inference(text="a wolf")]) == (1, 2, 3)
    assert store.append([note("the second", "s2")]) == (4,)
    store.close()
    store = world.open()
    assert [each.id for each in store.recent(None, 10)] == [4, 3, 2, 1]
    assert texts(store.recent("note", 1)) == ["the second"]
    assert texts(store.by_subject("s1", 5)) == ["the first of all"]
    assert texts(store.search("ALL, first!", 5)) == ["the first of all"]
    assert [each.id for each in store.search("wolf", 5)] == [3]
    assert [each.id for each in store.search("r1", 5)] == [3, 2]
    assert store.search("first second", 5) == []
    assert store.append([note("third")]) == (5,)
    assert store.verify() is None
    told = store.statistics()
    assert (told.entries, told.head_id, told.index, told.degraded, told.lost) == (5, 5, "fts5", "", {})
    store.close()


def test_an_event_out_of_bounds_is_refused_before_anything_is_written(world: World) -> None:
    store = world.open()
    with pytest.raises(BadEncoding, match="12000"):
        store.append([note("fine"), note("x" * 12_001)])
    assert store.statistics().entries == 0
    assert store.append([note("fine")]) == (1,)
    assert store.verify() is None
    store.close()


def test_the_most_alike_come_first(world: World) -> None:
    store = world.open()
    ids = store.append([note(word) for word in ("east", "north", "north east", "none")])
    for event_id, vector in zip(ids[:3], ([1.0, 0.0], [0.0, 5.0], [3.0, 3.0]), strict=True):
        assert store.put_vector(event_id, vector)
    assert store.put_vector(ids[3], [1.0, 0.0, 0.0]), "other dimensions are not compared"
    found = store.nearest([2.0, 0.1], 2)
    assert [kept.id for _, kept in found] == [1, 3]
    assert found[0][0] == pytest.approx(0.99875, abs=1e-4)
    assert not store.put_vector(99, [1.0])
    for bad in ([], [0.0, 0.0], [float("nan")], [1.0] * (DIMS_MAX + 1)):
        with pytest.raises(ValueError, match="finite numbers"):
            store.nearest(bad, 1)
    assert store.append([note("after a refusal")]) == (5,)
    store.close()


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Store]:
    """The same events with an index and without."""
    stores = []
    for full_text in (True, False):
        store = World(tmp_path_factory.mktemp("asked")).open(full_text=full_text)
        store.append([note("the wolf and the seven kids"), note("a wolf_pack's song"), note("NEAR or NOT"), state()])
        stores.append(store)
    return stores[0], stores[1]


SYNTAX = ('"', "*", "^", "-", ":", "(", ")", "NEAR", "OR", "AND", "NOT", "wolf", "the", "{a}", "\0", "text:")


@settings(deadline=None, max_examples=60)
@given(st.one_of(st.text(max_size=40), st.lists(st.sampled_from(SYNTAX), max_size=20).map(" ".join)))
def test_no_question_raises(asked: tuple[Store, Store], text: str) -> None:
    for store in asked:
        store.search(text, 5)
        assert store.statistics().degraded == ""


def test_without_fts5_the_newest_are_looked_through_and_that_is_said(asked: tuple[Store, Store], world: World) -> None:
    for words in ("wolf", "the KIDS", "near not", "unheard"):
        indexed, scanned = ([each.id for each in store.search(words, 9) if each.id != 2] for store in asked)
        assert indexed == scanned
    assert [store.statistics().index for store in asked] == ["fts5", "scan"]
    store = world.open(full_text=False)
    store.append([note("written without an index")])
    store.close()
    store = world.open()
    assert texts(store.search("index", 1)) == ["written without an index"], "it is built when FTS5 is there"
    store.close()


# --- forgetting ---

SECRET = "zanzibarquokka"


def secrets_in(raw: bytes) -> int:
    return raw.lower().count(SECRET.encode())


def test_forgetting_leaves_no_byte_of_the_text_and_the_chain_holds(world: World) -> None:
    store = world.open()
    for number in range(30):  # many segments of the index, pages of text that overflow, words of it alone
        long = f"{SECRET}{number} " * 100
        ids = store.append([note(f"kept {number}"), note(long, "them"), inference(text=SECRET, subject="them")])
        store.put_vector(ids[1], [1.0, float(number)])
        store.put_vector(ids[0], [1.0, 0.0])
    assert secrets_in(world.raw()) > 30
    before = store.statistics().head_id
    assert store.forget("them") == 60
    raw = world.raw()
    assert secrets_in(raw) == 0
    assert b"zanzibarq" not in raw, "nor the start of a word of the index"
    assert store.search(f"{SECRET}3", 5) == []
    assert store.by_subject("them", 5) == []
    assert len(store.nearest([0.1, 1.0], 99)) == 30, "the vectors went too"
    assert store.verify() is None
    assert store.statistics().head_id == before + 1
    forgotten = store.recent("forgotten", 1)[0].body
    assert isinstance(forgotten, Forgotten)
    assert sum(last - first + 1 for first, last in forgotten.ranges) == 60
    assert store.forget("them") == 0
    assert len(store.search("kept", 99)) == 30
    store.close()
    store = world.open()
    assert store.verify() is None
    store.close()


def test_a_kill_between_erasing_and_wiping_is_made_good_at_the_next_start(world: World, tmp_path: Path) -> None:
    store = world.open()
    for _ in range(4):
        store.append([note(SECRET, "them"), note("kept")])
    assert store._run(lambda db: store._forget_some(db, "them"), -1) == 4
    crashed = world.crashed(tmp_path / "crashed")
    assert secrets_in(crashed.raw()) > 0
    store.close()
    store = crashed.open()
    assert secrets_in(crashed.raw()) == 0
    assert store.verify() is None
    store.close()


def test_more_than_one_event_can_vouch_for(world: World) -> None:
    store = world.open()
    for _ in range(3):
        store.append([note("x", "them" if n % 2 else "us") for n in range(1000)])
    assert store.forget("them") == 1500
    assert store.verify() is None
    assert len(store.recent("forgotten", 9)) == 2
    with pytest.raises(ValueError, match="empty subject"):
        store.forget("")
    store.close()


# --- retention ---


def terms(**changed: Term) -> Retention:
    return Retention(terms={**Retention().terms, **changed})


def test_raw_events_become_hours_and_the_rest_verifies(world: World) -> None:
    world.retention = terms(state=Term(age_ms=2 * HOUR_MS, rows_max=10_000), note=Term(age_ms=DAY_MS, rows_max=2))
    store = world.open()
    start_ms = T0_MS - T0_MS % HOUR_MS
    for hour in range(4):
        world.now_ms = start_ms + hour * HOUR_MS
        store.append([state(hour * 10.0 + n, world.now_ms + n) for n in range(10)] + [note(f"note {hour}")])
    store.forget("nobody")
    world.now_ms = start_ms + 4 * HOUR_MS
    assert store.retain(world.now_ms) == 22  # two hours of states, two notes over the bound
    assert store.retain(world.now_ms) == 0
    assert texts(store.recent("note", 9)) == ["note 3", "note 2"]
    assert store.search("note 1", 9) == []
    hours = [each.body for each in store.recent("hour", 9)]
    assert [body.from_ms for body in hours if isinstance(body, Hour)] == [start_ms + HOUR_MS, start_ms]
    last = hours[0]
    assert isinstance(last, Hour)
    assert (last.kind, last.count) == ("state", 10)
    latency = last.figures["latency_ms"]
    assert (latency.count, latency.mean, latency.least, latency.most) == (10, pytest.approx(14.5), 10.0, 19.0)
    assert store.verify() is None
    for later in range(5, 8):  # pass after pass; the checkpoints before the last go
        world.now_ms = start_ms + later * HOUR_MS
        store.append([inference(world.now_ms)])
        while store.retain(world.now_ms):
            assert store.verify() is None
    assert len(store.recent("state", 99)) == 0
    assert sum(b.count for e in store.recent("hour", 99) if isinstance(b := e.body, Hour)) == 40
    while store.retain(world.now_ms + 40 * DAY_MS):
        assert store.verify() is None
    assert len(store.recent("pruned", 99)) <= 2
    store.close()
    store = world.open()
    assert store.verify() is None
    store.close()


def test_codes_are_counted_and_forgotten_ones_too(world: World) -> None:
    world.retention = terms(inference=Term(age_ms=1, rows_max=10))
    store = world.open()
    store.append([inference(outcome="ok", subject="a"), inference(outcome="no_room"), inference(outcome="ok")])
    store.forget("a")
    assert store.retain(T0_MS + HOUR_MS) == 3
    (hour,) = store.recent("hour", 9)
    assert isinstance(hour.body, Hour)
    assert (hour.body.count, hour.body.codes) == (3, {"ok": 1, "no_room": 1})
    assert store.verify() is None
    store.close()


def test_room_that_retention_makes_goes_back_to_the_disk(world: World) -> None:
    world.retention = terms(inference=Term(age_ms=1, rows_max=10))
    store = world.open()
    store.append([inference(text="x" * 10_000)] * 200)
    before = store.statistics().bytes
    assert store.retain(T0_MS + HOUR_MS) == 200
    assert store.statistics().bytes < before / 4
    assert store.verify() is None
    store.close()


def test_a_verification_in_steps_goes_on_while_events_come_and_begins_anew_when_some_go(world: World) -> None:
    store = world.open()
    for _ in range(3):
        store.append([state() for _ in range(200)])
    walk = store.verification()
    walk.step()
    store.append([note("meanwhile", "them")])
    walk.step()
    assert not walk.done
    store.forget("them")
    steps = 0
    while not walk.done:
        walk.step()
        steps += 1
    assert (walk.fault, steps) == (None, 4)
    store.close()


# --- disks that fail ---


def lost_counts(store: Store) -> list[dict[str, int]]:
    return [each.body.counts for each in store.recent("lost", 9) if isinstance(each.body, Lost)]


def test_a_full_file_is_said_counted_and_recovered_from(world: World) -> None:
    world.retention = Retention(bytes_max=1 << 20)
    store = world.open()
    kept = 0
    while ids := store.append([inference(text="x" * 5_000)] * 20):
        kept += len(ids)
    assert kept > 60
    assert store.append([inference(text="x" * 5_000)] * 20 + [note("lost too")]) == ()
    told = store.statistics()
    assert "full" in told.degraded
    assert str(world.path) in told.degraded
    assert told.lost == {"inference": 40, "note": 1}
    assert told.bytes <= 1 << 20
    assert len(store.recent("inference", 999)) == kept, "what is there is recalled"
    assert store.verify() is None
    assert store.retain(T0_MS) > 0, "over its bound the oldest measurements go, whatever their age"
    assert store.append([note("again")]) != ()
    assert (store.statistics().degraded, store.statistics().lost) == ("", {})
    assert lost_counts(store) == [{"inference": 40, "note": 1}]
    assert store.verify() is None
    store.close()


def test_an_io_error_costs_the_events_of_that_time_only(world: World) -> None:
    """The system's limit on file sizes makes every write to the log fail, as a failing disk does."""
    store = world.open()
    store.append([note("before")])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        assert store.append([note("during"), state()]) == ()
        assert store.append([state()]) == ()
        told = store.statistics()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert told.degraded != ""
    assert told.lost == {"note": 1, "state": 2}
    assert store.append([note("after")]) == (3,)
    assert lost_counts(store) == [{"note": 1, "state": 2}]
    assert texts(store.recent("note", 9)) == ["after", "before"]
    assert store.verify() is None
    store.close()


def test_a_start_on_a_full_disk_is_degraded_and_recovers(world: World) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        store = world.open()
        assert store.append([note("lost")]) == ()
        assert store.recent(None, 5) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.append([note("kept")]) == (2,)
    assert lost_counts(store) == [{"note": 1}]
    store.close()


def test_two_processes_on_one_file_is_a_clear_error(world: World) -> None:
    hold = (
        "import sys, pathlib\nfrom tests.store_world import World\n"
        "store = World(pathlib.Path(sys.argv[1])).open()\nprint('open', flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(world.path.parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(StoreLocked, match=r"memory\.db is open in another process.*stop the other node"):
            world.open()
        other.communicate(b"")
    store = world.open()
    assert store.append([note("mine now")]) == (1,)
    with pytest.raises(StoreLocked):
        world.open()
    store.close()


# --- files that are damaged ---


def test_a_damaged_file_is_moved_aside_whole_and_a_new_chain_says_so(world: World, tmp_path: Path) -> None:
    store = world.open()
    store.append([note(f"number {n}") for n in range(300)])
    log = world.crashed(tmp_path / "crashed")
    store.close()
    assert log.path.with_name("memory.db-wal").stat().st_size > 0
    log.path.write_bytes(b"not a database" * 1000)
    with log.path.with_name("memory.db-wal").open("rb+") as file:
        file.write(b"nor a log of one, which else brings every page of it back")
    was = {each.name: each.read_bytes() for each in log.path.parent.iterdir()}
    store = log.open()
    told = store.statistics()
    assert "moved aside to memory.db.corrupt-1" in told.set_aside
    aside = log.path.with_name("memory.db.corrupt-1")
    assert aside.read_bytes() == was["memory.db"]
    assert Path(f"{aside}.spare-wal").read_bytes() == was["memory.db-wal"], "SQLite throws a log without a header away"
    (lost,) = store.recent(None, 5)
    assert isinstance(lost.body, Lost)
    assert (lost.body.file, lost.body.head_id) == ("memory.db.corrupt-1", 300)
    assert store.append([note("goes on")]) == (2,)
    assert store.verify() is None
    store.close()


def test_the_last_signed_head_of_a_damaged_file_is_named_when_it_can_be_read(world: World) -> None:
    store = world.open()
    store.append([note(f"number {n}") for n in range(10)])
    store.close()
    (own,) = world.rows("SELECT hash FROM events WHERE id = 10")[0]
    world.tamper("DELETE FROM events WHERE id > 7")
    store = world.open()
    (lost,) = store.recent("lost", 5)
    assert isinstance(lost.body, Lost)
    assert (lost.body.head_id, lost.body.head_hash) == (10, own)
    assert "the end was cut off" in lost.body.reason
    store.close()


def test_a_log_that_was_cut_is_found_by_the_head_beside_the_file(world: World, tmp_path: Path) -> None:
    """SQLite takes what is left of a damaged log for all there was; the head in it is gone with the rest."""
    store = world.open()
    store.append([note("first")])
    store.append([note(f"number {n}") for n in range(300)])
    crashed = world.crashed(tmp_path / "crashed")
    store.close()
    log = crashed.path.with_name("memory.db-wal")
    whole = log.read_bytes()
    log.write_bytes(whole[: len(whole) // 2])
    store = crashed.open()
    (lost,) = store.recent("lost", 5)
    assert isinstance(lost.body, Lost)
    assert lost.body.head_id == 301
    assert crashed.path.with_name("memory.db.corrupt-1").exists()
    store.close()
    crashed.path.unlink()
    store = crashed.open()
    assert "a signed head names 1" in store.statistics().set_aside, "so does a file that was deleted"
    store.close()


def test_an_older_copy_of_the_file_is_found_by_the_head_beside_it(world: World, tmp_path: Path) -> None:
    world.open().close()
    store = world.open()
    store.append([note("first")])
    store.close()
    older = world.path.read_bytes()
    store = world.open()
    store.append([note("second")])
    store.close()
    world.path.write_bytes(older)
    store = world.open()
    assert "names event 2 and its last one is 1: the end was cut off" in store.statistics().set_aside
    store.close()


def test_another_history_of_ones_own_is_not_taken_for_this_one(world: World, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = World(tmp_path / "other")
    for each in (world, other):
        store = each.open()
        store.append([note("first")])
        store.close()
    other.path.replace(world.path)
    store = world.open()
    assert "its event 1 is not the one that the signed head beside it names" in store.statistics().set_aside
    store.close()


def test_what_vouches_for_a_forgotten_event_stays_as_long_as_it_does(world: World) -> None:
    world.retention = terms(forgotten=Term(age_ms=1, rows_max=10), state=Term(age_ms=1, rows_max=10))
    store = world.open()
    store.append([note("x", "them"), note("kept"), state()])
    store.forget("them")
    assert store.retain(T0_MS + HOUR_MS) == 1
    assert len(store.recent("forgotten", 9)) == 1
    assert store.verify() is None
    store.close()


def test_a_file_of_another_program_or_a_newer_node_is_left_whole(world: World) -> None:
    world.tamper("CREATE TABLE theirs (x)")
    store = world.open()
    assert "another program or a newer node wrote it" in store.statistics().set_aside
    store.close()
    aside = World(world.path.parent)
    aside.path = world.path.with_name("memory.db.corrupt-1")
    assert aside.rows("SELECT name FROM sqlite_schema") == [("theirs",)]


def test_a_damaged_index_of_words_costs_only_the_index(world: World) -> None:
    store = world.open()
    store.append([note(f"a wolf {n}") for n in range(50)])
    store.close()
    world.tamper("UPDATE words_data SET block = x'00' WHERE id > 10")
    store = world.open()
    assert len(store.search("wolf", 99)) == 50
    assert store.append([note("a new wolf")]) == (51,)
    assert store.statistics().index == "scan"
    assert store.statistics().set_aside == ""
    store.close()
    store = world.open()
    assert (len(store.search("wolf", 99)), store.statistics().index) == (51, "fts5")
    store.close()


def test_another_nodes_memory_is_not_taken_for_ones_own(world: World) -> None:
    store = world.open()
    store.append([Event(ts_ms=1, body=Note(text="mine"))])
    store.close()
    other = Store(world.path, type(IDENTITY).make())
    assert "of another node" in other.statistics().set_aside
    other.close()


def test_the_checkpoint_names_what_is_left(world: World) -> None:
    world.retention = terms(state=Term(age_ms=1, rows_max=10))
    store = world.open()
    store.append([note("kept"), state(), note("kept too"), state()])
    store.retain(T0_MS + HOUR_MS)
    (checkpoint,) = store.recent("pruned", 9)
    assert isinstance(checkpoint.body, Pruned)
    assert (checkpoint.body.through_id, checkpoint.body.kept_count) == (4, 2)
    store.close()
