"""The file of a node's API keys: read anew when it changes, written whole by who adds or revokes one.

Rules: shell. The node only reads: it looks at the file's time at most once a second, and only when somebody sends a
key. A file that cannot be read at the start is an error; one that becomes so leaves the keys that were known, and says
so in the log. Who changes it holds a lock, so that of two changes none is lost.
"""

from __future__ import annotations

import logging
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crypto.disk import SYSTEM, write_whole
from node.api_keys import FILE_BYTES_MAX, ApiKey, Keyring, decode_keys, encode_keys
from node.errors import ConfigError
from node.file_lock import try_lock

KEYS_FILE = "api_keys.json"  # in the data directory
LOOK_EVERY_S = 1.0

_log = logging.getLogger("node.keys")


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys that are kept there; none when there is no file. Raises ConfigError."""
    try:
        found = path.lstat()
        _check_private(path, found)
        content = SYSTEM.read(path, FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        return ()
    except OSError as exc:
        raise ConfigError(f"cannot read the API keys {path}: {exc.strerror}") from exc
    if len(content) > FILE_BYTES_MAX:
        raise ConfigError(f"the API keys {path} are over {FILE_BYTES_MAX} bytes: that is no file of this node")
    try:
        return decode_keys(content)
    except ValueError as exc:
        raise ConfigError(f"the API keys {path} are damaged ({exc}): restore the file, or move it away") from None


def _check_private(path: Path, found: os.stat_result) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise ConfigError(f"the API keys {path} are a symbolic link; put the file itself there")
    if sys.platform != "win32" and stat.S_IMODE(found.st_mode) & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise ConfigError(f"the API keys {path} have mode {mode:04o}, others may use them; `chmod 600 {path}`")


@contextmanager
def changing_keys(path: Path) -> Iterator[list[ApiKey]]:
    """The keys, to be changed in place; written when the block ends well. Raises ConfigError."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as exc:
        raise ConfigError(f"cannot use the data directory {path.parent}: {exc.strerror}") from exc
    try:
        if not try_lock(lock):
            raise ConfigError(f"another command is changing {path}: try again when it has ended")
        before = read_keys(path)
        keys = list(before)
        yield keys
        if tuple(keys) != before:
            write_whole(path, encode_keys(keys), over=True)
    except OSError as exc:
        raise ConfigError(f"cannot write the API keys {path}: {exc.strerror}; the old ones stand") from exc
    finally:
        os.close(lock)


class KeyFile:
    """A file of keys as a running node has it."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError."""
        self._path = path
        self._seen = self._look()
        self._looked_s = float("-inf")
        self._ring = Keyring(read_keys(path))

    def __len__(self) -> int:
        return len(self._ring)

    def ring(self, now: float) -> Keyring:
        """The keys, at most LOOK_EVERY_S old. now: monotonic seconds."""
        if now - self._looked_s >= LOOK_EVERY_S:
            self._looked_s = now
            seen = self._look()
            if seen != self._seen:
                self._seen = seen
                self._read()
        return self._ring

    def _read(self) -> None:
        try:
            self._ring = Keyring(read_keys(self._path))
        except ConfigError as exc:
            _log.warning("%s; the keys known before are still taken", exc)
        else:
            _log.info("the API keys were read again: %d", len(self._ring))

    def _look(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.lstat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino
