"""Blobs in memory and on disk: what is offered is read in ranges, what is fetched is written as it comes.

Rules: blocks the thread, never waits for a peer. A blob's file is named by the hex of its digest and by nothing that a
peer said. HEX.part is a blob that is not whole yet: whatever it holds is compared with the manifest before it counts,
so no flush is needed and a kill at any instant costs at most what was not written. HEX is whole, and is compared again
each time it is found. An offered file that changed since it was offered is not given any more.
Source: BEP 3; NETWORK.md "Our rules" 4.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from crypto.digest import DIGEST_BYTES, Digest, digest
from crypto.disk import SYSTEM, System, write_whole
from gossip.errors import CannotStore, LocalProtocolError, RemoteProtocolError
from gossip.transfer import (
    CHUNK_BYTES,
    CHUNKS_MAX,
    MANIFEST_BYTES_MAX,
    Manifest,
    decode_manifest,
    manifest_of,
    verified,
)

PART, MANIFEST = ".part", ".manifest"


class Reader(Protocol):
    """An offered blob, opened by one stream."""

    def read_into(self, room: memoryview, start: int) -> bool:
        """Fill the room with the blob's bytes from `start`. False: the blob is not any more what was offered."""

    def close(self) -> None:
        """Let go of it."""


class Source(Protocol):
    """An offered blob."""

    manifest: Manifest
    blocks: bool  # whether opening and reading wait for a disk, and belong into a thread
    held_bytes: int  # of memory

    def open(self) -> Reader | None:
        """None: the blob is not any more what was offered."""


class MemorySource:
    """A blob in memory."""

    blocks = False

    def __init__(self, content: bytes) -> None:
        """Raises LocalProtocolError (too large)."""
        _check_size(len(content))
        self._content = memoryview(content)
        self.held_bytes = len(content)
        self.manifest = manifest_of(content)

    def open(self) -> Reader:
        """See Source."""
        return self

    def read_into(self, room: memoryview, start: int) -> bool:
        """See Reader."""
        room[:] = self._content[start : start + len(room)]
        return True

    def close(self) -> None:
        """See Reader."""


