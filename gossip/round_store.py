"""A run on disk: the records of its chain, one after the other, and what this member has said of the round to come.

Rules: a shell, and only disk; blocks the thread. A record is on the disk before the weights change by it, and what a
member says before it goes out; so after a kill at any instant a restart stands where the last record ends, and says
nothing else than it said. records.log is appended to and flushed; what is cut or damaged is taken away with all that
follows it, and peers give it again. What turns bad later is not read. A disk that takes nothing raises CannotStore: who
cannot keep its word stays silent. What is kept can be read back, whatever the clock says by then.
Source: TRAINING.md 3 (8); SECURITY.md 3.3; Pillai et al., "All File Systems Are Not Created Equal" (OSDI 2014).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Annotated, BinaryIO

from msgspec import Meta, Struct

from crypto.canonical import Limits, decode_struct, encode_struct
from crypto.digest import DIGEST_BYTES, Digest
from crypto.disk import SYSTEM, FileStatus, StateFile, System
from crypto.errors import BadEncoding, BadSignature, BadState
from gossip.agreement import Saved, Step, Value
from gossip.errors import CannotStore, RemoteProtocolError
from gossip.round_effects import Kept
from gossip.rounds import (
    ANY_TIME_MS,
    RECORD_BYTES_MAX,
    Id,
    Precommit,
    Prevote,
    Proposal,
    Statement,
    View,
    statement_of,
)

RECORDS, KEPT = "records.log", "round.state"
KEPT_BYTES_MAX = 16 << 20  # 64 members, each with a header, a report and votes of several views
STATEMENTS_MAX = 16_384
HEAD_BYTES = 4 + DIGEST_BYTES  # a record's length and its digest
_LIMITS = Limits(
    bytes_max=KEPT_BYTES_MAX, array_max=STATEMENTS_MAX, items_max=4 * STATEMENTS_MAX, bin_max=RECORD_BYTES_MAX
)
Raws = Annotated[tuple[bytes, ...], Meta(max_length=STATEMENTS_MAX)]

_log = logging.getLogger(__name__)


class _Locked(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    view: View
    manifest: Id
    reports: tuple[Id, ...] = ()


class _Kept(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A Kept as it stands in the file; statements are their envelopes."""

    round: int
    base: Id
    said: Raws
    heard: Raws
    view: View
    step: Annotated[int, Meta(ge=0, le=2)]
    locked: _Locked | None
    valid: _Locked | None


