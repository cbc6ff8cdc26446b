"""A lock of the operating system on an open file: gone with the process that holds it, however that ends."""

from __future__ import annotations

import sys


def try_lock(descriptor: int) -> bool:
    """Lock it, for as long as it is open here; False when somebody else has."""
    try:
        if sys.platform == "win32":
            import msvcrt  # Windows only

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl  # not on Windows

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
