"""Machine code of our own for this processor, compiled when it is first wanted; and whether that can be had here.

Rules: llvmlite alone, which carries LLVM and needs no compiler. What is compiled stays for the life of the process.
Several threads share a kernel's work through the OpenMP that torch itself uses, so that no second pool of threads
competes with it; where that is not found, kernels are used only while torch computes in one thread. Whoever uses a
kernel tries it first against torch (`model/native_*.py`), and does without it where it is off.
Source: llvmlite, "Execution engine"; madvise(2); GNU libgomp manual, "Implementing PARALLEL construct".
"""

from __future__ import annotations

import ctypes
import logging
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch

from model.errors import FOREIGN, first_line

try:
    import llvmlite.binding as llvm
    from llvmlite import ir
except ImportError:  # a platform that it has no wheel for
    llvm = ir = None

OPENMP: Final = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
PAGE_OUT: Final = 21  # Linux' MADV_PAGEOUT: it keeps what is in them
WORK_MIN: Final = 1 << 18  # multiplications from which on a second thread is worth waking
_log = logging.getLogger(__name__)
_lock: Final = threading.Lock()
_kept: Final[list[Any]] = []  # engines: their code goes with them

Function = Callable[..., None]


@cache
def features() -> frozenset[str]:
    """What this processor's instructions are called by LLVM; empty where there is no llvmlite."""
    if llvm is None:
        return frozenset()
    return frozenset(name for name, has in llvm.get_host_cpu_features().items() if has)


@cache
def lanes() -> int:
    """Numbers of 32 bits in a vector here; 0: there are no kernels for this processor."""
    here = features()
    if {"avx512f", "avx512vl", "avx512bw", "avx512dq"} <= here:
        return 16
    return 8 if {"avx2", "fma"} <= here else 0


def threads_for(work: int) -> int:
    """Threads to share so many multiplications."""
    return torch.get_num_threads() if work >= WORK_MIN and _openmp() else 1


def is_able() -> bool:
    """Whether kernels may be used, with the threads that torch has now."""
    return lanes() > 0 and (torch.get_num_threads() == 1 or _openmp())


def compiled(build: Callable[[Any], dict[str, tuple[int, int]]]) -> dict[str, Function]:
    """The kernels that `build` writes into a module, by name; it says of each how many pointers and numbers it takes.

    They are called with data_ptr()s, numbers, total and threads, let go of the GIL, and check nothing. Raises what
    LLVM raises."""
    with _lock:
        _openmp()
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        module = ir.Module()
        takes = build(module)
        parsed = llvm.parse_assembly(str(module))
        parsed.verify()
        flags = llvm.get_host_cpu_features().flatten() + ",-prefer-256-bit"
        target = llvm.Target.from_default_triple()
        machine = target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=flags, opt=3)
        passes = llvm.create_pass_builder(machine, llvm.PipelineTuningOptions(speed_level=2))
        passes.getModulePassManager().run(parsed, passes)
        engine = llvm.create_mcjit_compiler(parsed, machine)
        engine.finalize_object()
        _kept.append((engine, machine))
        _let_go()
    made: dict[str, Function] = {}
    for name, (pointers, numbers) in takes.items():
        kinds = [ctypes.c_void_p] * pointers + [ctypes.c_int64] * (numbers + 2)
        made[name] = ctypes.CFUNCTYPE(None, *kinds)(engine.get_function_address(name))
    return made


def tried(what: str, trial: Callable[[], bool]) -> bool:
    """Whether a kernel works here: what its trial says; a failure of any kind is a no, said once in the log."""
    try:
        if trial():
            return True
        why = "its numbers are off"
    except (*FOREIGN, RuntimeError, OSError) as exc:
        why = f"{type(exc).__name__}: {first_line(exc)}"
    _log.warning("%s in machine code of our own is not used here: %s", what, why)
    return False


def _let_go() -> None:
    """LLVM is in memory and not needed any more, until something else is compiled: 70 MB that the system may have."""
    if sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in _mapped("libllvmlite"):
        begin, end = (int(each, 16) for each in line.split(maxsplit=1)[0].split("-"))
        madvise(begin, end - begin, PAGE_OUT)  # where the kernel does not, they stay as they are


def _mapped(name: str) -> list[str]:
    """Lines of this process's memory map for a library."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if name in line]


@cache
def _openmp() -> bool:
    """Make torch's OpenMP known to what is compiled; False where it has none of GNU's."""
    if sys.platform == "linux":
        found = sorted(_mapped("libgomp"), key=lambda line: "torch" not in line)  # others bring one of their own
        for line in found[:1]:
            library = ctypes.CDLL("/" + line.partition("/")[2])
            for name in OPENMP:
                llvm.add_symbol(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
            return True
    for name in OPENMP:  # never called: there is one thread only
        llvm.add_symbol(name, 1)
    return False