class RoundStore:
    """One run's folder. One user at a time; close it in the end."""

    def __init__(self, folder: Path, network: str, system: System = SYSTEM) -> None:
        """Makes the folder and reads records.log through. Raises CannotStore."""
        self._path, self._network, self._system = folder / RECORDS, network, system
        self._kept = StateFile(folder / KEPT, kind="training_round", version=1, bytes_max=KEPT_BYTES_MAX, system=system)
        self._spans: list[tuple[int, int]] = []  # of each record: where its bytes begin, how many there are
        self._end = 0
        self._handle = -1
        self.has_forgotten = False  # what was said before was there and cannot be read: it may not be contradicted
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._handle = system.append_to(self._path)
            self._read_through()
        except OSError as exc:
            self.close()
            raise _cannot(self._path, exc) from exc

    # ---- records ----

    @property
    def count(self) -> int:
        """How many records there are: the number of the round to come."""
        return len(self._spans)

    def records(self, first: int, count_max: int) -> list[bytes]:
        """At most so many records, from a round on. Raises CannotStore, also when one is not what was written."""
        found = list[bytes]()
        try:
            with self._path.open("rb") as file:
                for start, length in self._spans[first : first + count_max]:
                    file.seek(start - HEAD_BYTES)
                    head, record = file.read(HEAD_BYTES), file.read(length)
                    if head != _head(record):
                        raise CannotStore(
                            f"record {first + len(found)} in {self._path} is damaged: the disk is failing"
                        )
                    found.append(record)
        except OSError as exc:
            raise _cannot(self._path, exc) from exc
        return found

    def append(self, record: bytes) -> None:
        """The record of the round to come, on the disk when this returns. Raises CannotStore, and then it is not there:
        what part of it was written is taken away, at once or, when that fails too, before the next."""
        assert 0 < len(record) <= RECORD_BYTES_MAX, len(record)
        entry = _head(record) + record
        try:
            if os.fstat(self._handle).st_size != self._end:
                os.truncate(self._handle, self._end)
            left = memoryview(entry)
            while left:
                left = left[self._system.write(self._handle, left) :]
            self._system.sync(self._handle)
            if not self._spans:
                self._system.sync_folder(self._path.parent)
        except OSError as exc:
            with suppress(OSError):
                os.truncate(self._handle, self._end)
            raise _cannot(self._path, exc) from exc
        self._spans.append((self._end + HEAD_BYTES, len(record)))
        self._end += len(entry)

    def _read_through(self) -> None:
        """Find the records; what follows the last whole one is taken away. Raises OSError."""
        with self._path.open("rb") as file:
            for record in _whole(file):
                self._spans.append((self._end + HEAD_BYTES, len(record)))
                self._end += HEAD_BYTES + len(record)
        size = os.fstat(self._handle).st_size
        if not size:
            return
        if self._end < size:
            _log.warning(
                "%s: %d bytes after record %d are cut off or damaged, and are taken away; peers give what they held",
                self._path,
                size - self._end,
                len(self._spans),
            )
            os.truncate(self._handle, self._end)
        self._system.sync(self._handle)  # a kill may have come before the flush of the last one
        self._system.sync_folder(self._path.parent)

    # ---- what was said ----

    def keep(self, kept: Kept) -> None:
        """On the disk when this returns, and of a size that is read back. Raises CannotStore."""
        if max(len(kept.said), len(kept.heard)) > STATEMENTS_MAX:
            raise CannotStore(f"{len(kept.said)} own and {len(kept.heard)} other statements came, {STATEMENTS_MAX} fit")
        if not self._kept.write(encode_struct(_packed(kept))):
            raise CannotStore(self._kept.status().problem)

    def kept(self) -> Kept | None:
        """What was last kept; None when there is nothing that can be used."""
        is_there = os.path.lexists(self._kept.path)
        found = self._kept.read(lambda raw: _unpacked(raw, self._network))
        self.has_forgotten |= is_there and found is None
        return found

    def status(self) -> FileStatus:
        """How the file of what was said fares."""
        return self._kept.status()

    def close(self) -> None:
        """Keep all as it is. Once more is the same as once."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            with suppress(OSError):
                os.close(handle)


def read_records(folder: Path) -> Iterator[bytes]:
    """A run's records from round 0 on, for who only looks: another process may be appending meanwhile.

    Raises CannotStore.
    """
    try:
        with (folder / RECORDS).open("rb") as file:
            yield from _whole(file)
    except OSError as exc:
        raise CannotStore(f"the records in {folder / RECORDS} cannot be read: {exc.strerror}") from exc


def _whole(file: BinaryIO) -> Iterator[bytes]:
    """Each record up to the first that is cut off or damaged. Raises OSError."""
    while len(head := file.read(HEAD_BYTES)) == HEAD_BYTES:
        length = int.from_bytes(head[:4], "big")
        if not 0 < length <= RECORD_BYTES_MAX or head != _head(record := file.read(length)):
            return
        yield record


def _head(record: bytes) -> bytes:
    """What stands before a record."""
    return len(record).to_bytes(4, "big") + sha256(record).digest()


def _packed(kept: Kept) -> _Kept:
    agreement = kept.agreement
    locked, valid = agreement.locked, agreement.valid
    return _Kept(
        round=kept.round,
        base=kept.base,
        said=tuple(each.raw for each in kept.said),
        heard=tuple(each.raw for each in kept.heard),
        view=agreement.view,
        step=int(agreement.step),
        locked=None if locked is None else _Locked(view=locked[0], manifest=locked[1]),
        valid=None if valid is None else _Locked(view=valid[0], manifest=valid[1].manifest, reports=valid[1].reports),
    )


def _unpacked(raw: bytes, network: str) -> Kept:
    """Raises BadState. No clock is asked: it may have been set back since, and our word stands."""
    try:
        packed = decode_struct(raw, _Kept, _LIMITS)
        said, heard = (
            tuple(statement_of(each, network=network, now_ms=ANY_TIME_MS) for each in raws)
            for raws in (packed.said, packed.heard)
        )
    except (BadEncoding, BadSignature, RemoteProtocolError) as exc:
        raise BadState(str(exc)) from exc
    locked, valid = packed.locked, packed.valid
    return Kept(
        round=packed.round,
        base=packed.base,
        said=said,
        heard=heard,
        agreement=Saved(
            view=packed.view,
            step=Step(packed.step),
            locked=None if locked is None else (locked.view, Digest(locked.manifest)),
            valid=None if valid is None else (valid.view, _value(valid)),
            said=tuple(_votes(said)),
        ),
    )


def _value(valid: _Locked) -> Value:
    return Value(Digest(valid.manifest), tuple(Digest(each) for each in valid.reports))


def _votes(said: tuple[Statement, ...]) -> list[Proposal | Prevote | Precommit]:
    return [each.body for each in said if isinstance(each.body, Proposal | Prevote | Precommit)]


def _cannot(path: Path, exc: OSError) -> CannotStore:
    return CannotStore(f"the run cannot be kept at {path}: {exc.strerror}; what is there stays")
