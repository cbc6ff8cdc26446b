"""gossip/round_store.py: what is read back, a log that is cut or damaged anywhere, disks that fail, kills.

The whole of it, two hundred kills: `python -m pytest tests/test_round_store.py -m soak -s`, which prints the counts.
"""

from __future__ import annotations

import errno
import json
import os
import random
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest

from crypto.digest import Digest, digest
from crypto.disk import System
from crypto.identity import Identity
from gossip.agreement import Saved, Step, Value
from gossip.errors import CannotStore
from gossip.round_effects import Kept
from gossip.round_store import HEAD_BYTES, KEPT, RECORDS, STATEMENTS_MAX, RoundStore
from gossip.rounds import (
    RECORD_BYTES_MAX,
    Body,
    Contribution,
    Header,
    Held,
    Precommit,
    Prevote,
    Proposal,
    Report,
    Statement,
    sign_statement,
)
from tests.round_kill_victim import NETWORK, kept_of, record_of

ROOT = Path(__file__).parent.parent
ME, OTHER = Identity(bytes(32)), Identity(bytes(range(32)))
RUN, BASE, MANIFEST = digest(b"run"), digest(b"base"), digest(b"manifest")
START_S_MAX = 120.0  # a hang guard
INSTANT_S_MAX = 0.12  # some turns, so that a kill meets every place of one
SEED = 20261129


def said(identity: Identity, body: Body, time_ms: int = 1_800_000_000_000) -> Statement:
    return sign_statement(identity, body, network=NETWORK, sequence=1, time_ms=time_ms)


def whole_kept(time_ms: int = 1_800_000_000_000) -> Kept:
    """Every field has something in it."""
    of = {"run": RUN, "round": 7, "base": BASE}
    contribution = Contribution(blob=digest(b"blob"), payload_bytes=3, steps=2, tokens=1)
    header = said(OTHER, Header(**of, contribution=contribution, root=digest(b"root"), leaves=True), time_ms)
    report = said(ME, Report(**of, held=(Held(header=header.id, score=-5),), present=()), time_ms)
    proposal = said(ME, Proposal(**of, view=2, valid_view=1, manifest=MANIFEST, reports=(report.id,)), time_ms)
    votes = [
        said(ME, Prevote(**of, view=1, manifest=None), time_ms),
        said(ME, Prevote(**of, view=2, manifest=MANIFEST), time_ms),
        said(ME, Precommit(**of, view=2, manifest=MANIFEST), time_ms),
    ]
    own = (said(ME, Header(**of), time_ms), report, proposal, *votes)
    bodies = tuple(each.body for each in own if isinstance(each.body, Proposal | Prevote | Precommit))
    return Kept(
        round=7,
        base=BASE,
        said=own,
        heard=(header, said(OTHER, Prevote(**of, view=2, manifest=MANIFEST), time_ms)),
        agreement=Saved(
            view=3,
            step=Step.PRECOMMIT,
            locked=(2, MANIFEST),
            valid=(2, Value(MANIFEST, (Digest(report.id),))),
            said=bodies,
        ),
    )


@contextmanager
def opened(folder: Path, system: System | None = None) -> Iterator[RoundStore]:
    store = RoundStore(folder, NETWORK, system or System())
    try:
        yield store
    finally:
        store.close()


def holds(folder: Path, records: list[bytes]) -> None:
    """After a restart these, and the next append lands right behind them."""
    with opened(folder) as store:
        assert store.records(0, 1000) == records
        assert store.count == len(records)
        store.append(b"next")
        assert store.records(len(records), 1) == [b"next"]
    with opened(folder) as store:
        assert store.records(0, 1000) == [*records, b"next"]


# ---- what is read back ----


