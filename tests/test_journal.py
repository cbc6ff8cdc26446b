"""gossip/journal.py: what was heard is there after a kill, however the last line was cut; bounded, never in the way."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crypto.disk import SYSTEM, System
from gossip.journal import PAGE_BYTES_MAX, PAGES_MAX, Journal
from gossip.saved import Keeper, SavedState

HEARD = [("12D3KooWa", 5), ("12D3KooWb", (1 << 63) - 1), ("12D3KooWa", 6)]


def journal(folder: Path, system: System = SYSTEM) -> Journal:
    return Journal(folder / "gossip.json", system)


def written(folder: Path) -> Path:
    pages = journal(folder)
    for peer, sequence in HEARD:
        assert pages.note(peer, sequence)
    pages.close()
    return folder / "gossip.json.heard-0"


def test_what_was_heard_is_read_without_any_flush_or_close(tmp_path: Path) -> None:
    pages = journal(tmp_path)
    for peer, sequence in HEARD:
        pages.note(peer, sequence)
    assert list(journal(tmp_path).read()) == HEARD
    pages.close()


def test_a_cut_page_gives_its_whole_lines(tmp_path: Path) -> None:
    page = written(tmp_path)
    whole = page.read_bytes()
    for size in range(len(whole)):
        page.write_bytes(whole[:size])
        complete = whole[:size].count(b"\n")
        found = list(journal(tmp_path).read())
        assert found[:complete] == HEARD[:complete]
        assert found == HEARD[: len(found)]


@pytest.mark.slow
@settings(deadline=None)
@given(at=st.integers(0, 80), byte=st.integers(0, 255))
def test_a_damaged_line_is_passed_over(tmp_path_factory: object, at: int, byte: int) -> None:
    folder = tmp_path_factory.mktemp("page")  # type: ignore[attr-defined]  # a factory: hypothesis reuses fixtures
    page = written(folder)
    raw = bytearray(page.read_bytes())
    raw[at % len(raw)] = byte
    page.write_bytes(raw)
    assert set(journal(folder).read()) <= set(HEARD)


def test_a_save_forgets_the_pages_that_it_holds_and_no_other(tmp_path: Path) -> None:
    pages = journal(tmp_path)
    pages.note("a", 1)
    pages.turn()
    pages.note("b", 2)  # after the state was taken
    pages.forget()
    assert list(journal(tmp_path).read()) == [("b", 2)]
    pages.turn()
    pages.forget()
    assert list(tmp_path.iterdir()) == []


def test_a_new_process_writes_no_old_page(tmp_path: Path) -> None:
    written(tmp_path).rename(tmp_path / "gossip.json.heard-7")
    pages = journal(tmp_path)
    assert list(pages.read()) == HEARD
    pages.note("c", 1)
    pages.turn()
    pages.note("c", 2)
    assert list(journal(tmp_path).read()) == [*HEARD, ("c", 1), ("c", 2)]
    pages.forget()
    assert list(journal(tmp_path).read()) == [("c", 2)]
    pages.close()


def test_pages_and_their_bytes_are_bounded_while_no_save_succeeds(tmp_path: Path) -> None:
    pages = journal(tmp_path)
    for number in range(10 * PAGES_MAX):
        assert pages.note("a", number)
        pages.turn()
    assert len(list(tmp_path.iterdir())) == PAGES_MAX
    peer = "x" * 64
    while pages.note(peer, 10**18):
        pass
    assert max(page.stat().st_size for page in tmp_path.iterdir()) <= PAGE_BYTES_MAX
    pages.close()


def test_a_disk_that_takes_nothing_raises_nothing(tmp_path: Path) -> None:
    class Full(System):
        def write(self, handle: int, content: memoryview) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    pages = journal(tmp_path, Full())
    assert not pages.note("a", 1)
    assert not journal(tmp_path / "no" / "folder").note("a", 1)
    pages.close()


def test_the_highest_of_save_and_journal_counts(tmp_path: Path) -> None:
    path = tmp_path / "gossip.json"
    keeper = Keeper(path)
    assert keeper.load() == SavedState()
    keeper.turn()
    assert keeper.save(SavedState(sequence=9, floors={"a": 5, "b": 5}))
    assert keeper.heard("a", 4)
    assert keeper.heard("b", 6)
    assert keeper.heard("c", 1)
    assert Keeper(path).load() == SavedState(sequence=9, floors={"a": 5, "b": 6, "c": 1})
    keeper.close()
