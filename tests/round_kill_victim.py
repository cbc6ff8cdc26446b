"""A member's disk under load: appends records and keeps what it says as fast as it can, until killed.

Each line on stdout is a promise that a kill must not undo. `R n`: record n is on the disk. `S round view`: what was
said in that view of that round is. Run by tests/test_round_store.py: FOLDER.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from crypto.digest import digest
from crypto.identity import Identity
from gossip.agreement import Saved, Step
from gossip.round_effects import Kept
from gossip.round_store import RoundStore
from gossip.rounds import Prevote, sign_statement

OWN = Identity(bytes(32))
NETWORK, RUN = "tests", bytes(32)
VIEWS = 3


def record_of(number: int) -> bytes:
    """Of a size that differs, so that an entry begins and ends anywhere in a page."""
    return digest(str(number).encode()) * (1 + number * 7919 % 200) + number.to_bytes(8, "big")


def kept_of(number: int, view: int) -> Kept:
    """All votes of a round up to this view."""
    said = tuple(
        sign_statement(
            OWN,
            Prevote(run=RUN, round=number, base=bytes(32), view=each, manifest=digest(bytes([each]))),
            network=NETWORK,
            sequence=1,
            time_ms=1,
        )
        for each in range(view + 1)
    )
    locked = (view, digest(bytes([view])))
    saved = Saved(view=view, step=Step.PREVOTE, locked=locked, said=tuple(each.body for each in said))  # type: ignore[misc]
    return Kept(round=number, base=bytes(32), said=said, agreement=saved)


def say(word: str) -> None:
    os.write(1, f"{word}\n".encode())  # unbuffered, or a kill would unsay it


def live(folder: Path) -> None:
    """Never returns."""
    store = RoundStore(folder, NETWORK)
    say(f"R {store.count - 1}")
    kept = store.kept()
    while True:
        number = store.count
        first = kept.agreement.view + 1 if kept is not None and kept.round == number else 0
        for view in range(first, VIEWS):
            store.keep(kept_of(number, view))
            say(f"S {number} {view}")
        store.append(record_of(number))
        say(f"R {number}")


if __name__ == "__main__":
    live(Path(sys.argv[1]))
