"""What gossip keeps on disk over a restart: our last sequence, the sequences of others, the bans.

Rules: a shell, and only disk; crypto/disk.py writes. The sequence on disk is ahead of the one in use by RESERVED, so
that after a kill no sequence is used twice, whatever the clock says then. A file that cannot be used is moved aside
and said to be lost: a node must start all the same.
Source: SECURITY.md 3.3, rule 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from crypto.disk import SYSTEM, FileStatus, StateFile, System
from crypto.errors import BadState
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
        if path is not None:
            self._file = StateFile(path, kind="gossip_state", version=1, bytes_max=FILE_BYTES_MAX, system=system)
        self._due_s = float("-inf")

    def load(self) -> SavedState:
        """The saved state; an empty one when there is none or it is broken."""
        found = None if self._file is None else self._file.read(_decode)
        return found or SavedState()

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
        """Replace the file as a whole; False when that failed, and the old one stands."""
        return self._file is None or self._file.write(msgspec.json.encode(state))

    def status(self) -> FileStatus | None:
        """How the file fares; None when nothing is kept."""
        return None if self._file is None else self._file.status()


def _decode(raw: bytes) -> SavedState:
    try:
        return msgspec.json.decode(raw, type=SavedState)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise BadState(str(exc)) from exc
