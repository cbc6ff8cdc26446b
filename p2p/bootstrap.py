"""Peers from the disk: the operator's bootstrap file, and the address book that a node keeps for itself.

Rules: a bad bootstrap entry is refused with its file, line, number and reason, and all bad ones are named at once. The
book is replaced whole or not at all (crypto/disk.py); one that cannot be used is moved aside and the node starts with
an empty one, because it can be learned again.
Source: SECURITY.md section 3.3; NETWORK.md rule 6.
"""

from __future__ import annotations

import reprlib
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from crypto.disk import SYSTEM, FileStatus, StateFile, System
from crypto.errors import BadState
from p2p.address import Address, parse_address
from p2p.book import Book
from p2p.book_saved import BOOK_BYTES_MAX
from p2p.errors import BadAddress, BadFile

BOOTSTRAP_BYTES_MAX = 1 << 20
BOOTSTRAP_PEERS_MAX = 256  # a list to enter the network by, not a directory of it
NOTE_CHARS_MAX = 200
_WANTED = '{"addr": "/ip4/203.0.113.7/tcp/4001/p2p/12D3KooW...", "note": "whose it is"}'


@dataclass(frozen=True, slots=True, kw_only=True)
class BootstrapPeer:
    """One entry of the bootstrap list; `note` is the operator's own word for it."""

    address: Address
    note: str = ""


def bootstrap_peer(text: str, note: str = "") -> BootstrapPeer:
    """An entry given as a flag. Raises BadAddress."""
    return BootstrapPeer(address=parse_address(text), note=note)


def read_bootstrap_file(path: Path) -> tuple[BootstrapPeer, ...]:
    """The peers named in a bootstrap file, each address once. Raises BadFile, which names every bad entry."""
    try:
        with path.open("rb") as file:
            raw = file.read(BOOTSTRAP_BYTES_MAX + 1)
    except OSError as exc:
        raise BadFile(
            f"cannot read the bootstrap file {path}: {exc.strerror}; give another with --bootstrap-file"
        ) from exc
    if len(raw) > BOOTSTRAP_BYTES_MAX:
        raise BadFile(f"the bootstrap file {path} is over {BOOTSTRAP_BYTES_MAX} bytes; is it the right file?")
    try:
        text = raw.decode()
        rows = msgspec.json.decode(text) if text.strip() else None
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError) as exc:
        raise BadFile(f"the bootstrap file {path} is not JSON: {_position(exc, raw)}; write [] for no peers") from exc
    if not isinstance(rows, list):
        raise BadFile(f"the bootstrap file {path} must be a JSON list of {_WANTED}; write [] for no peers")
    if len(rows) > BOOTSTRAP_PEERS_MAX:
        raise BadFile(f"the bootstrap file {path} has {len(rows)} entries; at most {BOOTSTRAP_PEERS_MAX}")
    lines = _lines_of_entries(text)
    found: dict[str, BootstrapPeer] = {}
    faults = []
    for number, row in enumerate(rows, start=1):
        try:
            peer = _entry(row)
        except BadAddress as exc:
            where = f"entry {number} (line {lines[number - 1]})" if number <= len(lines) else f"entry {number}"
            faults.append(f"{where}: {exc}")
        else:
            found.setdefault(peer.address.text, peer)
    if faults:
        raise BadFile(f"the bootstrap file {path} has {len(faults)} bad of {len(rows)} entries: " + "; ".join(faults))
    return tuple(found.values())


def _entry(row: object) -> BootstrapPeer:
    if not isinstance(row, dict):
        raise BadAddress(f"{_shown(row)} is not an object; wanted {_WANTED}")
    if unknown := sorted(set(row) - {"addr", "note"}):
        raise BadAddress(f"unknown key {unknown[0]!r}; wanted {_WANTED}")
    addr, note = row.get("addr"), row.get("note", "")
    if not isinstance(addr, str):
        raise BadAddress(f'"addr" is {_shown(addr)}, not a text; wanted {_WANTED}')
    if not isinstance(note, str) or len(note) > NOTE_CHARS_MAX:
        raise BadAddress(f'"note" must be a text of at most {NOTE_CHARS_MAX} characters')
    return BootstrapPeer(address=parse_address(addr.strip()), note=note)


def _shown(value: object) -> str:
    text = "missing" if value is None else reprlib.repr(value)  # goes no deeper than it can be printed
    return text if len(text) <= 60 else text[:57] + "..."


def _position(exc: Exception, raw: bytes) -> str:
    """The error with the line it is at: msgspec says `(byte 17)`."""
    head, mark, tail = str(exc).partition("(byte ")
    if not mark or not tail.rstrip(")").isdigit():
        return str(exc)
    return f"{head.strip()} at line {raw[: int(tail.rstrip(')'))].count(10) + 1}"


def _lines_of_entries(text: str) -> list[int]:
    """The line at which each element of the outermost list begins. `text` is valid JSON."""
    lines: list[int] = []
    depth, line, quoted, escaped, waiting = 0, 1, False, False, False
    for char in text:
        if char == "\n":
            line += 1
        if quoted:
            quoted, escaped = escaped or char != '"', char == "\\" and not escaped
            continue
        if waiting and depth == 1 and not char.isspace() and char != "]":
            lines.append(line)
            waiting = False
        if char == '"':
            quoted = True
        elif char in "[{":
            depth += 1
            waiting = waiting or depth == 1
        elif char in "]}":
            depth -= 1
        elif char == "," and depth == 1:
            waiting = True
    return lines


class BookFile:
    """The address book on disk. Blocks the thread for the disk; raises nothing that a disk can do."""

    def __init__(self, path: Path, system: System = SYSTEM) -> None:
        self._file = StateFile(path, kind="address_book", version=1, bytes_max=BOOK_BYTES_MAX, system=system)

    def load(self, book: Book, now: float) -> None:
        """Read the saved book into `book`, if there is one that can be used."""
        self._file.read(lambda raw: _read_into(book, raw, now))

    def save(self, raw: bytes) -> bool:
        """Replace the book as a whole; False when that failed, and the old one stands."""
        return self._file.write(raw)

    def status(self) -> FileStatus:
        """How the file fares."""
        return self._file.status()


def _read_into(book: Book, raw: bytes, now: float) -> None:
    try:
        book.read_json(raw, now, time.time())
    except BadFile as exc:
        raise BadState(str(exc)) from exc