class FileSource:
    """A blob that is a file."""

    blocks = True
    held_bytes = 0

    def __init__(self, path: Path, manifest: Manifest | None = None) -> None:
        """manifest: of a file whose bytes were compared with it just now; None: the file is read, for its digests.

        Raises OSError, LocalProtocolError (too large, of another size, changed meanwhile).
        """
        self._path = path
        with path.open("rb", buffering=0) as file:
            self._known = _mark(file.fileno())
            size = os.fstat(file.fileno()).st_size
            _check_size(size)
            if manifest is not None:
                if manifest.blob_bytes != size:
                    raise LocalProtocolError(f"{path} has {size} bytes, {manifest.blob_bytes} were announced")
                self.manifest = manifest
                return
            chunks = [digest(piece) for piece in iter(lambda: file.read(CHUNK_BYTES), b"")]
            if _mark(file.fileno()) != self._known or len(chunks) != -(-size // CHUNK_BYTES):
                raise LocalProtocolError(f"{path} was changed while it was read: offer it when it is finished")
        self.manifest = Manifest(blob_bytes=size, chunk_bytes=CHUNK_BYTES, chunks=b"".join(chunks))

    def open(self) -> Reader | None:
        """See Source."""
        try:
            reader = _FileReader(self._path, self._known)
        except OSError:
            return None
        return reader if reader.is_same() else None


class _FileReader:
    def __init__(self, path: Path, known: tuple[int, ...]) -> None:
        self._file = path.open("rb", buffering=0)
        self._known = known

    def is_same(self) -> bool:
        if _mark(self._file.fileno()) == self._known:
            return True
        self._file.close()
        return False

    def read_into(self, room: memoryview, start: int) -> bool:
        """See Reader."""
        try:
            self._file.seek(start)
            while room:
                got = self._file.readinto(room)
                if not got:
                    return False
                room = room[got:]
            return _mark(self._file.fileno()) == self._known
        except (OSError, ValueError):  # a failing disk; ValueError: it was closed when it had changed
            return False

    def close(self) -> None:
        """See Reader."""
        self._file.close()


def _mark(handle: int) -> tuple[int, ...]:
    """What changes when a file's content does."""
    status = os.fstat(handle)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _check_size(size: int) -> None:
    if size > CHUNKS_MAX * CHUNK_BYTES:
        raise LocalProtocolError(f"{size} bytes came, a blob has at most {CHUNKS_MAX * CHUNK_BYTES}: split it")


# ---- what is fetched ----


class BlobFolder:
    """The blobs that were fetched, or are. One process uses a folder at a time."""

    def __init__(self, path: Path, bytes_max: int, system: System = SYSTEM) -> None:
        """bytes_max: of all blobs in it, whole or not."""
        self._path, self._bytes_max, self._system = path, bytes_max, system

    def path(self, blob: Digest) -> Path:
        """Where a blob lies when it is whole."""
        return self._path / blob.hex()

    def manifest(self, blob: Digest) -> Manifest | None:
        """The manifest that an earlier fetch kept; None when there is none that can be used."""
        try:
            return decode_manifest(self._system.read(self._beside(blob, MANIFEST), MANIFEST_BYTES_MAX + 1), blob)
        except (OSError, RemoteProtocolError):
            return None

    def keep_manifest(self, blob: Digest, manifest: Manifest) -> None:
        """So that a later fetch need not ask. Raises CannotStore."""
        try:
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(self._beside(blob, MANIFEST), manifest.encode(), over=True, system=self._system)
        except OSError as exc:
            raise _cannot(self._path, exc) from exc

    def open(self, blob: Digest, manifest: Manifest) -> Part:
        """The blob's file, as far as it came. Raises CannotStore."""
        part, whole = self._beside(blob, PART), self.path(blob)
        try:
            used = sum(each.stat().st_size for each in self._path.iterdir() if each not in (part, whole))
            if used + manifest.blob_bytes > self._bytes_max:
                raise CannotStore(
                    f"{self._path} holds {used} bytes and a blob of {manifest.blob_bytes} is to come; at most "
                    f"{self._bytes_max} are kept: forget a blob"
                )
            return Part(part, whole, manifest, self._system)
        except OSError as exc:
            raise _cannot(part, exc) from exc

    def forget(self, blob: Digest) -> None:
        """Remove what there is of a blob. Raises CannotStore."""
        try:
            for path in (self.path(blob), self._beside(blob, PART), self._beside(blob, MANIFEST)):
                path.unlink(missing_ok=True)
        except OSError as exc:
            raise _cannot(self.path(blob), exc) from exc

    def sweep(self, keeps: Callable[[Digest], bool]) -> frozenset[Digest]:
        """Remove all blobs but those that are kept; of these the whole ones. Raises CannotStore."""
        whole = set[Digest]()
        try:
            for path in list(self._path.iterdir()) if self._path.exists() else []:
                name = path.name.removesuffix(PART).removesuffix(MANIFEST)
                if len(name) != 2 * DIGEST_BYTES or set(name) - set("0123456789abcdef"):
                    continue  # not ours
                if not keeps(Digest(bytes.fromhex(name))):
                    path.unlink(missing_ok=True)
                elif path.name == name:
                    whole.add(Digest(bytes.fromhex(name)))
        except OSError as exc:
            raise _cannot(self._path, exc) from exc
        return frozenset(whole)

    def _beside(self, blob: Digest, kind: str) -> Path:
        return self._path / f"{blob.hex()}{kind}"


class Part:
    """A blob's file while it is fetched. One user at a time; close it in the end."""

    def __init__(self, part: Path, whole: Path, manifest: Manifest, system: System) -> None:
        """Raises OSError."""
        self._part, self._whole, self._manifest, self._system = part, whole, manifest, system
        self.path = whole if whole.exists() else part  # a whole one stays where it is until it proves damaged
        self._handle = system.open_part(self.path)
        self._size = os.fstat(self._handle).st_size

    def verified(self, chunks: range) -> frozenset[int]:
        """Which of these chunks it holds already. Raises CannotStore."""
        try:
            return verified(self._manifest, self._stored(chunks))
        except OSError as exc:
            raise _cannot(self.path, exc) from exc

    def _stored(self, chunks: range) -> Iterator[tuple[int, bytes]]:
        for index in chunks:
            start, length = self._manifest.span(index)
            if start + length <= self._size:
                os.lseek(self._handle, start, os.SEEK_SET)
                yield index, os.read(self._handle, length)

    def write(self, pieces: list[tuple[int, bytes | memoryview]]) -> None:
        """Write pieces of the blob, each with where it begins. Raises CannotStore."""
        try:
            if self.path == self._whole:
                self._system.rename(self._whole, self._part)
                self.path = self._part
            for start, content in pieces:
                self._system.write_at(self._handle, content, start)
        except OSError as exc:
            raise _cannot(self.path, exc) from exc

    def finish(self) -> Path:
        """It is whole: it gets its name. Raises CannotStore."""
        try:
            if self._size != self._manifest.blob_bytes:
                os.ftruncate(self._handle, self._manifest.blob_bytes)
            self.close()
            if self.path != self._whole:
                self._system.rename(self.path, self._whole)
        except OSError as exc:
            raise _cannot(self.path, exc) from exc
        return self._whole

    def close(self) -> None:
        """Keep it as it is. Once more is the same as once."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)


def _cannot(path: Path, exc: OSError) -> CannotStore:
    return CannotStore(f"a blob cannot be kept at {path}: {exc.strerror}; what is there stays for the next fetch")
