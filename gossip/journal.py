"""The sequences heard since the last save, a line each, so that a kill of the process forgets none of them.

Rules: a shell, and only disk. Lines are appended and not flushed: the kernel keeps them when the process dies, and
when the machine dies its start takes longer than the adverts live. A save opens a new page and then removes the older
ones; what is on a page and in the save too does no harm, because the highest sequence counts. A line that is cut or
damaged is passed over. A page has a bound, and a disk that takes nothing costs only this: the status of the state
file says so.
Source: SECURITY.md P9; write-ahead logs, without the wait, because what is lost with the machine is void by then.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from zlib import crc32

from crypto.disk import System

PAGE_BYTES_MAX = 1 << 20  # 10,000 lines; quotas let 50 strangers a second through, and a page lasts 5 s
PAGES_MAX = 4  # when saves fail, the last one goes on
_LINE = re.compile(rb"([0-9A-Za-z]{1,64}) ([0-9]{1,19}) ([0-9a-f]{8})")


class Journal:
    """Pages of heard sequences beside a state file. Blocks the thread for the page cache, not for the disk."""

    def __init__(self, state_path: Path, system: System) -> None:
        self._path, self._system = state_path, system
        self._page = 0
        self._handle: int | None = None
        self._bytes = 0

    def read(self) -> Iterator[tuple[str, int]]:
        """Peer and sequence of every whole line of every page; the next line goes to a new page."""
        for number, page in self._pages():
            self._page = max(self._page, number + 1)
            try:
                raw = self._system.read(page, PAGE_BYTES_MAX)
            except OSError:
                continue
            for line in raw.split(b"\n"):
                found = _LINE.fullmatch(line)
                if found and int(found[3], 16) == crc32(line[:-9]):
                    yield found[1].decode(), int(found[2])

    def note(self, peer: str, sequence: int) -> bool:
        """Write a line; False when the page is full or the disk will not."""
        line = b"%s %d" % (peer.encode(), sequence)
        line += b" %08x\n" % crc32(line)
        if self._bytes + len(line) > PAGE_BYTES_MAX:
            return False
        try:
            if self._handle is None:
                self._handle = self._system.append_to(self._name(self._page))
            self._bytes += len(line)
            return self._system.write(self._handle, memoryview(line)) == len(line)
        except OSError:
            return False

    def turn(self) -> None:
        """The state that is taken now holds every line so far."""
        if self._handle is None or len(self._pages()) >= PAGES_MAX:
            return
        self.close()
        self._page += 1

    def forget(self) -> None:
        """That state is saved: the pages before the last turn are of no use."""
        for number, page in self._pages():
            if number < self._page:
                with suppress(OSError):
                    page.unlink()

    def close(self) -> None:
        """The last line is written."""
        if self._handle is not None:
            os.close(self._handle)
        self._handle, self._bytes = None, 0

    def _name(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.heard-{number}")

    def _pages(self) -> list[tuple[int, Path]]:
        try:
            pages = list(self._path.parent.glob(f"{self._path.name}.heard-*"))
        except OSError:
            return []
        numbered = ((page.name.rpartition("-")[2], page) for page in pages)
        return sorted((int(number), page) for number, page in numbered if number.isdecimal() and len(number) < 10)
