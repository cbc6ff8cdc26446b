"""node/arenas.py: a process with few heaps keeps few, whatever its threads do."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, re, sys, tempfile, threading
if sys.argv[1] == "few":
    from node.arenas import few_arenas
    assert few_arenas()
libc = ctypes.CDLL(None)
held, gate = [], threading.Barrier(9)
def allocate():
    libc.malloc.restype = ctypes.c_void_p
    held.append(libc.malloc(1000))
    gate.wait()
threads = [threading.Thread(target=allocate) for _ in range(8)]
for thread in threads: thread.start()
gate.wait()
with tempfile.TemporaryFile("w+") as file:
    libc.fdopen.restype = ctypes.c_void_p
    stream = libc.fdopen(file.fileno(), b"w")
    libc.malloc_info(0, ctypes.c_void_p(stream))
    libc.fflush(ctypes.c_void_p(stream))
    file.seek(0)
    print(len(re.findall("<heap nr", file.read())))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_few_heaps_whatever_threads_do() -> None:
    heaps = {}
    for how in ("few", "as they come"):
        done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
        heaps[how] = int(done.stdout)
    assert heaps["few"] <= 2 < heaps["as they come"]
