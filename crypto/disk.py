"""The one way to write a file that must last, and to read it back or say that it cannot be.

Rules: written beside, flushed, renamed, the folder flushed: after any kill the path holds the old content or the new.
A flush that failed is never repeated on the same file; the next write makes a new one (fsyncgate). A state file opens
with a line of its kind, version, length and SHA-256; what does not fit is moved aside, never overwritten, and said.
One writer at a time for each path: the node's lock on its data directory sees to that. It stands on the ground floor,
which imports nothing of ours, since the key file, p2p's address book and gossip's state need it alike; it knows none
of them. Blocks the thread. Every call of the operating system goes through a System, so that a test can break the disk.
Source: SECURITY.md 3.3, rule 1; Pillai et al., "All File Systems Are Not Created Equal" (OSDI 2014).
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final, TypeVar

from crypto.errors import BadState, NewerState

ASIDE_MAX: Final = 100  # files moved aside under one name; then somebody has to look
HEADER_BYTES_MAX: Final = 256
_MAGIC: Final = b"openagi-state"
_POSIX: Final = sys.platform != "win32"
# errno -> the reason counted, and what a person can do
_REASONS: Final = {
    errno.ENOSPC: ("no_space", "make room on that disk"),
    errno.EDQUOT if _POSIX else -1: ("quota", "make room within this user's quota"),
    errno.EFBIG: ("file_size_limit", "raise the limit on file sizes (ulimit -f)"),
    errno.EIO: ("io_error", "the disk is failing: look at the system's log, and move the data directory"),
    errno.EROFS: ("read_only", "mount that disk for writing"),
    errno.EACCES: ("not_permitted", "give this user the folder (chown, chmod)"),
    errno.EPERM: ("not_permitted", "give this user the folder (chown, chmod)"),
    errno.EISDIR: ("in_the_way", "move away what stands at that path"),
    errno.ENOTDIR: ("in_the_way", "move away what stands at that path"),
    errno.EMFILE: ("too_many_files", "raise the limit on open files (ulimit -n)"),
}
Content = TypeVar("Content")
_log = logging.getLogger(__name__)


class System:
    """What is asked of the operating system, each raising OSError; a test hands in one that fails."""

    def create(self, path: Path, mode: int) -> int:
        """A new file, open for writing; never one that is there, nor what a link points to."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        return os.open(path, flags, mode)

    def append_to(self, path: Path) -> int:
        """A file to write at the end of, made if absent; the caller closes it."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        return os.open(path, flags, 0o600)

    def open_part(self, path: Path) -> int:
        """A file that is filled in any order, made if absent; never what a link points to."""
        flags = os.O_RDWR | os.O_CREAT
        flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        return os.open(path, flags, 0o600)

    def write_at(self, handle: int, content: bytes | memoryview, start: int) -> None:
        """All of it, from `start` on; the handle has one user at a time."""
        os.lseek(handle, start, os.SEEK_SET)
        left = memoryview(content)
        while left:
            left = left[self.write(handle, left) :]

    def write(self, handle: int, content: memoryview) -> int:
        """How many bytes were taken: on a disk that is nearly full, fewer than given."""
        return os.write(handle, content)

    def sync(self, handle: int) -> None:
        """The content is on the disk."""
        os.fsync(handle)

    def rename(self, old: Path, new: Path) -> None:
        """Over what is there."""
        os.replace(old, new)

    def rename_to_free(self, old: Path, new: Path) -> None:
        """FileExistsError when something is there."""
        if _POSIX:
            os.link(old, new, follow_symlinks=False)  # unlike rename, refuses; the old name is unlinked afterwards
        else:
            os.rename(old, new)  # on Windows this refuses

    def sync_folder(self, path: Path) -> None:
        """The names in the folder are on the disk."""
        if not _POSIX:
            return  # Windows cannot open a folder
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def read(self, path: Path, bytes_max: int) -> bytes:
        """At most so many bytes of a regular file."""
        # O_NONBLOCK: a FIFO in this place must not hang the start
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        handle = os.open(path, flags)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise OSError(errno.EISDIR, "it is not a regular file")
            with os.fdopen(handle, "rb", closefd=False) as file:
                return file.read(bytes_max)
        finally:
            os.close(handle)


SYSTEM: Final = System()  # has no state


def write_whole(
    path: Path, content: bytes | memoryview, *, over: bool, mode: int = 0o600, system: System = SYSTEM
) -> None:
    """Write a file whole or not at all; after this returns it survives a power loss. Makes no folder.

    over: whether it may replace what is there. A kill leaves at worst a private `.NAME.tmp-` file beside it.
    Raises FileExistsError (only unless `over`), OSError; then what was there stands.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        handle = system.create(temporary, mode)
        try:
            left = memoryview(content)
            while left:
                left = left[system.write(handle, left) :]
            system.sync(handle)
        finally:
            os.close(handle)
        (system.rename if over else system.rename_to_free)(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    system.sync_folder(path.parent)


@contextmanager
def whole_folder(path: Path, *, system: System = SYSTEM) -> Iterator[Path]:
    """A new folder to write into: it stands at `path` when the block has ended well, whole, and else not at all.

    An empty folder may be there, nothing else. A kill leaves at worst a `.NAME.tmp-` folder beside it. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name[:200]}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    beside.mkdir()
    try:
        yield beside
        for each in (*beside.rglob("*"), beside):
            if each.is_dir():
                system.sync_folder(each)
                continue
            with each.open("rb+") as file:
                system.sync(file.fileno())
        if path.exists():
            path.rmdir()  # refuses when something has come into it meanwhile
        system.rename(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    system.sync_folder(path.parent)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStatus:
    """How one state file fares. Times are unix seconds; `problem` and `set_aside` are sentences, empty when well."""

    what: str
    path: str
    writes: int
    saved_s: float | None
    failures: dict[str, int]  # reason -> count since start
    reason: str
    problem: str
    since_s: float | None  # since when there is that problem
    set_aside: str  # what was found at start and moved away, for as long as this process runs


class StateFile:
    """One file that is replaced as a whole, and how that went. Its status may be read from any thread."""

    def __init__(
        self,
        path: Path,
        *,
        kind: str,
        version: int,
        bytes_max: int,
        system: System = SYSTEM,
        wall_clock_s: Callable[[], float] = time.time,
    ) -> None:
        """kind: one word that the file says of itself. bytes_max: of the content, read or written."""
        assert kind.isidentifier(), kind
        self.path = path
        self._kind, self._version, self._bytes_max = kind, version, bytes_max
        self._system, self._clock = system, wall_clock_s
        self._what = kind.replace("_", " ")
        self._in_the_way = ""  # what stands at the path cannot be read, and could not be moved yet
        self._failures: Counter[str] = Counter()
        self._writes = 0
        self._saved_s: float | None = None
        self._problem: tuple[str, str, float] | None = None  # reason, sentence, since
        self._set_aside = ""

    # --- reading, once, at start ---

    def read(self, decode: Callable[[bytes], Content]) -> Content | None:
        """The content; None when there is none or it cannot be used, and then it was moved aside and that is said.

        decode: raises BadState for what is no content. Never raises for what the disk holds or does.
        """
        self._sweep()
        try:
            return decode(self._unwrap(self._system.read(self.path, self._bytes_max + HEADER_BYTES_MAX + 1)))
        except FileNotFoundError:
            return None
        except NewerState as exc:
            self._put_aside(str(exc))
        except BadState as exc:
            self._put_aside(f"it is damaged: {exc}")
        except OSError as exc:
            self._failures[_reason(exc)] += 1
            self._put_aside(f"it cannot be read: {exc.strerror}")
        return None

    def _unwrap(self, raw: bytes) -> bytes:
        """The content of a file. Raises BadState, NewerState."""
        line, _, body = raw[:HEADER_BYTES_MAX].partition(b"\n")
        words = line.split(b" ")
        if len(words) != 5 or words[0] != _MAGIC or not words[2].isdigit() or len(words[2]) > 9:
            raise BadState(f"its first line is not that of a state file ({len(raw)} bytes)")
        if words[1] != self._kind.encode():
            raise BadState(f"it holds {words[1].decode('ascii', 'replace')!a}, wanted {self._kind!a}")
        body = raw[len(line) + 1 :]
        if len(body) > self._bytes_max:
            raise BadState(f"it has over {self._bytes_max} bytes")
        if line != _header(self._kind, int(words[2]), body):
            raise BadState(f"its {len(body)} bytes are not those that were written (cut off or changed)")
        if int(words[2]) != self._version:
            raise NewerState(
                f"it is of version {int(words[2])}, this node reads version {self._version}; "
                "a newer node wrote it: run that one, or leave the file aside"
            )
        return body

    def _sweep(self) -> None:
        """Remove what kills left beside, now that nobody else writes here."""
        with suppress(OSError):
            for beside in self.path.parent.glob(f".{self.path.name}.tmp-*"):
                beside.unlink(missing_ok=True)

    def _put_aside(self, why: str) -> None:
        """Move what stands at the path away. When that fails, `write` tries again before it replaces anything."""
        for number in range(1, ASIDE_MAX + 1):
            aside = self.path.with_name(f"{self.path.name}.corrupt-{number}")
            if os.path.lexists(aside):
                continue
            try:
                self._system.rename(self.path, aside)
                self._system.sync_folder(self.path.parent)
            except FileNotFoundError:  # somebody moved it: nothing is in the way any more
                self._in_the_way = ""
            except OSError as exc:
                self._in_the_way = why
                self._fail(exc)
            else:
                self._in_the_way = ""
                self._set_aside = f"the {self._what} {self.path} was moved aside to {aside.name}: {why}"
                _log.warning("%s; the node starts without it", self._set_aside)
            return
        self._in_the_way = why
        self._fail(OSError(errno.EISDIR, f"{ASIDE_MAX} damaged files stand beside it already"))

    # --- writing ---

    def write(self, content: bytes) -> bool:
        """Replace the file; False when that failed, and then `status` says why and the old content stands."""
        if self._in_the_way:
            self._put_aside(self._in_the_way)
            if self._in_the_way:
                return False
        try:
            if len(content) > self._bytes_max:
                raise OSError(errno.EFBIG, f"{len(content)} bytes came, at most {self._bytes_max} are read back")
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            whole = _header(self._kind, self._version, content) + b"\n" + content
            write_whole(self.path, whole, over=True, system=self._system)
        except OSError as exc:
            self._fail(exc)
            return False
        if self._problem is not None:
            _log.warning("the %s is saved to %s again", self._what, self.path)
        self._problem = None
        self._writes += 1
        self._saved_s = self._clock()
        return True

    def _fail(self, exc: OSError) -> None:
        """Count it; a failure of the same kind is logged once, lest the log fill the disk."""
        reason = _reason(exc)
        self._failures[reason] += 1
        before = self._problem
        if before is not None and before[0] == reason:
            return
        saved_s = self._saved_s
        stands = "nothing of this run is saved" if saved_s is None else f"what was saved at {told_time(saved_s)} stands"
        advice = next(
            (told for told_reason, told in _REASONS.values() if told_reason == reason), "see the system's log"
        )
        sentence = (
            f"the {self._what} cannot be saved to {self.path}: {exc.strerror}; the node goes on without it, {stands}; "
            f"{advice}, and it is saved again by itself"
        )
        self._problem = (reason, sentence, self._clock() if before is None else before[2])
        _log.warning("%s", sentence)

    def status(self) -> FileStatus:
        """A snapshot."""
        problem = self._problem
        return FileStatus(
            what=self._what,
            path=str(self.path),
            writes=self._writes,
            saved_s=self._saved_s,
            failures=dict(self._failures),
            reason=problem[0] if problem else "",
            problem=problem[1] if problem else "",
            since_s=problem[2] if problem else None,
            set_aside=self._set_aside,
        )


def _header(kind: str, version: int, body: bytes) -> bytes:
    told = b"%s %s %d %d" % (_MAGIC, kind.encode(), version, len(body))
    return b"%s %s" % (told, sha256(told + b"\n" + body).hexdigest().encode())


def _reason(exc: OSError) -> str:
    number = exc.errno or 0
    return _REASONS[number][0] if number in _REASONS else errno.errorcode.get(number, "unknown").lower()


def told_time(unix_s: float | None) -> str | None:
    """A time as people and programs read it, to the second."""
    return None if unix_s is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(unix_s))