def test_what_was_said_is_read_back_in_all_its_parts(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        assert store.kept() is None
        assert not store.has_forgotten
        store.keep(whole_kept())
        assert store.kept() == whole_kept()
    with opened(tmp_path) as store:
        assert store.kept() == whole_kept()
        store.keep(Kept(round=8, base=BASE))
        assert store.kept() == Kept(round=8, base=BASE)
        assert not store.has_forgotten


def test_what_was_said_stands_when_the_clock_was_set_back(tmp_path: Path) -> None:
    """A machine that starts without a clock is in 1970: it must not vote twice for that."""
    ahead = whole_kept(time_ms=1 << 52)
    with opened(tmp_path) as store:
        store.keep(ahead)
        assert store.kept() == ahead


def test_more_than_is_read_back_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would be moved aside after a restart, and this member would contradict itself."""
    monkeypatch.setattr("gossip.round_store.statement_of", lambda *_, **__: statement)  # a signature takes its time
    statement = said(OTHER, Prevote(run=RUN, round=7, base=BASE, view=2, manifest=None))
    with opened(tmp_path) as store:
        store.keep(Kept(round=7, base=BASE, heard=(statement,) * STATEMENTS_MAX))
        with pytest.raises(CannotStore, match="16384 fit"):
            store.keep(Kept(round=7, base=BASE, heard=(statement,) * (STATEMENTS_MAX + 1)))
    raw = (tmp_path / KEPT).read_bytes()
    with opened(tmp_path) as store:
        assert store.kept() is not None
        assert (tmp_path / KEPT).read_bytes() == raw


def test_a_flipped_byte_anywhere_in_what_was_said_is_noticed_and_told(tmp_path: Path) -> None:
    with opened(tmp_path / "whole") as store:
        store.keep(whole_kept())
    raw, rng = (tmp_path / "whole" / KEPT).read_bytes(), random.Random(SEED)
    for place in rng.sample(range(len(raw)), 60):
        folder = tmp_path / str(place)
        folder.mkdir()
        (folder / KEPT).write_bytes(raw[:place] + bytes([raw[place] ^ 1 << rng.randrange(8)]) + raw[place + 1 :])
        with opened(folder) as store:
            assert store.kept() is None
            assert store.has_forgotten
            assert store.kept() is None  # moved aside
            assert store.has_forgotten


def test_a_file_of_the_right_kind_with_statements_that_nobody_signed_is_not_taken(tmp_path: Path) -> None:
    kept = whole_kept()
    forged = Statement(sender=kept.said[0].sender, body=kept.said[0].body, raw=kept.said[0].raw[:-1] + b"x", id=RUN)
    with opened(tmp_path) as store:
        store.keep(Kept(round=7, base=BASE, said=(forged,)))
        assert store.kept() is None
        assert store.has_forgotten


def test_records_are_read_from_any_round_on(tmp_path: Path) -> None:
    records = [record_of(number) for number in range(10)] + [bytes(RECORD_BYTES_MAX)]
    with opened(tmp_path) as store:
        for record in records:
            store.append(record)
        assert [store.records(first, 3) for first in (0, 4, 9, 11, 1 << 40)] == [
            records[:3], records[4:7], records[9:], [], []
        ]  # fmt: skip
        assert store.records(0, 0) == []
    holds(tmp_path, records)


def test_what_could_not_be_read_back_is_no_record(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        for record in (b"", bytes(RECORD_BYTES_MAX + 1)):
            with pytest.raises(AssertionError):
                store.append(record)


# ---- a log that is cut or damaged ----


@pytest.fixture
def log(tmp_path: Path) -> tuple[bytes, list[bytes]]:
    """The bytes of a log, and its records; the last is short."""
    records = [record_of(2), record_of(1), b"the last one"]
    with opened(tmp_path / "log") as store:
        for record in records:
            store.append(record)
    return (tmp_path / "log" / RECORDS).read_bytes(), records


@pytest.mark.slow
def test_a_log_that_is_cut_at_any_byte_of_its_last_entry_holds_the_others(
    tmp_path: Path, log: tuple[bytes, list[bytes]]
) -> None:
    raw, records = log
    last = HEAD_BYTES + len(records[-1])
    for cut in range(1, last + 1):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / RECORDS).write_bytes(raw[:-cut])
        holds(folder, records[:2])
    holds(tmp_path / "log", records)


@pytest.mark.slow
def test_a_flipped_byte_anywhere_costs_that_record_and_what_follows_and_is_never_read(
    tmp_path: Path, log: tuple[bytes, list[bytes]]
) -> None:
    raw, records = log
    ends = [HEAD_BYTES + len(records[0])]
    for record in records[1:]:
        ends.append(ends[-1] + HEAD_BYTES + len(record))
    rng = random.Random(SEED)
    heads = [end + at for end in (0, *ends[:-1]) for at in range(HEAD_BYTES)]
    for place in {*heads, *rng.sample(range(len(raw)), 60)}:
        folder = tmp_path / str(place)
        folder.mkdir()
        (folder / RECORDS).write_bytes(raw[:place] + bytes([raw[place] ^ 1 << rng.randrange(8)]) + raw[place + 1 :])
        holds(folder, records[: sum(end <= place for end in ends)])


def test_rubbish_in_the_place_of_the_log_is_an_empty_one(tmp_path: Path) -> None:
    entries = [
        len(each).to_bytes(4, "big") + sha256(each).digest() + each for each in (b"", bytes(RECORD_BYTES_MAX + 1))
    ]
    for number, rubbish in enumerate((b"x", b"\xff" * 5000, bytes(HEAD_BYTES), bytes(5000), *entries)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / RECORDS).write_bytes(rubbish)
        with opened(folder):
            assert (folder / RECORDS).read_bytes() == b"", "it would be found again each time"
        holds(folder, [])


def test_a_record_that_turns_bad_later_is_not_handed_on(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        for number in range(3):
            store.append(record_of(number))
        raw = (tmp_path / RECORDS).read_bytes()
        place = 2 * HEAD_BYTES + len(record_of(0)) + 10
        (tmp_path / RECORDS).write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        with pytest.raises(CannotStore, match=r"record 1 .* damaged"):
            store.records(0, 3)
        assert store.records(2, 1) == [record_of(2)]


def test_a_folder_that_cannot_be_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder" / RECORDS).mkdir(parents=True)
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "folder"):
        with pytest.raises(CannotStore, match="cannot be kept"):
            RoundStore(folder, NETWORK)


# ---- disks that fail ----


class Failing(System):
    """Takes so many bytes of the log and no more; or says at a flush that it did not."""

    def __init__(self) -> None:
        self.room: int | None = None
        self.fails_sync = False
        self.fails_folder = False
        self.synced = 0

    def write(self, handle: int, content: memoryview) -> int:
        if self.room is None:
            return super().write(handle, content)
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = super().write(handle, content[: self.room])
        self.room -= taken
        return taken

    def sync(self, handle: int) -> None:
        if self.fails_sync:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.synced += 1
        super().sync(handle)

    def sync_folder(self, path: Path) -> None:
        if self.fails_folder:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().sync_folder(path)


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("room", [0, 1, 3, HEAD_BYTES - 1, HEAD_BYTES, HEAD_BYTES + 1, HEAD_BYTES + 40])
def test_a_disk_that_is_full_in_the_middle_of_an_append_costs_nothing(
    tmp_path: Path, room: int, restarts: bool
) -> None:
    disk = Failing()
    with opened(tmp_path, disk) as store:
        store.append(record_of(0))
        for _ in range(2):
            disk.room = room
            with pytest.raises(CannotStore, match="No space left"):
                store.append(record_of(1))
            assert store.count == 1
            assert store.records(0, 9) == [record_of(0)]
        disk.room = None
        if not restarts:
            store.append(record_of(2))
            assert store.records(0, 9) == [record_of(0), record_of(2)]
    holds(tmp_path, [record_of(0)] if restarts else [record_of(0), record_of(2)])


def test_a_disk_that_takes_a_few_bytes_at_a_time_holds_whole_records(tmp_path: Path) -> None:
    class Slow(System):
        def write(self, handle: int, content: memoryview) -> int:
            return super().write(handle, content[:7])

    with opened(tmp_path, Slow()) as store:
        for number in range(3):
            store.append(record_of(number))
    holds(tmp_path, [record_of(number) for number in range(3)])


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("what", ["fails_sync", "fails_folder"])
def test_a_record_whose_flush_failed_is_not_there(tmp_path: Path, what: str, restarts: bool) -> None:
    disk = Failing()
    with opened(tmp_path, disk) as store:
        setattr(disk, what, True)
        for _ in range(2):
            with pytest.raises(CannotStore, match="Input/output"):
                store.append(record_of(0))
            assert store.count == 0
        setattr(disk, what, False)
        if not restarts:
            store.append(record_of(1))
    holds(tmp_path, [] if restarts else [record_of(1)])


def test_what_a_failed_append_left_is_taken_away_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk refuses even that at first."""
    disk = Failing()
    with opened(tmp_path, disk) as store:
        store.append(record_of(0))

        def refuse(_handle: int, _size: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as broken:
            broken.setattr(os, "truncate", refuse)
            disk.room = HEAD_BYTES + 5
            for _ in range(2):
                with pytest.raises(CannotStore):
                    store.append(record_of(1))
        disk.room = None
        store.append(record_of(2))
    holds(tmp_path, [record_of(0), record_of(2)])


def test_a_record_that_a_kill_left_unflushed_is_flushed_before_it_counts(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.append(record_of(0))
    disk = Failing()
    with opened(tmp_path, disk) as store:
        assert disk.synced == 1
        assert store.count == 1
    disk.fails_sync = True
    held: list[int] = []
    disk.append_to = lambda path: held.append(System.append_to(disk, path)) or held[-1]  # type: ignore[method-assign,func-returns-value]
    with pytest.raises(CannotStore):
        RoundStore(tmp_path, NETWORK, disk)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(held[0])


def test_what_was_said_stands_while_the_disk_takes_nothing(tmp_path: Path) -> None:
    disk = Failing()
    with opened(tmp_path, disk) as store:
        store.keep(kept_of(1, 0))
        disk.room = 100
        with pytest.raises(CannotStore, match="No space left"):
            store.keep(kept_of(1, 1))
        assert store.kept() == kept_of(1, 0)
        disk.room = None
        disk.fails_sync = True
        with pytest.raises(CannotStore, match="Input/output"):
            store.keep(kept_of(1, 1))
        assert store.kept() == kept_of(1, 0)
        disk.fails_sync = False
        store.keep(kept_of(1, 1))
        assert store.kept() == kept_of(1, 1)


# ---- kills ----


def promises_until_killed(folder: Path, instant_s: float) -> list[list[str]]:
    """Run the victim, kill it so long after its first promise; the whole lines that it wrote."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.round_kill_victim", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    ) as victim:
        assert victim.stdout is not None
        try:
            ready, _, _ = select.select([victim.stdout], [], [], START_S_MAX)
            assert ready, "the victim said nothing"
            time.sleep(instant_s)
        finally:
            victim.kill()
        words, log = victim.communicate()
    assert victim.returncode == -9, log.decode()[-2000:]
    assert b"moved aside" not in log, log.decode()[-2000:]
    return [line.decode().split() for line in words.split(b"\n")[:-1]]


def kill(folder: Path, kills: int) -> dict[str, object]:
    """Kill one life after the other over one folder; after each, everything ever promised is there."""
    rng, counts = random.Random(SEED), Counter[str]()
    records, votes = 0, (0, -1)
    for life in range(kills):
        promises = promises_until_killed(folder, rng.uniform(0.0, INSTANT_S_MAX))
        size_before = (folder / RECORDS).stat().st_size
        for promise in promises:
            counts[promise[0]] += 1
            match promise:
                case ["R", number]:
                    assert int(number) >= records - 1, f"life {life}: a record is lost"
                    records = int(number) + 1
                case ["S", number, view]:
                    votes = int(number), int(view)
        with opened(folder) as store:
            counts["cut"] += (folder / RECORDS).stat().st_size < size_before
            assert store.count >= records
            assert store.records(0, store.count) == [record_of(number) for number in range(store.count)]
            kept = store.kept()
            if votes[1] >= 0:
                assert kept is not None
                assert (kept.round, kept.agreement.view) >= votes
                assert kept == kept_of(kept.round, kept.agreement.view)
                assert kept.round <= store.count
            assert not store.has_forgotten
            records = store.count
    return {"kills": kills, "seed": SEED, "records": records, "counts": dict(counts)}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
def test_a_kill_takes_back_no_record_and_no_word(tmp_path: Path) -> None:
    assert kill(tmp_path, 20)["kills"] == 20  # how many promises were made in that time is the machine's affair


@pytest.mark.soak
@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
def test_two_hundred_kills_take_back_no_record_and_no_word(tmp_path: Path) -> None:
    print(json.dumps(kill(tmp_path, 200)))
