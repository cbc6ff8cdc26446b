"""What gossip keeps on disk over a restart: our last sequence, the sequences of others, the bans.

Rules: a shell, and only disk. One small JSON file, written beside and renamed, both flushed to the disk, so that a
crash leaves the old one or the new one. A file that cannot be read is kept under another name and said to be lost:
a node must start all the same.
Source: SECURITY.md 3.3, rule 1.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from gossip.standing import SavedBan

FILE_BYTES_MAX = 4 << 20  # 4096 peers and 4096 bans are under 2 MiB

_log = logging.getLogger(__name__)

Sequence = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class SavedState(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file's content. sequence: the last one that this node used; floors: peer id -> last one seen of it."""

    v: Annotated[int, Meta(ge=1, le=1)] = 1
    sequence: Sequence = 0
    floors: dict[str, Sequence] = {}
    bans: tuple[SavedBan, ...] = ()


def load(path: Path) -> SavedState:
    """The saved state; an empty one when there is none or it is broken. Blocks the thread. Raises OSError."""
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        return SavedState()
    try:
        if len(raw) > FILE_BYTES_MAX:
            raise ValueError(f"over {FILE_BYTES_MAX} bytes")
        return msgspec.json.decode(raw, type=SavedState)
    except (ValueError, RecursionError, msgspec.MsgspecError) as exc:
        aside = path.with_name(path.name + ".broken")
        path.replace(aside)
        _log.warning("%s cannot be read (%s): bans and sequences start afresh; it is kept as %s", path, exc, aside)
        return SavedState()


def save(path: Path, state: SavedState) -> None:
    """Replace the file as a whole. Blocks the thread for the disk. Raises OSError, and then the old file stands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with beside.open("wb") as file:
        file.write(msgspec.json.encode(state))
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
