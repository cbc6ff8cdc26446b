"""From settings to a running process: reads the configuration, holds the data directory, maps failures to exit codes.

Rules: one sentence on stderr for what a user can mend, a traceback only for a bug. The lock is an OS lock on an open
file, so a killed node never leaves the directory locked.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import trio

from crypto.errors import BadKey
from model.errors import ModelError
from node.arenas import few_arenas
from node.collector import importing
from node.config import NodeConfig, load_config
from node.errors import ConfigError, DataDirLocked
from node.file_lock import try_lock
from node.log_pace import LogPace
from p2p.errors import CannotListen

EXIT_OK, EXIT_USAGE, EXIT_NO_LISTEN, EXIT_LOCKED, EXIT_UNSAFE_KEY = 0, 2, 69, 75, 78


def start(flags: Mapping[str, object], file: Path | None) -> int:
    """Run a node until it is told to stop; returns the exit code."""
    code = EXIT_OK
    try:
        config = load_config(flags, file=file)
        pace = _set_up_log(config)
        few_arenas()
        with locked(config.data_dir):
            with importing():
                from node.run import run_node  # not before the settings are good

            trio.run(partial(run_node, config, pace.left_out), strict_exception_groups=True)
    except* ConfigError as group:
        code = _say(group, EXIT_USAGE)
    except* ModelError as group:
        code = _say(group, EXIT_USAGE)
    except* DataDirLocked as group:
        code = _say(group, EXIT_LOCKED)
    except* CannotListen as group:
        code = _say(group, EXIT_NO_LISTEN)
    except* BadKey as group:  # UnsafePermissions is one
        code = _say(group, EXIT_UNSAFE_KEY)
    return code


def _say(group: BaseExceptionGroup[Exception], code: int) -> int:
    for problem in leaves(group):
        print(f"node: {problem}", file=sys.stderr)
    return code


def leaves(group: BaseExceptionGroup[Exception]) -> Iterator[BaseException]:
    """The single exceptions inside nested groups."""
    for inner in group.exceptions:
        if isinstance(inner, BaseExceptionGroup):
            yield from leaves(inner)
        else:
            yield inner


@contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    """Hold the data directory, made if absent. Raises DataDirLocked with the holder's pid, ConfigError."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = (data_dir / "lock").open("a+")
    except OSError as exc:
        why = "it is a file" if data_dir.is_file() else exc.strerror
        raise ConfigError(f"cannot use the data directory {data_dir}: {why}; choose one by --data-dir") from exc
    with file:
        if not try_lock(file.fileno()):
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise DataDirLocked(
                f"the data directory {data_dir} is in use by another node (pid {holder}): "
                "stop that one, or give this one its own --data-dir"
            )
        with suppress(OSError):  # on a full disk the lock holds all the same, and only the pid is not told
            os.truncate(file.fileno(), 0)
            os.write(file.fileno(), str(os.getpid()).encode())
        yield


class _JsonLines(logging.Formatter):
    """One JSON object a line: time, level, where, message."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "where": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _Paced(logging.Filter):
    """Leaves out what comes too often (node/log_pace.py), and says so in the next line of its kind."""

    def __init__(self) -> None:
        super().__init__()
        self.pace = LogPace()

    def filter(self, record: logging.LogRecord) -> bool:
        missing = self.pace.take(record.name, str(record.msg), time.monotonic())
        if missing:
            record.msg = f"{record.msg} ({missing} more such lines were left out)"
        return missing is not None


def _set_up_log(config: NodeConfig) -> LogPace:
    handler, paced = logging.StreamHandler(sys.stderr), _Paced()
    handler.addFilter(paced)
    handler.setFormatter(
        _JsonLines() if config.log_json else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler], force=True)
    for noisy in ("libp2p", "hypercorn.access", "httpx", "httpcore", "multiaddr", "zeroconf"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    logging.getLogger("torch").setLevel(max(logging.WARNING, logging.getLogger().level))  # its caches' figures at exit
    return paced.pace
