"""Targets: what stands on the disk of a node. Keys, state files, the address book, gossip's state, its journal."""

from __future__ import annotations

import atexit
import errno
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final
from zlib import crc32

from crypto.disk import StateFile, System
from crypto.errors import BadKey, BadState
from crypto.identity import Identity
from gossip.journal import Journal
from gossip.saved import Keeper
from p2p.address import parse_address
from p2p.book import Book, Source
from p2p.bootstrap import read_bootstrap_file
from p2p.errors import BadFile
from tests.fuzz.target import Target, jsoned
from tests.fuzz.wire_targets import ADDRESS, IDENTITY

OTHER: Final = Identity(bytes(32)).peer_id


class Memory(System):
    """A disk of one file, in memory."""

    def __init__(self) -> None:
        self.content: bytes | None = None

    def create(self, path: Path, mode: int) -> int:
        self.content = b""
        return os.open(os.devnull, os.O_WRONLY)

    def write(self, handle: int, content: memoryview) -> int:
        self.content = (self.content or b"") + bytes(content)
        return len(content)

    def sync(self, handle: int) -> None:
        """Nothing to do."""

    def rename(self, old: Path, new: Path) -> None:
        """Nothing to do: there is one file."""

    def sync_folder(self, path: Path) -> None:
        """Nothing to do."""

    def read(self, path: Path, bytes_max: int) -> bytes:
        if self.content is None:
            raise FileNotFoundError(errno.ENOENT, "nothing was written")
        return self.content[:bytes_max]


def folder() -> Path:
    """A directory of this process, in memory where there is such a disk; gone at exit."""
    shared = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="fuzz-", dir=shared if shared.is_dir() else None))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def key_file() -> Target:
    path = folder() / "identity.key"
    path.touch(0o600)

    def read(raw: bytes) -> None:
        path.write_bytes(raw)
        identity = Identity.load(path)
        assert identity.peer_id.encode() in raw

    right = f"openagi identity 1\n{IDENTITY.seed.hex()}\n{IDENTITY.peer_id}\n".encode()
    wrong = (right.upper(), right.replace(b"\n", b"\r\n"), right.replace(b"00010203", b"000102zz"), b"\n" * 3)
    return Target(read=read, errors=(BadKey,), seeds=(right, *wrong))


def state_file() -> Target:
    """Any bytes where a state file should be: its content or nothing."""
    disk, place = Memory(), folder() / "state"
    assert StateFile(place, kind="fuzz", version=1, bytes_max=1 << 16, system=disk).write(b"content")
    right = disk.content or b""

    def read(raw: bytes) -> None:
        disk.content = raw
        file = StateFile(place, kind="fuzz", version=1, bytes_max=1 << 16, system=disk)
        found = file.read(bytes)
        assert found in (None, b"content") or raw.endswith(found)
        if found is None:
            assert file.status().set_aside
            raise BadState(file.status().set_aside)

    return Target(read=read, errors=(BadState,), seeds=(right, right.replace(b" 1 ", b" 2 "), b"\n" * 300))


def gossip_state() -> Target:
    """The content of a state file whose head is right, as a program with this user's rights could write it."""
    disk, place = Memory(), folder() / "gossip.json"

    def read(raw: bytes) -> None:
        assert StateFile(place, kind="gossip_state", version=1, bytes_max=1 << 20, system=disk).write(raw)
        keeper = Keeper(place, disk)
        state = keeper.load()
        status = keeper.status()
        if status is not None and status.set_aside:
            raise BadState(status.set_aside)
        assert keeper.save(state)
        assert Keeper(place, disk).load() == state

    bans = [{"peer": OTHER, "until_ms": 5, "reason": "why"}]
    right = {"sequence": 7, "floors": {IDENTITY.peer_id: 5}, "bans": bans}
    return Target(read=read, errors=(BadState,), values=(right, {}), pack=jsoned)


def journal() -> Target:
    """A page of heard sequences: whole lines are read, the rest is passed over."""
    place = folder() / "gossip.json"
    place.with_name("gossip.json.heard-0").touch()
    disk = Memory()

    def line(text: bytes) -> bytes:
        return text + b" %08x\n" % crc32(text)

    def read(raw: bytes) -> None:
        disk.content = raw
        for peer, sequence in Journal(place, disk).read():
            assert line(b"%s %d" % (peer.encode(), sequence)).strip() in raw or b" 0" in raw

    right = line(b"%s 5" % IDENTITY.peer_id.encode()) + line(b"%s 12345678901234567" % OTHER.encode())
    return Target(read=read, errors=(), seeds=(right, right[:-5], line(b"x 0") * 3))


def book() -> Target:
    def made() -> Book:
        return Book(IDENTITY.peer_id, random.Random(1))

    def read(raw: bytes) -> None:
        found = made()
        try:
            found.read_json(raw, 100.0, 2e9)
        except BadFile:
            assert len(found) == 0, "a book that is refused adds nothing"
            raise
        again = made()
        again.read_json(found.to_json(100.0, 2e9), 100.0, 2e9)
        assert len(again) == len(found)
        found.due(200.0)

    full = made()
    for port in (1, 2):
        full.add(parse_address(f"/ip4/198.51.100.{port}/tcp/{port}/p2p/{OTHER}"), Source.EXCHANGE, 50.0)
    full.succeeded(parse_address(f"/ip4/198.51.100.1/tcp/1/p2p/{OTHER}"), 60.0)
    right = full.to_json(100.0, 2e9)
    row = {"addr": ADDRESS.replace(IDENTITY.peer_id, OTHER), "source": "exchange", "added": 1.5e9, "succeeded": None}
    values = ({"version": 1, "anchors": [OTHER], "addresses": [row]},)
    return Target(read=read, errors=(BadFile,), seeds=(right,), values=values, pack=jsoned)


def bootstrap() -> Target:
    path = folder() / "bootstrap_peers.json"

    def read(raw: bytes) -> None:
        path.write_bytes(raw)
        found = read_bootstrap_file(path)
        assert len({peer.address.text for peer in found}) == len(found)

    values = ([{"addr": ADDRESS, "note": "mine"}, {"addr": ADDRESS.replace("4001", "4002")}], [])
    return Target(read=read, errors=(BadFile,), seeds=(b'[\n{"addr": "/x"},\n"a\\"]b"\n]',), values=values, pack=jsoned)


TARGETS: Final[Mapping[str, Callable[[], Target]]] = {
    "key_file": key_file,
    "state_file": state_file,
    "gossip_state": gossip_state,
    "journal": journal,
    "book": book,
    "bootstrap": bootstrap,
}
