"""What gossip keeps on disk over a restart: our last sequence, the sequences of others, the bans.

Rules: a shell, and only disk; crypto/disk.py writes. The sequence on disk is ahead of the one in use by RESERVED, so
that after a kill no sequence is used twice, whatever the clock says then. What is heard between two saves stands in
gossip/journal.py's pages. A file that cannot be used is moved aside
and said to be lost: a node must start all the same.
Source: SECURITY.md 3.3, rule 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct, structs

from crypto.disk import SYSTEM, FileStatus, StateFile, System
from crypto.errors import BadState
from gossip.journal import Journal
from gossip.standing import SavedBan

FILE_BYTES_MAX = 4 << 20  # 4096 peers and 4096 bans are under 2 MiB
SAVE_S = 5.0
RESERVED = 60_000  # sequences are milliseconds as long as the clock goes right: twelve saves may fail

Sequence = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class SavedState(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file's content. sequence: no higher one was used by this node; floors: peer id -> last one seen of it."""

    sequence: Sequence = 0
    floors: dict[str, Sequence] = {}
    bans: tuple[SavedBan, ...] = ()


class Keeper:
    """Gossip's state file, and when it is due. Blocks the thread for the disk; raises nothing that a disk can do."""

    def __init__(self, path: Path | None, system: System = SYSTEM) -> None:
        """path: None keeps nothing."""
        self._file: StateFile | None = None
        self._journal: Journal | None = None
        if path is not None:
            self._file = StateFile(path, kind="gossip_state", version=1, bytes_max=FILE_BYTES_MAX, system=system)
            self._journal = Journal(path, system)
        self._due_s = float("-inf")
        self.is_closed = False

    def load(self) -> SavedState:
        """The saved state, with what was heard after it; an empty one when there is none or it is broken."""
        if self._file is None or self._journal is None:
            return SavedState()
        state = self._file.read(_decode) or SavedState()
        floors = dict(state.floors)
        for peer, sequence in self._journal.read():
            floors[peer] = max(sequence, floors.get(peer, 0))
        return structs.replace(state, floors=floors)

    def heard(self, peer: str, sequence: int) -> bool:
        """Keep a sequence over a kill, before the next save; False when that cannot be."""
        return self._journal is None or self._journal.note(peer, sequence)

    def turn(self) -> None:
        """The state that is taken now, in this very moment, holds all that was heard."""
        if self._journal is not None:
            self._journal.turn()

    def soon(self) -> None:
        """What is in memory now must not wait for the next turn."""
        self._due_s = float("-inf")

    def take_turn(self, now: float) -> bool:
        """Whether to save now; the next turn is then SAVE_S away."""
        if self._file is None or now < self._due_s:
            return False
        self._due_s = now + SAVE_S
        return True

    def save(self, state: SavedState) -> bool:
        """Replace the file as a whole, with the state taken at the last `turn`; False when the old one stands."""
        if self._file is None or self._journal is None:
            return True
        if not self._file.write(msgspec.json.encode(state)):
            return False
        self._journal.forget()
        return True

    def close(self) -> None:
        """The last state is saved: who hears more must not believe it, for a restart would know nothing of it."""
        self.is_closed = True
        if self._journal is not None:
            self._journal.close()

    def status(self) -> FileStatus | None:
        """How the file fares; None when nothing is kept."""
        return None if self._file is None else self._file.status()


def _decode(raw: bytes) -> SavedState:
    try:
        return msgspec.json.decode(raw, type=SavedState)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise BadState(str(exc)) from exc
