"""Rivals of bench.serving, each in a process of its own that is asked by lines; one that is not there is left out.

Rules: a rival is named on the command line, `transformers` or `llamacpp:PYTHON`. transformers is in the node's own
environment. llama.cpp needs one of its own, and a C++ compiler with cmake (there is no wheel on PyPI; some minutes on
two cores):

    python -m venv /tmp/llama-bench
    /tmp/llama-bench/bin/pip install llama-cpp-python gguf numpy

All run with one thread. A rival that dies, or is silent for SILENCE_S_MAX, is left out from then on, with a note.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Final

from bench.serving_asks import Ask, Told, to_line, told_of

ROOT: Final = Path(__file__).parent.parent
SILENCE_S_MAX: Final = 300.0  # to import and make a model, or for a load that takes seconds, on a busy machine
THREADS: Final = "1"
TOLD_CHARS_MAX: Final = 400  # of what a rival said before it died
DEFAULT: Final = "transformers"
GENERATE, CONTINUOUS = "generate bf16", "continuous bf16"  # transformers'
LLAMACPP: Final = {"bf16": "llama.cpp bf16", "q8_0": "llama.cpp q8_0"}
PATHS: Final = {  # name beside a figure -> its path
    "transformers": {GENERATE: "generate", CONTINUOUS: "continuous"},
    "llamacpp": {name: precision for precision, name in LLAMACPP.items()},
}
Contestant = Callable[[Sequence[Ask]], Told]


class RivalLostError(Exception):
    """A rival did not start, died, or said nothing; the text says what is known."""


class Rival:
    """One process. Use `opened`."""

    def __init__(self, command: Sequence[str], errors: IO[bytes], silence_s_max: float = SILENCE_S_MAX) -> None:
        """Starts it. Raises RivalLostError."""
        self._errors, self._silence_s_max = errors, silence_s_max
        try:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        except OSError as exc:
            raise RivalLostError(f"{command[0]} does not run ({exc.strerror})") from exc

    def wait_ready(self) -> str:
        """Its version, once it has a model. Raises RivalLostError."""
        return str(json.loads(self._line())["version"])

    def ask(self, path: str, asks: Sequence[Ask]) -> Told:
        """One load. Raises RivalLostError."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(to_line(path, asks))
            self._process.stdin.flush()
        except OSError as exc:
            raise RivalLostError(f"it has ended: {self._last_words()}") from exc
        return told_of(self._line())

    def close(self) -> None:
        """Ends it, killed if it does not end by itself."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _line(self) -> str:
        """The next line, those left out that it printed before it kept to them; a process that has none in time is
        killed. Raises RivalLostError."""
        assert self._process.stdout is not None
        late = threading.Timer(self._silence_s_max, self._process.kill)
        late.start()
        line = next((line for line in self._process.stdout if line.startswith("{")), "")
        is_late = not late.is_alive()
        late.cancel()
        if not line:
            code = self._process.wait()
            why = f"no answer within {self._silence_s_max:g} s" if is_late else f"ended with {code}"
            raise RivalLostError(f"{why}: {self._last_words()}")
        return line

    def _last_words(self) -> str:
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace").strip()
        return " ".join(text[-TOLD_CHARS_MAX:].split()) or "it said nothing"


@contextmanager
def opened(named: Sequence[str], shape: str, note: Callable[[str], None]) -> Iterator[dict[str, Contestant]]:
    """Name beside a figure -> rival. note: told of each that is left out, and why."""
    with ExitStack() as stack:
        contestants: dict[str, Contestant] = {}
        for name in named:
            errors = stack.enter_context(tempfile.TemporaryFile())
            try:
                rival = Rival(command_of(name, shape), errors)
                stack.callback(rival.close)
                version = rival.wait_ready()
            except RivalLostError as exc:
                note(f"{name} is left out: {exc}")
                continue
            kind = name.partition(":")[0]
            note(f"{kind} {version}")
            for beside, path in PATHS[kind].items():
                contestants[beside] = partial(rival.ask, path)
        yield contestants


def command_of(name: str, shape: str) -> list[str]:
    """How a rival is started. Raises ValueError for one that there is not."""
    kind, _, python = name.partition(":")
    if kind == "transformers" and not python:
        return [sys.executable, "-m", "bench.serving_transformers", shape, "bf16", THREADS]
    if kind == "llamacpp" and python:
        return [python, "-m", "bench.serving_llamacpp", shape, THREADS]
    raise ValueError(
        f"the rival {name!r} came, wanted transformers, or llamacpp:PYTHON with a Python that has llama-cpp-python; "
        "bench/serving_rivals.py says how to make one"
    )
