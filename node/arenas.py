"""How many heaps the C library keeps: few, so that what one thread freed another can use.

Rules: glibc gives each thread that allocates a heap of its own, up to eight a core, and none gives back what lies under
its last block in use. A node has few threads that allocate much at once, and those of Python take turns anyway.
Source: mallopt(3), M_ARENA_MAX; measured by tests/test_fuzz_host.py.
"""

from __future__ import annotations

import ctypes
import platform
import sys

ARENAS_MAX = 2
_M_ARENA_MAX = -8


def few_arenas() -> bool:
    """For this process, from now on: before threads are started. False where the C library is another."""
    if sys.platform != "linux":
        return False
    try:
        return platform.libc_ver()[0] == "glibc" and bool(ctypes.CDLL(None).mallopt(_M_ARENA_MAX, ARENAS_MAX))
    except (OSError, AttributeError):  # libc_ver reads the interpreter's file; another library has no mallopt
        return False
